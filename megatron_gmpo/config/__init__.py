"""The schema of a run: one frozen tree of sections.

``command_line.load_config`` reads it from a TOML file and options.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .model import Fp8Config, ModelConfig, ParallelConfig
from .rollout import DataConfig, RewardConfig, RolloutConfig, SGLangConfig, WeightSyncConfig
from .run import CheckpointConfig, CollapseConfig, LogConfig, SupervisionConfig
from .section import NonNegative, Positive, RequiredPath, Seconds, Section
from .training import AlgorithmConfig, EvalConfig, EvalSetConfig, OptimizerConfig, TrainConfig

__all__ = [
    "AlgorithmConfig",
    "CheckpointConfig",
    "CollapseConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "EvalSetConfig",
    "Fp8Config",
    "LogConfig",
    "ModelConfig",
    "NonNegative",
    "OptimizerConfig",
    "ParallelConfig",
    "Positive",
    "RewardConfig",
    "RolloutConfig",
    "SGLangConfig",
    "SupervisionConfig",
    "TrainConfig",
    "WeightSyncConfig",
]


class Config(Section):
    run_dir: RequiredPath = "runs/gmpo"
    """Run folder, which receives the metrics, records and checkpoints of the run."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    device: Literal["auto", "cpu", "cuda"] = "auto"
    distributed_timeout_s: Seconds = 1800.0
    """Timeout of one collective."""
    model: ModelConfig = ModelConfig()
    fp8: Fp8Config = Fp8Config()
    parallel: ParallelConfig = ParallelConfig()
    megatron: dict[str, Any] = {}
    """Additional fields of Megatron's TransformerConfig, by their names in Megatron."""
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
        optimizer = self.optimizer
        for field, value, low in (
            ("fp8.recipe", self.fp8.recipe, self.fp8.recipe is not None),
            ("optimizer.offload_fraction", optimizer.offload_fraction, optimizer.offload_fraction > 0),
            ("optimizer.moments_dtype", optimizer.moments_dtype, optimizer.moments_dtype != "fp32"),
        ):
            if low and self.model.dtype != "bf16":
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
    def _delayed_scales_have_no_reference(self) -> Config:
        # Transformer Engine updates the scales of all modules together. policy.fp8 checks losses of the user.
        if self.fp8.recipe == "delayed" and self.algorithm.kl_coef > 0:
            raise ValueError(
                "fp8.recipe = 'delayed' with algorithm.kl_coef > 0: training would change the reference "
                "policy's scales; choose 'tensorwise', or set kl_coef to 0"
            )
        return self

    @model_validator(mode="after")
    def _adaptive_clip_has_something_to_clip(self) -> Config:
        algorithm = self.algorithm
        on_policy = algorithm.old_logprobs == "policy" and self.train.minibatches_per_step == 1
        if algorithm.clip == "adaptive" and on_policy:
            raise ValueError(
                "algorithm.clip = 'adaptive' needs train.minibatches_per_step > 1: "
                "with one update a step no ratio leaves 1"
            )
        return self

    @model_validator(mode="after")
    def _the_pass_of_old_logprobs_records_the_routing(self) -> Config:
        algorithm, minibatches = self.algorithm, self.train.minibatches_per_step
        replays = algorithm.moe_routing_replay == "policy" and minibatches > 1
        if algorithm.old_logprobs == "rollout" and replays:
            raise ValueError(
                f"algorithm.moe_routing_replay = 'policy' with train.minibatches_per_step = {minibatches} "
                "replays what the pass of algorithm.old_logprobs = 'policy' records: set that, or replay "
                "'rollout'"
            )
        return self

    @model_validator(mode="after")
    def _rollback_finds_a_checkpoint(self) -> Config:
        if self.collapse.action == "rollback":
            interval, seen = self.checkpoint.save_interval, self.collapse.window + self.collapse.patience
            if not interval:
                raise ValueError(
                    "collapse.action = 'rollback' needs checkpoint.save_interval > 0: "
                    "set it, or choose 'stop'"
                )
            if self.checkpoint.keep_last < (needed := 1 + math.ceil(seen / interval)):
                raise ValueError(
                    f"collapse.action = 'rollback' needs checkpoint.keep_last >= {needed}, "
                    f"to have one from {seen} steps ago: raise it or checkpoint.save_interval"
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
                    f"{field} = {limit:g} is not above sglang.start_timeout_s = {start:g}: "
                    "ranks wait that long for servers"
                )
        return self

    @model_validator(mode="before")
    @classmethod
    def _an_environment_is_its_own_reward(cls, values: Any) -> Any:
        match values:
            case {"rollout": {"environment": str(name)}} if name:
                reward = values.get("reward", {})
                if isinstance(reward, dict) and "name" not in reward:
                    return values | {"reward": reward | {"name": "environment"}}
        return values

    @model_validator(mode="after")
    def _an_environment_gives_its_reward(self) -> Config:
        if self.reward.name == "environment" and not self.rollout.environment:
            raise ValueError(
                "reward.name = 'environment' needs rollout.environment: set it, or choose another reward"
            )
        return self

    @property
    def max_sequence_tokens(self) -> int:
        """Return the maximum sampled tokens of what the loss takes as a sequence, see ``algorithm.unit``."""
        rollout = self.rollout
        return rollout.max_new_tokens if self.algorithm.unit == "turn" else rollout.max_response_tokens

    @property
    def uses_fp32_head(self) -> bool:
        """Return whether policy and rollout engine keep the logits of a bf16 model in fp32."""
        if self.model.fp32_head is None:
            return self.model.dtype == "bf16" and not self.rollout.server_urls
        return self.model.fp32_head

    @property
    def servers_keep_weights(self) -> bool:
        """Return whether servers start with the weights of ``model.path`` and keep what a sync leaves out."""
        rollout = self.rollout
        started_by_us = rollout.engine == "sglang" and not (rollout.server_urls or rollout.servers_file)
        from_folder = rollout.quantization == "none" and "load_format" not in self.sglang.args
        # colocated servers lose them when they release their memory
        return started_by_us and from_folder and rollout.placement == "disaggregated"

    def rollout_ratio_warning(self, *, is_moe: bool) -> str:
        """Return one line about settings with which ratios to the rollout engine start away from 1, or ""."""
        rollout, in_flight = self.rollout, self.weight_sync.in_flight
        replay = self.algorithm.moe_routing_replay
        causes = {
            f"rollout.quantization = {rollout.quantization!r}": rollout.quantization != "none",
            f"rollout.dtype = {rollout.dtype!r}": rollout.dtype not in (None, self.model.dtype),
            f"rollout.router_noise = {rollout.router_noise:g}": rollout.router_noise > 0,
            f"weight_sync.in_flight = {in_flight!r}": rollout.max_staleness > 0 and in_flight == "in_place",
            f"algorithm.moe_routing_replay = {replay!r}": is_moe and replay != "rollout",
        }
        found = [cause for cause, applies in causes.items() if applies]
        if self.algorithm.old_logprobs != "rollout" or not found:
            return ""
        return (
            f"warning: algorithm.old_logprobs = 'rollout' with {', '.join(found)}: ratios start away from 1, "
            "and the clip may act before the first update; watch policy/clip_fraction_low and _high"
        )

    @property
    def needs_rollout_routing(self) -> bool:
        """Return whether samples must carry ``routed_experts``."""
        return self.rollout.routed_experts or self.algorithm.moe_routing_replay == "rollout"

    @model_validator(mode="after")
    def _replayed_routing_is_recorded(self) -> Config:
        if self.needs_rollout_routing and not (self.rollout.routed_experts or self.rollout.replay_path):
            raise ValueError(
                "algorithm.moe_routing_replay = 'rollout' needs rollout.routed_experts = true: "
                "set it, or choose 'policy'"
            )
        return self
