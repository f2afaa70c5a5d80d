"""Run ``megatron-gmpo countdown``; see megatron_gmpo/commands/countdown.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("countdown")
