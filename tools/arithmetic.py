"""Run ``megatron-gmpo arithmetic``; see megatron_gmpo/commands/arithmetic.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("arithmetic")
