"""Run ``megatron-gmpo export_quantized``; see megatron_gmpo/commands/export_quantized.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("export_quantized")
