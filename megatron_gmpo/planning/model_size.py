"""The size of the whole model, from the plans of its pipeline stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..models.fp8_blocks import BLOCK
from .rank_plan import RankPlan


@dataclass(frozen=True)
class Model:
    """The size of the whole model.

    Attributes:
        parameters: elements of all parameters.
        active_parameters: elements that one token uses.
        expert_parameters: elements of routed experts.
        kv_heads: number of key-value heads.
        kv_head_bytes: bytes of one token's keys and values in one head, summed over layers.
        num_layers: number of layers.
        vocab_size: number of token ids.
        num_experts: experts per MoE layer; 0 for a dense model.
        topk: experts per token; 0 for a dense model.
        served_weights: bytes of the weights on a server, and of a weight sync.
        tower_parameters: elements of the vision tower, which no token of text uses.
    """

    parameters: int
    active_parameters: int
    expert_parameters: int
    kv_heads: int
    kv_head_bytes: int
    num_layers: int
    vocab_size: int
    num_experts: int
    topk: int
    served_weights: int
    tower_parameters: int = 0

    @property
    def weights(self) -> int:
        """Return the bytes of the weights in bf16."""
        return 2 * self.parameters

    @property
    def expert_bytes(self) -> int:
        """Return the bytes of the record of one token's experts."""
        return self.num_layers * self.topk * (1 if self.num_experts <= 256 else 2)

    def kv_bytes_on(self, gpus: int) -> int:
        """Return the bytes of one token in the caches of all GPUs of a server.

        Each GPU holds whole heads, at least one.
        """
        return self.kv_head_bytes * max(self.kv_heads, gpus)


def model_of(
    plans: list[RankPlan], hf: Any, transformer: Any, padding: int, *, quantized: bool, tower: int = 0
) -> Model:
    """Return the size of the whole model from the plans of its stages.

    Args:
        padding: number of elements that pad the vocabulary.
        quantized: whether the servers hold the weights in block-wise FP8.
        tower: number of elements of the vision tower.
    """
    parameters = sum(plan.stage_parameters for plan in plans) - padding
    experts = sum(plan.stage_expert_parameters for plan in plans)
    count, topk = (
        transformer.num_moe_experts or 0,
        transformer.moe_router_topk if transformer.num_moe_experts else 0,
    )
    idle = experts * (count - topk) // count if count else 0
    if getattr(transformer, "multi_latent_attention", False):
        kv_heads, kv = 1, 2 * (hf.kv_lora_rank + hf.qk_rope_head_dim)  # latents, which all heads share
    else:
        kv_heads, kv = transformer.num_query_groups, 2 * 2 * transformer.kv_channels
    layers = transformer.num_layers
    # embeddings and routers stay in bf16; norms are small
    wide = hf.hidden_size * (hf.vocab_size * (1 if hf.tie_word_embeddings else 2) + layers * count)
    served = 2 * wide + (parameters - wide) * (1 + 4 / BLOCK**2) if quantized else 2 * parameters
    return Model(
        parameters=parameters,
        active_parameters=parameters - idle - tower,
        expert_parameters=experts,
        kv_heads=kv_heads,
        kv_head_bytes=kv * layers,
        num_layers=layers,
        vocab_size=hf.vocab_size,
        num_experts=count,
        topk=topk,
        served_weights=round(served),
        tower_parameters=tower,
    )
