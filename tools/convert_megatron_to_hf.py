"""Run ``megatron-gmpo convert_megatron_to_hf``; see megatron_gmpo/commands/convert_megatron_to_hf.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("convert_megatron_to_hf")
