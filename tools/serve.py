"""Run ``megatron-gmpo serve``; see megatron_gmpo/commands/serve.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("serve")
