"""Run ``megatron-gmpo demo``; see megatron_gmpo/commands/demo.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("demo")
