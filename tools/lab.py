"""Run ``megatron-gmpo lab``; see megatron_gmpo/commands/lab.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("lab")
