"""Run ``megatron-gmpo train``; see megatron_gmpo/commands/train.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("train")
