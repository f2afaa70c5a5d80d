"""Run ``megatron-gmpo make_tiny_model``; see megatron_gmpo/commands/make_tiny_model.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("make_tiny_model")
