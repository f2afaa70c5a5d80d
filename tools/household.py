"""Run ``megatron-gmpo household``; see megatron_gmpo/commands/household.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("household")
