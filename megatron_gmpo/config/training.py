"""Sections of the algorithm, the optimizer, training and evaluation."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .benchmarks import BENCHMARKS, benchmark
from .rollout import DataConfig
from .section import FileName, NonNegative, PathText, Positive, Section, Text

Unit = Literal["episode", "turn"]


class AlgorithmConfig(Section):
    loss: Text = "gmpo"
    """Policy loss: ``gmpo``, ``rspo``, ``grpo``, ``dr_grpo``, ``dapo``, ``gspo``, ``cispo``, or
    ``module:function``, your own loss on the Python path (docs/losses.md)."""
    clip_low: NonNegative | None = None
    """Lower half-width of the clip interval. None means the loss's default, for gmpo 0.4 (dense) or 0.2
    (MoE); the run prints it."""
    clip_high: NonNegative | None = None
    """Upper half-width of the clip interval. None means the loss's default."""
    clip: Literal["fixed", "adaptive"] = "fixed"
    """Mode of the clip. ``adaptive`` starts from ``clip_low`` and ``clip_high`` and adjusts each after every
    step to keep ``clip_signal`` at ``clip_target``."""
    clip_signal: Literal["fraction", "tail"] = "fraction"
    """Signal of the adaptive clip, over the computed tokens. ``fraction`` is the share of tokens (or of
    sequences, in a loss that clips sequences) that each side clips. ``tail`` is the absolute value of the
    0.1 % and 99.9 % quantiles of the tokens' log ratio."""
    clip_target: Annotated[float, Field(gt=0)] | None = None
    """Target of ``clip_signal``. None means 0.01 for ``fraction``; ``tail`` requires a value, e.g. 0.2."""
    clip_bounds: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    """Smallest and largest adaptive clip. None means 1/8 and 8 times the initial clip."""
    clip_gain: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Gain of the adaptive clip. A step changes the logarithm of a clip by the gain times the relative
    distance of the signal from its target, and at most by the gain."""
    options: dict[str, Any] = {}
    """Additional keyword arguments of the loss, e.g. ``dual_clip = 3.0`` for gmpo."""
    unit: Unit = "episode"
    """Sequence of the loss; n_i counts its sampled tokens. ``episode``: a whole response with all of its
    turns. ``turn``: each turn is a sequence of its own, with the episode's advantage (docs/losses.md). A
    response without tools or environment has one turn."""
    advantage: Text | None = None
    """Function from the rewards of a group to its advantages: ``normalized``, ``mean``, ``leave_one_out``, or
    ``module:function``, your own function from a tensor (n,) to a tensor (n,) (docs/losses.md). None means
    the loss's default, ``mean`` for dr_grpo and ``normalized`` for the other built-in losses; the run prints
    it."""
    old_logprobs: Literal["policy", "rollout"] = "policy"
    """Whose probabilities are the denominator of the loss's ratio. ``policy`` uses those of the policy before
    the step's first update. ``rollout`` uses those that the rollout engine reported: no pass computes them,
    and ratio and clip also cover the mismatch with the engine and the staleness of samples."""
    correction: Literal["none", "token", "sequence", "geometric"] = "none"
    """Importance weights that correct the difference between the policy's and the rollout engine's
    probabilities: per ``token``, per ``sequence`` (the product over its tokens), or ``geometric`` (the
    geometric mean over its tokens, which fits gmpo, rspo and gspo)."""
    correction_cap: Annotated[float, Field(gt=0)] = 2.0
    """Upper bound of the importance weights; larger weights are truncated."""
    mask: Literal["none", "icepop", "geometric", "off_policy"] = "none"
    """Mask of the policy term. ``icepop`` excludes tokens whose ratio of policy to rollout probability is
    outside [mask_low, mask_high]. ``geometric`` excludes sequences whose geometric mean of that ratio is
    outside. ``off_policy`` excludes sequences with a negative advantage whose mean
    ``log(pi_rollout / pi)`` over tokens exceeds ``mask_kl``."""
    mask_low: NonNegative | None = None
    """Lower bound of the ratio. None means 0.5 for ``icepop`` and 0.99 for ``geometric``."""
    mask_high: Annotated[float, Field(gt=0)] | None = None
    """Upper bound of the ratio. None means 5 for ``icepop`` and 1.01 for ``geometric``."""
    mask_kl: NonNegative = 0.1
    """Bound of ``off_policy``, in nats per token. DeepSeek-V3.2 publishes no value."""
    mask_truncated: bool = False
    """Leave samples that reached the token limit, and episodes that reached a limit of turns or tokens, out
    of the loss and of its divisors (DAPO's overlong filtering). Their rewards still count in the advantages
    of their group."""
    moe_routing_replay: Literal["none", "policy", "rollout"] = "none"
    """Replay of recorded experts (MoE). With ``policy``, the training passes of several minibatches route
    every token to the experts that the old-logprob pass chose. With ``rollout``, old-logprob and training
    passes route every token to the experts that the rollout engine chose."""
    kl_coef: NonNegative = 0.0
    """Weight of the k3 estimate of the KL divergence from the reference policy."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""

    @property
    def mask_band(self) -> tuple[float, float]:
        """Return (low, high) of ``icepop`` and ``geometric``, and (0, inf) for the other masks."""
        low, high = {"icepop": (0.5, 5.0), "geometric": (0.99, 1.01)}.get(self.mask, (0.0, math.inf))
        return (
            low if self.mask_low is None else self.mask_low,
            high if self.mask_high is None else self.mask_high,
        )

    @model_validator(mode="after")
    def _bounds_in_order(self) -> AlgorithmConfig:
        low, high = self.mask_band
        if low > high:
            raise ValueError(f"mask_low = {low:g} is above mask_high = {high:g}: choose a smaller one")
        if self.clip_bounds and self.clip_bounds[0] > self.clip_bounds[1]:
            raise ValueError(f"clip_bounds = {list(self.clip_bounds)}: put the smaller value first")
        return self

    @model_validator(mode="after")
    def _policy_and_rollout_are_compared_once(self) -> AlgorithmConfig:
        for field, value in (("correction", self.correction), ("mask", self.mask)):
            # the mask off_policy is part of the loss and reads no old log probabilities
            if self.old_logprobs == "rollout" and value not in ("none", "off_policy"):
                raise ValueError(
                    f"{field} = {value!r} needs old_logprobs = 'policy', which it compares with the rollout "
                    f"engine's log probabilities: set it, or {field} = 'none'"
                )
        return self


class OptimizerConfig(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of the decay."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay from ``lr`` to ``min_lr`` over ``train.num_steps`` times ``train.minibatches_per_step`` optimizer
    steps, after the warmup."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Number of optimizer steps of the linear warmup from 0 to ``lr``."""
    weight_decay: NonNegative = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    clip_grad: NonNegative = 1.0
    """Maximum gradient norm; larger gradients are scaled down to it. 0 disables clipping."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer state over data-parallel ranks (ZeRO-1)."""
    moments_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of both Adam moments. ``bf16`` needs Transformer Engine's Adam and ``model.dtype = "bf16"``."""
    offload_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Fraction of the main weights and moments that is stored in host memory and updated on the CPU."""
    overlap_grad_reduce: bool = False
    """Overlap the gradient reduction over data-parallel ranks with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the gathering of updated weights with the next forward pass."""

    @model_validator(mode="after")
    def _needs_the_distributed_optimizer(self) -> OptimizerConfig:
        for name in ("moments_dtype", "offload_fraction", "overlap_param_gather"):
            value = getattr(self, name)
            if value != OptimizerConfig.model_fields[name].default and not self.use_distributed_optimizer:
                raise ValueError(
                    f"{name} = {value!r} needs use_distributed_optimizer = true: set it, or remove {name}"
                )
        if self.moments_dtype != "fp32" and self.offload_fraction:
            raise ValueError(
                f"moments_dtype = {self.moments_dtype!r} with offload_fraction: offloaded moments are fp32; "
                "remove one of them"
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ValueError("overlap_param_gather = true needs overlap_grad_reduce = true: set it too")
        return self

    @model_validator(mode="after")
    def _min_lr_below_lr(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr:g} is above lr = {self.lr:g}: choose a smaller one")
        return self


class TrainConfig(Section):
    num_steps: Positive = 100
    """Number of rollout steps; each makes ``minibatches_per_step`` optimizer steps."""
    minibatches_per_step: Positive = 1
    """Number of optimizer steps on the rollouts of one step."""
    max_tokens_per_microbatch: Positive = 8192
    """Maximum tokens in one packed microbatch, counted over all context-parallel ranks; a longer sequence
    forms a microbatch by itself."""
    logprob_chunk_tokens: Positive = 2048
    """Tokens of a tile of logits. Logits exist for one tile at a time, which has 8,192 columns of the
    vocabulary on a GPU and 512 on a CPU."""
    freeze_router: bool = False
    """Do not train the router weights of a MoE."""


class EvalSetConfig(DataConfig):
    report_by: tuple[Text, ...] | None = None
    """Columns for whose values results are reported too, e.g. ["level", "subject"]. None means ``level``,
    ``subject`` and ``type``, as far as the data has them."""


class EvalConfig(Section):
    sets: dict[FileName, EvalSetConfig] = {}
    """Benchmarks by name: a table for each, e.g. [eval.sets.math500]. A table without ``path`` and ``files``
    takes what it leaves out from the benchmark of its name: aime24, amc, amc23, gsm8k, math500, minerva or
    olympiadbench."""
    folder: PathText = ""
    """Folder with these benchmarks as NAME.parquet, with the columns of the hub, to read instead of the
    hub."""
    interval: Annotated[int, Field(ge=0)] = 0
    """Number of steps between evaluations. 0 evaluates only before the first step and after the last."""
    before: bool = True
    """Evaluate before the first step."""
    samples_per_prompt: Positive = 1
    k: tuple[Positive, ...] = (1,)
    """Values of k for the unbiased estimate of pass@k; none may exceed ``samples_per_prompt``."""
    temperature: NonNegative = 0.0
    """Sampling temperature; 0 means greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive | None = None
    """Maximum tokens in a response; None means ``rollout.max_new_tokens``."""
    pass_reward: float = 1.0
    """Minimum reward of a response that passes."""

    @model_validator(mode="before")
    @classmethod
    def _named_benchmarks(cls, values: Any) -> Any:
        """Fill in the benchmarks that are given by name only."""
        if not isinstance(values, dict) or not isinstance(sets := values.get("sets"), dict):
            return values
        folder = str(values.get("folder") or "")
        named = {
            name: benchmark(name, folder) | given
            for name, given in sets.items()
            if name in BENCHMARKS and isinstance(given, dict) and not given.keys() & {"path", "files"}
        }
        return values | {"sets": sets | named}

    @model_validator(mode="after")
    def _k_within_samples(self) -> EvalConfig:
        if max(self.k, default=1) > self.samples_per_prompt:
            raise ValueError(
                f"k = {max(self.k)} needs samples_per_prompt >= {max(self.k)}, not {self.samples_per_prompt}"
            )
        if self.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError("samples_per_prompt > 1 needs temperature > 0: greedy samples are all equal")
        return self
