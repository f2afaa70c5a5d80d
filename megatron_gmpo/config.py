"""The schema of a run: one frozen tree of sections. ``command_line.load_config`` reads it from TOML and options."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", coerce_numbers_to_str=True, use_attribute_docstrings=True
    )


class ModelConfig(_Section):
    """The policy and the reference policy."""

    path: str = ""
    """Hugging Face folder of the policy, with config.json, safetensors and tokenizer."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Dtype of weights and activations. The optimizer keeps fp32 main weights."""
    reference_path: str = ""
    """Hugging Face folder of the reference policy; empty means ``path``. It is loaded only if
    ``algorithm.kl_coef`` > 0 or the loss needs ``ref_logprobs``."""
    reference_offload: bool = False
    """Keep the reference policy's weights in host memory, and move them to the device only while it computes
    log probabilities."""


class Fp8Config(_Section):
    """FP8 matrix products of Transformer Engine (docs/fp8.md). A machine without support refuses the run."""

    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = None
    """How tensors are scaled: one scale per tensor, from earlier steps (``delayed``) or from its current
    values (``tensorwise``), or one scale per block of 128 (``blockwise``) or 32 (``mxfp8``) values. None
    disables FP8."""
    format: Literal["hybrid", "e4m3"] | None = None
    """``hybrid`` uses E5M2 for gradients. None chooses Transformer Engine's default: ``e4m3`` for
    ``blockwise`` and ``mxfp8``, otherwise ``hybrid``."""
    num_layers_at_start_in_bf16: Annotated[int, Field(ge=0)] = 0
    """Number of layers at the start that stay in bf16; 0 with ``delayed``."""
    num_layers_at_end_in_bf16: Annotated[int, Field(ge=0)] = 0
    """Number of layers at the end that stay in bf16; 0 with ``delayed``."""
    param: bool = False
    """Hold the layers' weights in FP8 and gather updated weights in FP8. The optimizer keeps fp32 main
    weights."""
    moe_router_padding_for_quantization: bool = True
    """Pad each expert's tokens by routing further tokens to it with weight 0, instead of by a copy (MoE)."""

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
        """Number of layers that stay in bf16."""
        return self.num_layers_at_start_in_bf16 + self.num_layers_at_end_in_bf16


class ParallelConfig(_Section):
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
        """Number of ranks that hold one replica of the dense layers."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    @property
    def sequence_multiple(self) -> int:
        """Return the multiple to which a sequence is padded: each context-parallel rank holds two chunks of it."""
        return 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1

    @property
    def microbatch_multiple(self) -> int:
        """Return the multiple that the number of microbatches on a rank must be; the interleaved schedule needs one."""
        return self.pipeline_model_parallel_size if self.virtual_pipeline_model_parallel_size else 1

    @model_validator(mode="after")
    def _virtual_needs_pipeline(self) -> ParallelConfig:
        if self.virtual_pipeline_model_parallel_size and self.pipeline_model_parallel_size == 1:
            raise ValueError("virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1")
        return self


class DataConfig(_Section):
    path: str = ""
    """A .jsonl, .json, .csv or .parquet file, a ``save_to_disk`` folder, or a Hugging Face hub name (``openai/gsm8k:main``
    where it has subsets)."""
    split: str = "train"
    prompt_column: str = "problem"
    """Column with the prompt: text, or a list of chat messages."""
    answer_column: str = "answer"
    template: str = ""
    """Format string around a text prompt, e.g. "{prompt}\\nAnswer in \\\\boxed{{}}."; applied before the chat template."""
    system_prompt: str = ""
    """System message put before the prompt; needs a chat template."""
    use_chat_template: bool | None = None
    """None means: when the tokenizer has one."""
    max_prompt_tokens: Positive = 1024
    """Longer prompts are left out; the number is printed."""
    max_prompts: Positive | None = None
    """Use only the first so many problems (after the length filter, before the shuffle)."""
    shuffle: bool = True


class RolloutConfig(_Section):
    engine: Literal["embedded", "sglang"] = "embedded"
    """``embedded`` runs transformers in the trainer's processes; ``sglang`` sends requests to SGLang servers."""
    num_servers: Positive = 1
    """Number of SGLang servers to start, each with its own copy of the weights. They run on the machine of rank 0, or are
    divided among the rollout nodes of a Slurm job."""
    server_urls: tuple[str, ...] = ()
    """URLs of running SGLang servers to use instead, e.g. ["http://10.0.0.7:30000"]. Their keys are read from the
    environment variables SGLANG_API_KEY and SGLANG_ADMIN_API_KEY."""
    servers_file: str = ""
    """File with the addresses of running SGLang servers: servers.json of the job that starts them. The trainer waits for it
    up to sglang.start_timeout_s. The keys are in server_keys.json in the same folder."""
    placement: Literal["disaggregated", "colocated"] = "disaggregated"
    """``disaggregated`` servers have their own devices; ``colocated`` servers share the trainer's devices and release their
    memory while it trains."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Maximum number of steps that are generated ahead while training runs; 0 alternates generation and training."""
    routed_experts: bool = False
    """Record the experts of every token (MoE), to replay them in training or to compare them with the policy's."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Dtype of the embedded engine; None means ``model.dtype``. A different dtype causes the mismatch that an engine with
    other kernels has: log probabilities and experts differ from the policy's."""
    quantization: Literal["none", "fp8"] = "none"
    """``fp8`` rounds the linear weights of attention and MLPs to 8 bits, with a scale for each block of 128 x 128, in each
    weight sync. Servers started by the run compute in FP8; the embedded engine computes with the rounded values."""
    router_noise: NonNegative = 0.0
    """Standard deviation of Gaussian noise on the router logits (MoE) while the embedded engine samples training responses;
    also causes a mismatch of experts."""
    prompts_per_step: Positive = 32
    samples_per_prompt: Positive = 8
    max_new_tokens: Positive = 1024
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """Number of most likely tokens to sample from; 0 means all."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, besides the end-of-sequence token."""
    batch_size: Positive = 64
    """Number of responses that the embedded engine decodes together on a rank."""
    dynamic_sampling: Literal["off", "drop", "resample"] = "off"
    """Treatment of groups without reward variance (DAPO): ``off`` keeps them, ``drop`` drops them, ``resample`` replaces them by
    new prompts."""
    max_resample_rounds: Positive = 4
    """Maximum number of draws after the first one for ``resample``; then the step continues with the groups it has."""
    overlong_buffer: Annotated[int, Field(ge=0)] = 0
    """DAPO's soft overlong penalty: number of tokens before max_new_tokens over which the reward falls by overlong_penalty."""
    overlong_penalty: NonNegative = 1.0
    """Penalty of a response of max_new_tokens tokens; used if overlong_buffer is set."""
    save_path: str = ""
    """Folder to which the groups of every step are written."""
    replay_path: str = ""
    """Folder that an earlier run wrote with ``save_path``; train on its groups instead of generating."""

    @model_validator(mode="after")
    def _fields_fit_the_engine(self) -> RolloutConfig:
        if self.engine == "embedded":
            for field in ("server_urls", "servers_file", "max_staleness"):
                if value := getattr(self, field):
                    raise ValueError(f"{field} = {value!r} needs engine = 'sglang'")
            if self.placement == "colocated":
                raise ValueError("placement = 'colocated' needs engine = 'sglang'")
        elif self.dtype:
            raise ValueError(
                f"dtype = {self.dtype!r} needs engine = 'embedded': the servers' is sglang.args.dtype"
            )
        elif self.router_noise:
            raise ValueError(f"router_noise = {self.router_noise:g} needs engine = 'embedded': set it to 0")
        if self.server_urls and self.servers_file:
            raise ValueError(
                f"servers_file = {self.servers_file!r} and server_urls both name servers: leave one out"
            )
        if self.server_urls and self.quantization == "fp8":
            raise ValueError("quantization = 'fp8' needs servers started for it: leave server_urls out")
        if len(set(self.server_urls)) < len(self.server_urls):
            raise ValueError(f"server_urls = {list(self.server_urls)} names a server twice")
        if self.placement == "colocated" and self.max_staleness:
            raise ValueError(
                f"max_staleness = {self.max_staleness} needs placement = 'disaggregated': colocated servers do not "
                "generate while it trains"
            )
        return self


class SGLangConfig(_Section):
    python: str = ".venv-sglang/bin/python"
    """Python interpreter of the servers' own environment (``make sglang``)."""
    host: str = "127.0.0.1"
    """Address that the servers bind. Other machines can reach every address except the loopback address."""
    tensor_parallel_size: Positive = 1
    """Number of devices of one server."""
    args: dict[str, Any] = {}
    """Further options of sglang.launch_server under their own names, e.g. ``mem_fraction_static = 0.8``."""
    max_concurrent_requests: Positive = 256
    """Maximum number of in-flight requests per server; further requests wait in the client."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 1200.0
    """Timeout for one response. This timeout and ``hang_timeout_s`` together must be below ``supervision.hang_timeout_s``;
    otherwise a hung server ends the run before it is detected."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Timeout for the start of a server, until its first answer."""
    health_interval_s: Annotated[float, Field(gt=0)] = 10.0
    """Interval between health checks of a server."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """A server that does not answer for this time is killed and restarted."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Maximum consecutive restarts per server; a successful weight sync resets the count. The run ends when every server has
    exceeded it."""


class WeightSyncConfig(_Section):
    route: Literal["disk", "distributed", "tensor"] = "disk"
    """Transport of the weights to the servers: a folder that both see (``disk``), a broadcast over NCCL or
    gloo (``distributed``), or memory that both map (``tensor``)."""
    bucket_bytes: Positive = 512 * 2**20
    """Memory for the tensors in transit, in bytes. Two buckets share it: one is packed while the other is
    sent."""
    in_flight: Literal["retract", "in_place", "abort"] = "retract"
    """How unfinished requests continue after a sync: the server recomputes their KV cache with the new
    weights (``retract``), keeps the old cache (``in_place``), or aborts them and the client sends them again
    as longer prompts (``abort``)."""
    verify: bool = False
    """Compare checksums of the servers' weights after each sync. Before it, all weights are overwritten with
    noise."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Timeout of one request of a sync."""
    folder: str = ""
    """Folder that the ``disk`` route writes to, each run below its own path; empty means weight_sync in
    run_dir. The servers must see it under the same path."""


class RewardConfig(_Section):
    name: str = "math"
    """``math``, ``arithmetic``, ``countdown``, or ``module:function``, a callable (Prompt, response_text) -> float."""
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Limit for one answer; a timeout scores 0 and is counted."""
    workers: Positive = 2
    """Processes that check answers on each rank."""


class AlgorithmConfig(_Section):
    loss: str = "gmpo"
    """Policy loss: ``gmpo``, ``rspo``, ``grpo``, ``dr_grpo``, ``dapo``, ``gspo``, ``cispo``, or
    ``module:function``, your own loss on the Python path (docs/losses.md)."""
    clip_low: NonNegative | None = None
    """Lower half-width of the clip interval. None means the loss's default, for gmpo 0.4 (dense) or 0.2
    (MoE); the run prints it."""
    clip_high: NonNegative | None = None
    """Upper half-width of the clip interval. None means the loss's default."""
    clip: Literal["fixed", "adaptive"] = "fixed"
    """``adaptive`` starts from ``clip_low`` and ``clip_high`` and adjusts each after every step to keep
    ``clip_signal`` at ``clip_target``."""
    clip_signal: Literal["fraction", "tail"] = "fraction"
    """Signal of the adaptive clip. ``fraction``: share of tokens (or of sequences, in a loss that clips
    sequences) that each side clips. ``tail``: size of the 0.1 % and 99.9 % quantiles of the tokens' log
    ratio."""
    clip_target: Annotated[float, Field(gt=0)] | None = None
    """Target of ``clip_signal``. None means 0.01 for ``fraction``; ``tail`` requires a value, e.g. 0.2."""
    clip_bounds: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    """Smallest and largest adaptive clip. None means an eighth of the initial clip and eight times the
    initial clip."""
    clip_gain: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Gain of the adaptive clip: a step changes the logarithm of a clip by the gain times the relative
    distance of the signal from its target, and at most by the gain."""
    options: dict[str, Any] = {}
    """Further keyword arguments of the loss, e.g. ``dual_clip = 3.0`` for gmpo."""
    advantage: str = "normalized"
    """How rewards of a group become advantages: ``normalized``, ``mean``, ``leave_one_out``, or
    ``module:function``, a callable that maps the rewards of a group, a tensor (n,), to its advantages
    (docs/losses.md)."""
    correction: Literal["none", "token", "sequence", "geometric"] = "none"
    """Importance weights that correct the difference between the policy's and the rollout engine's
    probabilities: per ``token``, per ``sequence`` (the product over its tokens), or ``geometric`` (the
    geometric mean over its tokens, which fits gmpo, rspo and gspo)."""
    correction_cap: Annotated[float, Field(gt=0)] = 2.0
    """Upper bound of the importance weights; larger weights are truncated."""
    mask: Literal["none", "icepop", "geometric", "off_policy"] = "none"
    """What the policy term leaves out. ``icepop``: tokens whose ratio of policy to rollout probability is
    outside [mask_low, mask_high]. ``geometric``: sequences whose geometric mean of that ratio is outside.
    ``off_policy``: sequences with a negative advantage whose tokens' mean ``log(pi_rollout / pi)`` exceeds
    ``mask_kl``."""
    mask_low: NonNegative | None = None
    """Lower bound of the ratio. None means 0.5 for ``icepop`` and 0.99 for ``geometric``."""
    mask_high: Annotated[float, Field(gt=0)] | None = None
    """Upper bound of the ratio. None means 5 for ``icepop`` and 1.01 for ``geometric``."""
    mask_kl: NonNegative = 0.1
    """Bound of ``off_policy``, in nats per token. DeepSeek-V3.2 publishes no value."""
    moe_routing_replay: Literal["none", "policy", "rollout"] = "none"
    """``policy``: training passes route every token to the experts that the old-logprob pass chose.
    ``rollout``: old-logprob and training passes route every token to the experts that the rollout engine
    chose."""
    kl_coef: NonNegative = 0.0
    """Weight of the k3 estimate of the KL divergence from the reference policy."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""

    @property
    def mask_band(self) -> tuple[float, float]:
        """(low, high) of ``icepop`` and ``geometric``; (0, inf) for the other masks."""
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


class OptimizerConfig(_Section):
    lr: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of the decay."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay from ``lr`` to ``min_lr`` over the run's optimizer steps, after the warmup."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of the linear warmup from 0 to ``lr``."""
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


class TrainConfig(_Section):
    num_steps: Positive = 100
    """Number of rollout steps; each makes ``minibatches_per_step`` optimizer steps."""
    minibatches_per_step: Positive = 1
    """Number of optimizer steps on the rollouts of one step."""
    max_tokens_per_microbatch: Positive = 8192
    """Maximum tokens in one packed microbatch, counted over all context-parallel ranks; a longer sequence
    forms a microbatch by itself."""
    logprob_chunk_tokens: Positive = 128
    """Number of tokens whose logits are converted to log probabilities at a time."""
    freeze_router: bool = False
    """Do not train the router weights of a MoE."""


class EvalConfig(_Section):
    sets: dict[str, DataConfig] = {}
    """Benchmarks by name, e.g. [eval.sets.math500]."""
    interval: Annotated[int, Field(ge=0)] = 0
    """Evaluate every so many steps; 0 means only before and after."""
    before: bool = True
    """Evaluate before the first step."""
    samples_per_prompt: Positive = 1
    k: tuple[Positive, ...] = (1,)
    """Values of k for unbiased pass@k; none above samples_per_prompt."""
    temperature: NonNegative = 0.0
    """0 means greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive | None = None
    """None means ``rollout.max_new_tokens``."""
    pass_reward: float = 1.0
    """A response passes when its reward is at least this."""

    @model_validator(mode="after")
    def _k_within_samples(self) -> EvalConfig:
        if max(self.k, default=1) > self.samples_per_prompt:
            raise ValueError(
                f"k = {max(self.k)} needs samples_per_prompt >= {max(self.k)}, not {self.samples_per_prompt}"
            )
        if self.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError("samples_per_prompt > 1 needs temperature > 0: greedy samples are all equal")
        return self


class CheckpointConfig(_Section):
    save_interval: Annotated[int, Field(ge=0)] = 0
    """Steps between two checkpoints; 0 saves only at the end."""
    keep_last: Positive = 2
    """Number of checkpoints to keep; older ones are removed."""
    resume: bool = True
    """Resume from the newest checkpoint in the run folder; false refuses a folder that has one."""
    save_final: bool = True
    """Write a checkpoint after the last step."""


class CollapseConfig(_Section):
    """Detection of a policy collapse, and the reaction to it. A limit counts after ``patience`` consecutive
    steps beyond it."""

    action: Literal["warn", "stop", "rollback"] = "warn"
    """Reaction to a collapse. ``warn`` prints a line, ``stop`` ends the run with exit code 3, and
    ``rollback`` restores the newest checkpoint from before the collapse, lowers the learning rate and
    continues with new prompts. All write an event."""
    window: Annotated[int, Field(ge=2)] = 10
    """Number of steps that reference levels are computed from; detection starts after as many steps."""
    patience: Positive = 3
    """Number of consecutive steps beyond a limit that make a collapse."""
    entropy_share: NonNegative = 0.05
    """Minimum entropy, as a fraction of the median entropy of the first ``window`` steps. 0 disables this
    limit."""
    entropy_floor: NonNegative = 0.0
    """Minimum entropy in nats per token."""
    grad_norm_factor: Annotated[float, Field(gt=1)] = 10.0
    """Maximum gradient norm, as a multiple of the median of the last ``window`` steps. inf disables this
    limit."""
    reward_drop: Annotated[float, Field(gt=0)] = 0.5
    """Largest share of the best mean reward over ``window`` steps that the current such mean may lose, with a
    margin of four standard errors for noise; a larger loss is a collapse. inf disables the check."""
    rollback_lr_scale: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Factor by which each rollback multiplies the learning rate."""
    max_rollbacks: Positive = 2
    """Maximum rollbacks in a run; the next collapse ends it."""


class SupervisionConfig(_Section):
    heartbeat_interval_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds between two heartbeats, which each rank writes to heartbeats/ in ``run_dir``."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """Maximum seconds in one phase of a step. A rank that exceeds it dumps its stacks and ends the run with
    exit code 86. Set it above the duration of the longest phase, and not above ``distributed_timeout_s``,
    after which waiting ranks fail."""
    stop_margin_s: NonNegative = 60.0
    """Seconds of the job's time limit that must be left to start a step, in addition to the longest recent
    step and save."""
    node_check: bool | None = None
    """Check every node before training. None checks if there is more than one node."""
    min_free_memory_gb: NonNegative = 1.0
    """Minimum available memory per node for the node check, in GB."""
    min_free_disk_gb: NonNegative | None = None
    """Minimum free disk space in ``run_dir`` for the node check, in GB; None requires space for one
    checkpoint."""

    @model_validator(mode="after")
    def _several_heartbeats_before_a_hang(self) -> SupervisionConfig:
        if self.hang_timeout_s < 4 * self.heartbeat_interval_s:
            raise ValueError(
                f"hang_timeout_s = {self.hang_timeout_s:g} is less than four heartbeat_interval_s: "
                "choose a larger one"
            )
        return self


class LogConfig(_Section):
    tensorboard: bool = True
    """Write TensorBoard files to tensorboard/ in ``run_dir``."""
    wandb_project: str = ""
    """Weights & Biases project to log to (needs the ``wandb`` extra); empty disables it."""
    transcripts_per_step: Annotated[int, Field(ge=0)] = 4
    """Number of prompt groups per step whose responses are written to transcripts.jsonl."""
    progress: bool = True
    """Show a progress line for each step."""


class Config(_Section):
    run_dir: str = "runs/gmpo"
    """Everything the run writes goes here."""
    seed: int = 1234
    device: Literal["auto", "cpu", "cuda"] = "auto"
    distributed_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """Limit for one collective."""
    model: ModelConfig = ModelConfig()
    fp8: Fp8Config = Fp8Config()
    parallel: ParallelConfig = ParallelConfig()
    megatron: dict[str, Any] = {}
    """Further fields of Megatron's TransformerConfig, by their own names."""
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    sglang: SGLangConfig = SGLangConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    collapse: CollapseConfig = CollapseConfig()
    log: LogConfig = LogConfig()
    supervision: SupervisionConfig = SupervisionConfig()

    @model_validator(mode="after")
    def _low_precision_starts_from_bf16(self) -> Config:
        low = {
            "fp8.recipe": self.fp8.recipe,
            "optimizer.offload_fraction": self.optimizer.offload_fraction or None,
        }
        low["optimizer.moments_dtype"] = (
            None if self.optimizer.moments_dtype == "fp32" else self.optimizer.moments_dtype
        )
        for field, value in low.items():
            if value is not None and self.model.dtype != "bf16":
                raise ValueError(
                    f"{field} = {value!r} needs model.dtype = 'bf16', not {self.model.dtype!r}: set it"
                )
        return self

    @model_validator(mode="after")
    def _weights_in_fp8_have_their_own_ways(self) -> Config:
        if self.fp8.param:
            if not self.optimizer.use_distributed_optimizer:
                raise ValueError("fp8.param = true needs optimizer.use_distributed_optimizer = true: set it")
            for field, on in (
                ("model.reference_offload", self.model.reference_offload),
                ("optimizer.moments_dtype", self.optimizer.moments_dtype != "fp32"),
                ("optimizer.offload_fraction", self.optimizer.offload_fraction > 0),
                ("optimizer.overlap_param_gather", self.optimizer.overlap_param_gather),
            ):
                if on:
                    raise ValueError(
                        f"fp8.param = true with {field}: they do not work together; remove one of them"
                    )
        return self

    @model_validator(mode="after")
    def _adaptive_clip_has_something_to_clip(self) -> Config:
        if self.algorithm.clip == "adaptive" and self.train.minibatches_per_step == 1:
            raise ValueError(
                "algorithm.clip = 'adaptive' needs train.minibatches_per_step > 1: with one update a step no ratio leaves 1"
            )
        return self

    @model_validator(mode="after")
    def _rollback_finds_a_checkpoint(self) -> Config:
        if self.collapse.action == "rollback":
            interval, seen = self.checkpoint.save_interval, self.collapse.window + self.collapse.patience
            if not interval:
                raise ValueError(
                    "collapse.action = 'rollback' needs checkpoint.save_interval > 0: set it, or choose 'stop'"
                )
            if self.checkpoint.keep_last < (needed := 1 + math.ceil(seen / interval)):
                raise ValueError(
                    f"collapse.action = 'rollback' needs checkpoint.keep_last >= {needed}, to have one from {seen} steps ago: raise it or "
                    "checkpoint.save_interval"
                )
        return self

    @model_validator(mode="after")
    def _servers_start_before_a_hang(self) -> Config:
        start = self.sglang.start_timeout_s
        for field, limit in (
            ("supervision.hang_timeout_s", self.supervision.hang_timeout_s),
            ("distributed_timeout_s", self.distributed_timeout_s),
        ):
            if self.rollout.engine == "sglang" and limit <= start:
                raise ValueError(
                    f"{field} = {limit:g} is not above sglang.start_timeout_s = {start:g}: ranks wait that long for servers"
                )
        return self

    @property
    def needs_rollout_routing(self) -> bool:
        """Samples must carry ``routed_experts``."""
        return self.rollout.routed_experts or self.algorithm.moe_routing_replay == "rollout"

    @model_validator(mode="after")
    def _replayed_routing_is_recorded(self) -> Config:
        if self.needs_rollout_routing and not (self.rollout.routed_experts or self.rollout.replay_path):
            raise ValueError(
                "algorithm.moe_routing_replay = 'rollout' needs rollout.routed_experts = true: set it, or choose 'policy'"
            )
        return self
