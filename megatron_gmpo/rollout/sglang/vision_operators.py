"""Declare operators that SGLang's processor of Qwen images looks up on a CPU. Runs in the server's process.

``sglang/srt/multimodal/processors/qwen_vl.py`` imports every model that it can serve, and two of them look up
operators of SGLang's CPU kernels at import, which are on no package index. Without them SGLang registers no
processor. Qwen2.5-VL and Qwen3-VL call none of them.
"""

from torch import library

for _name in (
    "fused_gdn_gating",
    "fused_moe_router",
    "fused_qk_gemma_rmsnorm",
    "fused_qk_gemma_rmsnorm_with_gate",
    "fused_qkvzba_split_reshape_cat",
    "fused_qkvzba_split_reshape_cat_contiguous",
    "fused_sigmoid_gating_delta_rule_update",
    "fused_sigmoid_mul",
):
    library.define(f"sgl_kernel::{_name}_cpu", "(Tensor a) -> Tensor")
