"""Run ``megatron-gmpo view``; see megatron_gmpo/commands/view.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("view")
