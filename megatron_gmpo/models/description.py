"""Make a ModelDescription from config.json and the run config, before any process group starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import LayerType
from transformers import AutoConfig

from ..batch.columns import RoutingShape
from ..config import Config
from ..errors import InputError, one_line
from ..platform.capabilities import transformer_engine_version
from . import FAMILIES
from .decoder import prediction_layers
from .family import HFConfig, language_config
from .folder import check_folder
from .fusions import describe_fusions
from .layout import check_layout
from .mapping import Mapping
from .operations import padded_vocab_size
from .transformer_config import transformer_config

if TYPE_CHECKING:
    from .vision import VisionDescription

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelDescription:
    """Everything needed to build a model, without tensors.

    Attributes:
        hf: the Hugging Face config of the language model, see ``language_config``.
        transformer: Megatron's config, including the parallel layout.
        mapping: the name table.
        padded_vocab_size: rows of the embedding, see ``operations.padded_vocab_size``.
        rope: GPTModel's rotary arguments.
        use_transformer_engine: whether Transformer Engine's layer spec is used, which needs a GPU, or the
            plain torch spec, which has no FP8. ``policy.fp8.check_fp8`` checks whether the machine supports
            ``cfg.fp8``.
        vision: the vision part of a vision-language model.
    """

    hf: HFConfig
    transformer: TransformerConfig
    mapping: Mapping
    padded_vocab_size: int
    rope: dict[str, Any]
    use_transformer_engine: bool
    vision: VisionDescription | None = None

    @property
    def whole(self) -> HFConfig:
        """Return the Hugging Face config of the whole model."""
        return self.vision.whole if self.vision else self.hf

    @property
    def fusions(self) -> str:
        """Return which fused kernels are on, for the user; empty without Transformer Engine."""
        return describe_fusions(vars(self.transformer)) if self.use_transformer_engine else ""

    @property
    def is_moe(self) -> bool:
        return bool(self.transformer.num_moe_experts)

    @property
    def routing(self) -> RoutingShape:
        """Return the MoE layers and their experts."""
        config = self.transformer
        assert config.num_moe_experts
        # an int n for every n-th layer from the first, or 0 or 1 for each layer (gpt_layer_specs.py)
        frequency = config.moe_layer_freq
        if isinstance(frequency, int):
            frequency = [layer % frequency == 0 for layer in range(config.num_layers)]
        layers = tuple(layer for layer, moe in enumerate(frequency) if moe)
        return RoutingShape(config.num_layers, layers, config.num_moe_experts, config.moe_router_topk)


def describe_model(cfg: Config, world_size: int, device: torch.device) -> ModelDescription:
    """Read ``cfg.model.path`` and check the model against the layout and the [megatron] table.

    Raises:
        InputError: the folder contains no model, or its family has no table; the layout does not divide the
            world size, the heads, the layers or the experts; a [megatron] field is unknown, contradicts
            another setting or needs a missing library; a pipeline stage has fewer layers than the number to
            keep in bf16; a setting requires routed experts and the model has none; a [megatron] field
            prevents recording or replaying the routing.
    """
    whole = read_hf_config(cfg.model.path)
    family, hf = FAMILIES[whole.model_type], language_config(whole)
    architecture = architecture_of(whole)
    with _readable(hf):
        check_layout(cfg, architecture, world_size)
    use_te = device.type == "cuda" and transformer_engine_version() is not None
    transformer = transformer_config(cfg, architecture, DTYPES[cfg.model.dtype], world_size, use_te)
    vocab_size = padded_vocab_size(hf.vocab_size, cfg.parallel.tensor_model_parallel_size)
    with _readable(hf):
        rows = family.rows(hf, vocab_size)
        mapping = Mapping(rows, tied=hf.tie_word_embeddings, left_out=prediction_layers(hf))
        rope = _rope(hf, architecture, partial=family.partial_rotary)
        vision = vision_of(whole)
    if vision:
        _check_stages_have_layers(transformer)
    return ModelDescription(hf, transformer, mapping, vocab_size, rope, use_te, vision)


def _check_stages_have_layers(transformer: TransformerConfig) -> None:
    """Check that every pipeline stage has a decoder layer, to which deepstack features can be added."""
    layout: Any = transformer.pipeline_model_parallel_layout
    stages = layout.layout if layout else ()
    if any(LayerType.decoder not in chunk for stage in stages for chunk in stage):
        raise InputError(
            f"megatron.pipeline_model_parallel_layout = {layout.input_data!r} has a stage without decoder "
            "layers, which a vision-language model cannot have: give each stage a layer"
        )


def architecture_of(whole: HFConfig) -> dict[str, Any]:
    """Return the fields of Megatron's TransformerConfig that config.json determines.

    Raises:
        InputError: the model needs a computation that Megatron or this code does not implement, or a field
            is missing or has a wrong type.
    """
    with _readable(whole):
        return FAMILIES[whole.model_type].architecture(language_config(whole))


def auto_class(whole: HFConfig) -> Any:
    """Return transformers' class that builds or loads the whole model."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText  # slow, and rarely needed

    return AutoModelForImageTextToText if hasattr(whole, "vision_config") else AutoModelForCausalLM


def vision_of(whole: HFConfig) -> VisionDescription | None:
    """Return the vision part of a model, or None.

    Raises:
        InputError: config.json requires a computation that this code does not implement.
    """
    if not hasattr(whole, "vision_config"):
        return None
    from .vision import describe_vision  # not for text models

    with _readable(whole):
        return describe_vision(whole)


@contextmanager
def _readable(hf: HFConfig) -> Iterator[None]:
    """Report a field of config.json that is missing, or has a type or value that its use does not allow."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError) as error:
        raise InputError(
            f"config.json of this {hf.model_type} model cannot be used "
            f"({type(error).__name__}: {one_line(error)}): correct it"
        ) from None


def read_hf_config(path: str, field: str = "model.path") -> HFConfig:
    """Return the Hugging Face config of a model folder, for a vision-language model that of the whole model.

    Args:
        field: the setting that contains ``path``, for error messages.

    Raises:
        InputError: the folder has no config.json, or the model's family has no table; or see
            ``check_folder``.
    """
    if not path:
        raise InputError(f"{field} is empty: give a Hugging Face model folder")
    if not (Path(path) / "config.json").is_file():
        raise InputError(f"{field} = {path!r} has no config.json: give a Hugging Face model folder")
    code = {model_type: family.code for model_type, family in FAMILIES.items()}
    check_folder(Path(path), f"{field} = {path!r}", code)
    try:
        hf = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # an odd type or value raises anything
        raise InputError(
            f"{field} = {path!r}: config.json cannot be read ({one_line(error)}): correct it"
        ) from None
    if hf.model_type not in FAMILIES:
        raise InputError(
            f"{field} = {path!r} is a {hf.model_type!r} model, a family without a table: "
            f"use one of {', '.join(FAMILIES)}"
        )
    return hf


def _rope(hf: HFConfig, architecture: dict[str, Any], *, partial: bool) -> dict[str, Any]:
    rope = hf.rope_parameters
    fraction = rope.get("partial_rotary_factor", 1.0)
    if fraction != 1 and not partial:
        raise InputError(
            f"config.json of this {hf.model_type} model has partial_rotary_factor = {fraction!r}, "
            "which this family does not have: remove it"
        )
    if architecture.get("multi_latent_attention"):  # these layers read the rotary fields of TransformerConfig
        return {}
    base = {"rotary_base": rope["rope_theta"], "rotary_percent": fraction}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return base
    # constants of Llama 3's frequency scaling in Megatron-Core (rotary_pos_embedding.py:_apply_scaling)
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind == "llama3" and all(rope[key] == value for key, value in llama3.items()):
        return base | {"rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    raise InputError(
        f"config.json of this {hf.model_type} model has rope_parameters = {rope!r}: "
        "only default and llama3 are supported; use another model"
    )
