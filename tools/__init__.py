"""The commands of ``megatron_gmpo.commands``, for people who look for them here: ``python tools/NAME.py``."""
