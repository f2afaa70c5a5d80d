"""The product of the output layer in fp32, for the policy and for the embedded rollout engine."""

from __future__ import annotations

import torch
from torch import Tensor


def fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b``, (M, N) fp32, of bf16 factors (M, K) and (K, N).

    bf16 values are exact in fp32. The result differs from the exact one by the rounding of fp32 sums only,
    and is not rounded to bf16. SGLang's ``enable_fp32_lm_head`` computes the same (logits_processor.py).
    """
    if a.device.type == "cpu":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)  # not run on a GPU yet
