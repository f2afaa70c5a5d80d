"""Model families: config.json -> Megatron model, and the names of its tensors."""

from .deepseek import DEEPSEEK_V3
from .family import Family
from .glm import GLM4_MOE
from .llama import LLAMA
from .mixtral import MIXTRAL
from .qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from .qwen_vl import QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE

FAMILIES: dict[str, Family] = {
    "deepseek_v3": DEEPSEEK_V3,
    "glm4_moe": GLM4_MOE,
    "llama": LLAMA,
    "mixtral": MIXTRAL,
    "qwen2": QWEN2,
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_vl": QWEN3_VL,
    "qwen3_vl_moe": QWEN3_VL_MOE,
}
"""``model_type`` of config.json -> family."""
