"""Scripts that run the commands of ``megatron_gmpo.commands``: ``python tools/NAME.py``."""
