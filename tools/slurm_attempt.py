"""Run ``megatron-gmpo slurm_attempt``; see megatron_gmpo/commands/slurm_attempt.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("slurm_attempt")
