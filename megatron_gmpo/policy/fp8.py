"""FP8 with Transformer Engine: requirements on machine, model and layout, and weights stored in FP8.

Without Transformer Engine, Megatron silently computes without FP8 (fp8_utils.py:get_fp8_context). This module
raises an error instead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import package_info
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from ..config import Config
from ..errors import InputError
from ..losses.objective import needed_columns
from ..platform.capabilities import Capabilities

_OLDEST = (2, 9)
_TOO_NEW = (2, 12) if package_info.MINOR < 17 else (sys.maxsize, 0)
"""First version of Transformer Engine that Megatron-Core does not accept.

0.16.1 has an upper bound (its pyproject.toml), 0.19.2 has none."""
_RANGE = f">= {_OLDEST[0]}.{_OLDEST[1]}" + (", < 2.12" if _TOO_NEW == (2, 12) else "")


def check_fp8(cfg: Config, transformer: TransformerConfig, machine: Capabilities) -> None:
    """Check that this machine, and this model in this layout, support ``fp8.recipe``, if it is set.

    Raises:
        InputError: no GPU; Transformer Engine is missing or of an unsupported version; the GPU or CUDA does
            not support the recipe (Transformer Engine's pytorch/quantization.py); the recipe does not work
            with a reference policy; the kernels do not support the size of a matrix.
    """
    recipe = cfg.fp8.recipe
    if recipe is None:
        return
    setting = f"fp8.recipe = {recipe!r}"
    if recipe == "delayed" and "ref_logprobs" in needed_columns(cfg.algorithm):
        # The config refuses algorithm.kl_coef > 0 in the same way.
        raise InputError(
            f"{setting} with algorithm.loss = {cfg.algorithm.loss!r}, which needs ref_logprobs: training "
            "would change the reference policy's scales; choose 'tensorwise', or another loss"
        )
    if not machine.device:
        raise InputError(f"{setting} needs an NVIDIA GPU, and this run is on a CPU: remove it")
    if machine.transformer_engine is None:
        raise InputError(
            f"{setting} needs Transformer Engine {_RANGE}: install it as docs/install_gpu.md says, "
            "or remove the recipe"
        )
    if not _OLDEST <= machine.transformer_engine < _TOO_NEW:
        raise InputError(
            f"{setting} needs Transformer Engine {_RANGE}, and {_dotted(machine.transformer_engine)} "
            "is installed: install a supported version"
        )
    oldest, too_new = _GPUS[recipe]
    if not oldest <= machine.compute_capability < too_new:
        need = f"of compute capability {_dotted(oldest)} or more" + (
            f", below {_dotted(too_new)}" if too_new != _ANY else ""
        )
        found = f"{machine.device} has {_dotted(machine.compute_capability)}"
        others = [name for name, (low, high) in _GPUS.items() if low <= machine.compute_capability < high]
        raise InputError(
            f"{setting} needs a GPU {need}, and {found}: "
            + (f"choose {others[-1]!r}" if others else "remove it")
        )
    if recipe == "blockwise" and machine.cuda < (12, 9):
        raise InputError(
            f"{setting} needs CUDA 12.9 or newer, and torch was built with {_dotted(machine.cuda)}: "
            "choose 'tensorwise'"
        )
    multiple = _multiple(recipe)
    for side, size in _sides(transformer):
        if size % multiple:
            raise InputError(
                f"{setting} needs matrices with sides that {multiple} divides, and {side} is {size}: "
                + (
                    "choose 'tensorwise'"
                    if multiple > 16 and size % 16 == 0
                    else "choose another layout, or remove it"
                )
            )


_ANY = (99, 0)
_GPUS = {
    "delayed": ((8, 9), _ANY),
    "tensorwise": ((8, 9), _ANY),
    "blockwise": ((9, 0), _ANY),
    "mxfp8": ((10, 0), (12, 0)),
}
"""For each recipe, the lowest compute capability that supports it, and the lowest above it that does not."""


def total_multiple(cfg: Config) -> int:
    """Return the number that must divide the slots of a microbatch, counted over all context-parallel ranks.

    Under sequence parallelism each rank of a tensor-parallel group gets an equal range of the slots. Under
    FP8 the length of that range must be a multiple of 16 or 32 for the kernels. Megatron's own padding
    supports parallelism or FP8, not both (common/embeddings, get_padding). The router or the experts pad the
    tokens of each expert.
    """
    parallel = cfg.parallel
    ranks = parallel.context_parallel_size * (
        parallel.tensor_model_parallel_size if parallel.uses_sequence_parallel else 1
    )
    return ranks * (_multiple(cfg.fp8.recipe) if cfg.fp8.recipe else 1)


def drop_initial_values(chunks: list[torch.nn.Module]) -> None:
    """Free the high-precision initial values that FP8 weights keep for the main weights of an optimizer."""
    parameter: Any
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        if hasattr(parameter, "clear_high_precision_init_val"):
            parameter.clear_high_precision_init_val()


def _multiple(recipe: str) -> int:
    """Return the number that must divide both sides of a matrix.

    A block of 128 at the end of a matrix may be smaller. A sequence-parallel gather then uses bf16. Sources:
    fp8_utils.py:get_fp8_align_size, and pytorch/utils.py and mxfp8_tensor.py of Transformer Engine.
    """
    return 32 if recipe == "mxfp8" else 16


def _sides(transformer: TransformerConfig) -> Iterator[tuple[str, int]]:
    """Yield name and size of each side of the layers' matrices on one rank."""
    tp, etp = transformer.tensor_model_parallel_size, transformer.expert_tensor_parallel_size or 1
    yield "the hidden size", transformer.hidden_size
    heads, width = transformer.num_attention_heads // tp, transformer.kv_channels or 0
    if isinstance(transformer, MLATransformerConfig):
        rotary, plain, values = (
            transformer.qk_pos_emb_head_dim,
            transformer.qk_head_dim,
            transformer.v_head_dim,
        )
        if transformer.q_lora_rank:
            yield "q_lora_rank", transformer.q_lora_rank
        yield "kv_lora_rank", transformer.kv_lora_rank
        yield "kv_lora_rank + qk_rope_head_dim", transformer.kv_lora_rank + rotary
        yield "query heads x head size / tensor_model_parallel_size", heads * (plain + rotary)
        yield "heads x (qk_nope_head_dim + v_head_dim) / tensor_model_parallel_size", heads * (plain + values)
        yield "heads x v_head_dim / tensor_model_parallel_size", heads * values
    else:
        groups = (transformer.num_query_groups or transformer.num_attention_heads) // tp
        yield "query heads x head size / tensor_model_parallel_size", heads * width
        yield (
            "(query + key + value heads) x head size / tensor_model_parallel_size",
            (heads + 2 * groups) * width,
        )
    frequency = transformer.moe_layer_freq
    if not transformer.num_moe_experts or (0 in frequency if isinstance(frequency, list) else frequency > 1):
        yield "the intermediate size / tensor_model_parallel_size", (transformer.ffn_hidden_size or 0) // tp
    if transformer.num_moe_experts:
        yield (
            "the experts' intermediate size / expert_tensor_parallel_size",
            (transformer.moe_ffn_hidden_size or 0) // etp,
        )
    if shared := transformer.moe_shared_expert_intermediate_size:
        yield "the shared expert's intermediate size / tensor_model_parallel_size", shared // tp


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
