"""Run ``megatron-gmpo convert_hf_to_megatron``; see megatron_gmpo/commands/convert_hf_to_megatron.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("convert_hf_to_megatron")
