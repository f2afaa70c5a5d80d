"""Run ``megatron-gmpo plan``; see megatron_gmpo/commands/plan.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("plan")
