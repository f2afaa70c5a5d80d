"""The state of a run between steps. It is saved, restored and rolled back as a whole."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .batch.columns import TrainBatch
from .checkpoint import Save, go_back
from .distributed import agreed, rank
from .errors import CollapseError, NonFiniteError, RunError
from .losses.adaptive_clip import AdaptiveClip
from .losses.objective import Objective
from .metrics.collapse import Collapse, CollapseDetector
from .metrics.figures import Metric
from .metrics.logger import MetricLogger, cut_after
from .metrics.token_records import remove_after
from .rollout.collect import Collector
from .rollout.engine import RolloutEngine
from .run import Run
from .weights.run_checkpoint import checkpoint_before, checkpoint_path


class TrainingState:
    """The state of a new run, or the state in the run folder's newest checkpoint. Collective.

    Attributes:
        step: completed steps.
        policy: the policy with its optimizer.
        objective: the loss with the clip range of the current step.
        collector: collector of the rollouts; None if saved rollouts are replayed.
        saved_step: step of the checkpoint that the training continues, the last one that is complete.
    """

    def __init__(
        self, run: Run, objective: Objective, clip: AdaptiveClip | None, engine: RolloutEngine | None
    ) -> None:
        self._run, self._cfg = run, run.cfg
        self.step = self.saved_step = 0
        self.objective = objective
        self.policy = run.policy()
        self._save: Save | None = None
        self._clip = clip
        self._detector = CollapseDetector(run.cfg.collapse)
        if run.checkpoint:
            self._restore(run.checkpoint)
        self.collector = (
            Collector(engine, run.prompts, run.reward, run.cfg.rollout) if engine and run.prompts else None
        )
        self._scale_lr()
        self._cut_rollouts()

    def start_save(self, *, background: bool) -> None:
        """Write everything to ``run.checkpoint_dir``; ``finish_save`` completes the checkpoint. Collective.

        Args:
            background: copy the state to memory only, and let processes write it while training goes on.
        """
        assert self._save is None
        self._save = self.policy.start_save(
            self._run.checkpoint_dir,
            self.step,
            self._records(),
            self._cfg.checkpoint.keep_last,
            continues=self.saved_step,
            background=background,
        )
        if not background:
            self._save.seal()

    @property
    def saving(self) -> bool:
        """Return whether a save is not complete."""
        return self._save is not None

    def finish_save(self, logger: MetricLogger, *, wait: bool = True) -> float | None:
        """Complete the save in progress, if any. Collective.

        The metrics are flushed first: a run that resumes from the checkpoint does not log its step again.

        Args:
            wait: whether to wait until it is written; else it is only completed if it is.

        Returns:
            Seconds from its start, if it is complete now.
        """
        save = self._save
        if save is None or not save.ended(wait=wait):
            return None
        with agreed():
            logger.sync()
        self._save = None
        path = save.finish()
        self.saved_step = save.step
        logger.event("checkpoint", step=save.step, path=str(path))
        return time.monotonic() - save.began

    def stopped_by(
        self, error: NonFiniteError, minibatch: TrainBatch | None, logger: MetricLogger
    ) -> NonFiniteError:
        """Write the newest minibatch of each replica and complete the save in progress, if any. Collective.

        Args:
            minibatch: this replica's newest minibatch, if the step has one.

        Returns:
            The error with the step and the paths of what is written.
        """
        step, run_dir = self.step + 1, self._run.run_dir
        line = f"step {step}: {error}"
        if minibatch is not None and self.policy.leads_replica:
            suffix = f"_replica_{replica}" if (replica := self.policy.replica) else ""
            file = run_dir / f"nonfinite_step_{step:06d}{suffix}.safetensors"
            try:
                minibatch.save(file)
                line += f"; the last minibatch is in {file}"
            except (OSError, SafetensorError) as failure:
                line += f"; the last minibatch cannot be written ({failure})"
        try:
            self.finish_save(logger)
        except (OSError, RunError) as failure:
            line += f"; the save in progress failed ({failure})"
        if kept := self.saved_step:
            line += f"; the last checkpoint is {checkpoint_path(self._run.checkpoint_dir, kept)}"
        logger.event("nonfinite", step=step, reason=line)
        return NonFiniteError(line)

    def close(self) -> None:
        """Abandon the save in progress, if an error has ended the run. Not collective."""
        if self._save:
            self._save.abandon()

    def _records(self) -> dict[str, Any]:
        """Return the JSON-serializable state that a checkpoint holds in addition to the policy."""
        return {
            "prompts": self.collector.state_dict() if self.collector else None,
            "clip": self._clip.state_dict() if self._clip else None,
            "collapse": self._detector.state_dict(),
            "config": self._cfg.model_dump(mode="json"),
        }

    def adapt_clip(self, learned: Mapping[str, Metric]) -> None:
        """Update the objective's clip range from this step's metrics if ``algorithm.clip = "adaptive"``."""
        if self._clip:
            self._clip.update(learned)
            self.objective = self._clip.applied_to(self.objective)

    def find_collapse(self, figures: Mapping[str, float]) -> Collapse | None:
        """Return the collapse that this step's figures complete, or None. Collective."""
        return self._detector.update(self.step, figures)

    def react(self, collapse: Collapse, logger: MetricLogger) -> str:
        """Warn, roll back or stop, according to ``collapse.action``, and return a line that describes it.

        A rollback or a stop waits for the save in progress, which may be the newest from before the collapse.

        Raises:
            CollapseError: the action is ``stop``, no checkpoint precedes the collapse, or ``max_rollbacks``
                is reached.
        """
        action, found = (
            self._cfg.collapse.action,
            f"step {self.step}: the policy collapsed: {collapse.reason}",
        )
        logger.event("collapse", step=self.step, began=collapse.began, reason=collapse.reason, action=action)
        if action == "warn":
            return f"warning: {found}"
        self.finish_save(logger)
        # The figures of a step describe the weights after the step before it. Checkpoints after saved_step
        # are not of this run: it has fallen back to an older one.
        before = min(collapse.began - 1, self.saved_step + 1)
        good = checkpoint_before(self._run.checkpoint_dir, before, self._cfg.checkpoint.verify)
        found += (
            f"; the newest checkpoint from before the collapse is {good}"
            if good
            else "; there is no checkpoint from before the collapse"
        )
        if action == "stop" or good is None or self._detector.rollbacks >= self._cfg.collapse.max_rollbacks:
            raise CollapseError(f"{found}; rollbacks so far: {self._detector.rollbacks}")
        self._roll_back(good, logger)
        return f"{found}: rolled back to it"

    def _roll_back(self, checkpoint: Path, logger: MetricLogger) -> None:
        """Restore a checkpoint, lower the learning rate and draw new prompts, to avoid the same collapse.

        The checkpoint is updated to hold both changes.
        """
        rollbacks, came_from = self._detector.rollbacks + 1, self.step
        if self.collector:
            # first, because a server that restarts in the meantime is synced with this step's weights
            self.collector.drop_ahead()
        self._restore(checkpoint)
        self._detector.rollbacks = rollbacks
        self._scale_lr()
        go_back(checkpoint, self._records())
        logger.rewind(self.step)
        self._cut_rollouts()
        logger.event("rollback", step=self.step, from_step=came_from, rollbacks=rollbacks)

    def _restore(self, checkpoint: Path) -> None:
        """Load a checkpoint, except for the position in the prompts."""
        saved = self.policy.load(checkpoint)
        self.step = self.saved_step = saved.step
        if self._clip and saved.clip:
            self._clip.load_state_dict(saved.clip)
            self.objective = self._clip.applied_to(self.objective)
        if saved.collapse:
            self._detector.load_state_dict(saved.collapse)

    def _scale_lr(self) -> None:
        self.policy.scale_lr(self._cfg.collapse.rollback_lr_scale**self._detector.rollbacks)

    def _cut_rollouts(self) -> None:
        if rank() == 0:
            cut_after(self._run.transcripts, self.step)
            remove_after(self._run.run_dir / "tokens", self.step)
