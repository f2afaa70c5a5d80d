"""Run ``megatron-gmpo mismatch``; see megatron_gmpo/commands/mismatch.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("mismatch")
