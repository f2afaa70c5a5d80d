"""Sections of checkpoints, collapse detection, supervision and logging."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .section import NonNegative, Positive, Seconds, Section


class CheckpointConfig(Section):
    save_interval: Annotated[int, Field(ge=0)] = 0
    """Number of steps between two checkpoints; 0 saves only at the end."""
    keep_last: Positive = 2
    """Number of checkpoints to keep; older ones are removed."""
    resume: bool = True
    """Resume from the newest checkpoint in the run folder; false refuses a folder that has a checkpoint."""
    verify: bool = True
    """Read all files of a checkpoint before it is loaded and compare their checksums. The ranks share the
    files."""
    fall_back: bool = False
    """If the newest checkpoint is damaged, resume from the newest whole one instead of ending the run."""
    save_final: bool = True
    """Write a checkpoint after the last step."""
    async_save: bool = False
    """Write checkpoints while training goes on. A step waits only until its state is copied to host memory,
    which must have room for what the node's ranks write."""


class CollapseConfig(Section):
    """Detection of a policy collapse, and the reaction to it.

    A collapse is detected after ``patience`` consecutive steps beyond a limit.
    """

    action: Literal["warn", "stop", "rollback"] = "warn"
    """Reaction to a collapse. ``warn`` prints a line, ``stop`` ends the run with exit code 3, and
    ``rollback`` restores the newest checkpoint from before the collapse, lowers the learning rate and
    continues with new prompts. All write an event."""
    window: Annotated[int, Field(ge=2)] = 10
    """Number of steps from which reference levels are computed. Detection starts after them."""
    patience: Positive = 3
    """Number of consecutive steps beyond a limit that make a collapse."""
    entropy_share: NonNegative = 0.05
    """Minimum entropy, as a fraction of its median over the first ``window`` steps. 0 disables this limit."""
    entropy_floor: NonNegative = 0.0
    """Minimum entropy in nats per token."""
    grad_norm_factor: Annotated[float, Field(gt=1, allow_inf_nan=True)] = 10.0
    """Maximum gradient norm, as a multiple of its median over the last ``window`` steps; inf disables it."""
    reward_drop: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 0.5
    """Maximum drop of the mean reward over ``window`` steps, as a fraction of its best value so far. The
    limit has a noise margin of four standard errors. inf disables this limit."""
    rollback_lr_scale: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Factor by which each rollback multiplies the learning rate."""
    max_rollbacks: Positive = 2
    """Maximum number of rollbacks in a run; the next collapse ends the run."""


class SupervisionConfig(Section):
    heartbeat_interval_s: Seconds = 10.0
    """Seconds between two heartbeats, which each rank writes to heartbeats/ in ``run_dir``."""
    hang_timeout_s: Seconds = 1800.0
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
    """Minimum free disk space in ``run_dir`` at the start, in GB. None means the size of the checkpoints that
    the run will add: it holds ``checkpoint.keep_last`` + 1 while it saves."""

    @model_validator(mode="after")
    def _several_heartbeats_before_a_hang(self) -> SupervisionConfig:
        if self.hang_timeout_s < 4 * self.heartbeat_interval_s:
            raise ValueError(
                f"hang_timeout_s = {self.hang_timeout_s:g} is less than four heartbeat_interval_s: "
                "choose a larger one"
            )
        return self


class LogConfig(Section):
    tensorboard: bool = True
    """Write TensorBoard files to tensorboard/ in ``run_dir``."""
    wandb_project: str = ""
    """Weights & Biases project to log to (needs the ``wandb`` extra); empty disables it."""
    transcripts_per_step: Annotated[int, Field(ge=0)] = 4
    """Number of prompt groups per step whose responses are written to transcripts.jsonl."""
    tokens_per_step: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of samples per step whose tokens are recorded in tokens/ for ``megatron-gmpo view``; 0 turns it
    off. Half of them have the largest log ratios of the step, the others are drawn at random."""
    progress: bool = True
    """Show a progress line for each step."""
