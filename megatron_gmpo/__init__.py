"""GMPO post-training of dense and mixture-of-experts language models on Megatron-Core."""

import warnings

__version__ = "0.1.0"

# Megatron says at import, once a module, that apex or Transformer Engine is absent; where that matters the config is refused.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
# It also still calls collectives by names that torch has renamed.
warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
