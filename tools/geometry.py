"""Run ``megatron-gmpo geometry``; see megatron_gmpo/commands/geometry.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("geometry")
