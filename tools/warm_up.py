"""Run ``megatron-gmpo warm_up``; see megatron_gmpo/commands/warm_up.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("warm_up")
