"""Run ``megatron-gmpo evaluate``; see megatron_gmpo/commands/evaluate.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("evaluate")
