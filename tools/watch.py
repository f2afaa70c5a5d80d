"""Run ``megatron-gmpo watch``; see megatron_gmpo/commands/watch.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("watch")
