"""Run ``megatron-gmpo inspect_checkpoint``; see megatron_gmpo/commands/inspect_checkpoint.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("inspect_checkpoint")
