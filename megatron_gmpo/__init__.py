"""GMPO post-training of dense and mixture-of-experts language models on Megatron-Core."""

import warnings

__version__ = "0.1.0"

# Each module of Megatron warns at import that apex or Transformer Engine is missing. The config is checked
# where they are needed.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
# Megatron calls collectives by names that torch has deprecated.
warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
