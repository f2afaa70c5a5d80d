"""GMPO post-training of dense and mixture-of-experts language models on Megatron-Core."""

__version__ = "0.1.0"
