"""Sections of the model, its precision and its parallel layout."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .section import PathText, Positive, Section


class ModelConfig(Section):
    """The policy and the reference policy."""

    path: PathText = ""
    """Hugging Face folder of the policy, with config.json, safetensors and tokenizer, or a name on the hub:
    ``owner/name`` or ``owner/name@revision``."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Dtype of weights and activations. The optimizer keeps fp32 main weights."""
    fp32_head: bool | None = None
    """Whether policy and rollout engine keep the logits of a bf16 model in fp32, instead of rounding them to
    bf16. None keeps them in fp32, except with servers of ``rollout.server_urls``, which the run cannot start
    with SGLang's ``--enable-fp32-lm-head``."""
    freeze_vision: bool = True
    """Do not train the vision tower of a vision-language model. It then has no gradients and no optimizer
    state, and weight sync leaves it out."""
    reference_path: PathText = ""
    """Folder or hub name of the reference policy; empty means ``path``. It is loaded only if
    ``algorithm.kl_coef`` > 0 or the loss needs ``ref_logprobs``."""
    reference_offload: bool = False
    """Keep the reference policy's weights in host memory, and move them to the device only while it computes
    log probabilities."""


class Fp8Config(Section):
    """FP8 matrix products of Transformer Engine (docs/fp8.md). A machine without support refuses the run."""

    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = None
    """Scaling of tensors: one scale per tensor, from earlier steps (``delayed``) or from its current values
    (``tensorwise``), or one scale per block of 128 (``blockwise``) or 32 (``mxfp8``) values. None disables
    FP8."""
    format: Literal["hybrid", "e4m3"] | None = None
    """FP8 format; ``hybrid`` uses E5M2 for gradients. None chooses Transformer Engine's default: ``e4m3`` for
    ``blockwise`` and ``mxfp8``, ``hybrid`` for the other recipes."""
    num_layers_at_start_in_bf16: Annotated[int, Field(ge=0)] = 0
    """Number of layers at the start that stay in bf16; 0 with ``delayed``."""
    num_layers_at_end_in_bf16: Annotated[int, Field(ge=0)] = 0
    """Number of layers at the end that stay in bf16; 0 with ``delayed``."""
    param: bool = False
    """Hold and gather the layers' weights in FP8. The optimizer keeps fp32 main weights."""
    moe_router_padding_for_quantization: bool = True
    """Pad each expert's tokens by routing more tokens to it with weight 0, instead of by a copy (MoE)."""

    @model_validator(mode="after")
    def _fields_fit_the_recipe(self) -> Fp8Config:
        changed = {
            name: getattr(self, name)
            for name, field in Fp8Config.model_fields.items()
            if getattr(self, name) != field.default
        }
        if self.recipe is None and changed:
            name, value = next(iter(changed.items()))
            raise ValueError(
                f"{name} = {value!r} needs a recipe: set fp8.recipe = 'tensorwise', or remove it"
            )
        if self.recipe == "delayed" and self.bf16_layers:
            raise ValueError(
                "layers in bf16 need another recipe than 'delayed', which updates all scales together: "
                "choose 'tensorwise'"
            )
        if self.recipe == "mxfp8" and self.param:
            raise ValueError(
                "param = true needs another recipe than 'mxfp8', whose weights Megatron gathers in bf16: "
                "set it to false"
            )
        return self

    @property
    def bf16_layers(self) -> int:
        """Return the number of layers that stay in bf16."""
        return self.num_layers_at_start_in_bf16 + self.num_layers_at_end_in_bf16


class ParallelConfig(Section):
    """Sizes of Megatron's parallel groups. The data-parallel size follows from the number of processes."""

    tensor_model_parallel_size: Positive = 1
    """Number of ranks that share each dense layer."""
    pipeline_model_parallel_size: Positive = 1
    """Number of pipeline stages."""
    virtual_pipeline_model_parallel_size: Positive | None = None
    """Number of model chunks per pipeline rank (interleaved schedule)."""
    context_parallel_size: Positive = 1
    """Number of ranks that share the tokens of each sequence."""
    expert_model_parallel_size: Positive = 1
    """Number of ranks that share the routed experts of each layer."""
    expert_tensor_parallel_size: Positive = 1
    """Number of ranks that share each routed expert."""
    sequence_parallel: bool | None = None
    """Whether tensor-parallel ranks also split the tokens between their layers. None enables it if
    tensor_model_parallel_size > 1."""

    @property
    def uses_sequence_parallel(self) -> bool:
        on = self.tensor_model_parallel_size > 1
        return on if self.sequence_parallel is None else self.sequence_parallel and on

    @property
    def model_parallel_size(self) -> int:
        """Return the number of ranks that hold one replica of the dense layers."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    @property
    def sequence_multiple(self) -> int:
        """Return the number whose multiples sequences are padded to.

        With context parallelism each rank holds two chunks of every sequence.
        """
        return 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1

    @property
    def microbatch_multiple(self) -> int:
        """Return the number that must divide each rank's number of microbatches.

        The interleaved schedule has this requirement.
        """
        return self.pipeline_model_parallel_size if self.virtual_pipeline_model_parallel_size else 1

    @model_validator(mode="after")
    def _virtual_needs_pipeline(self) -> ParallelConfig:
        if self.virtual_pipeline_model_parallel_size and self.pipeline_model_parallel_size == 1:
            raise ValueError("virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1")
        return self
