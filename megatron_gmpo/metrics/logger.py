"""Log one line of figures per step to metrics.jsonl, and optionally to TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import files
from ..distributed import rank
from ..errors import InputError
from ..supervision.records import append_event
from .figures import Metric, figures_of, reduce_metrics

log = logging.getLogger(__name__)

WORK = ("rollout", "exchange", "logprobs", "train", "weight_sync")
"""Phases of a step that throughput counts; evaluation and checkpoints are excluded."""


def check_wandb(project: str) -> None:
    """Check that wandb is installed when ``project`` is not empty.

    Raises:
        InputError: wandb is not installed.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"log.wandb_project = {project!r} needs wandb: "
            "pip install 'megatron_gmpo[wandb]', or leave it empty"
        )


class MetricLogger:
    """Write metrics and events to the run folder, on rank 0 only.

    The files are ``metrics.jsonl`` (one object per step), ``events.jsonl`` and TensorBoard's. The logger does
    not reduce metrics over ranks, so reduce them before adding them.

    Args:
        run_dir: the run folder; it is created if missing.
        tensorboard: also write ``run_dir/tensorboard``.
        wandb_project: Weights & Biases project to log to; empty disables it.
        config: the resolved configuration, for Weights & Biases.
        resume_step: number of completed steps. Lines of later steps, left by a crash between a log and a
            checkpoint, are removed. With 0 the files start empty.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        tensorboard: bool = True,
        wandb_project: str = "",
        config: Mapping[str, Any] | None = None,
        resume_step: int = 0,
    ) -> None:
        self._run_dir = Path(run_dir)
        self._pending: dict[str, Metric] = {}
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._writes = rank() == 0
        if not self._writes:
            return
        self._run_dir.mkdir(parents=True, exist_ok=True)
        cut_after(self._run_dir / "metrics.jsonl", resume_step)
        if tensorboard:
            threading.excepthook = _without_tensorboards_thread(threading.excepthook)
            with self._tensorboard_may_fail():
                self._tensorboard = self._tensorboard_from(resume_step)
        if wandb_project:
            import wandb  # pyright: ignore[reportMissingImports]

            name = self._run_dir.resolve().name
            self._wandb = wandb.init(
                project=wandb_project, name=name, dir=str(self._run_dir), config=dict(config or {})
            )

    def add(self, metrics: Mapping[str, Metric | float]) -> None:
        """Add metrics to the current step. ``reduce_metrics`` merges metrics with the same name."""
        wrapped = {name: m if isinstance(m, Metric) else Metric(m) for name, m in metrics.items()}
        self._pending = reduce_metrics([self._pending, wrapped])

    @property
    def figures(self) -> dict[str, float]:
        """Return the figures of the metrics added since the last line."""
        return figures_of(self._pending)

    def log(self, step: int, extra: Mapping[str, Metric | float] | None = None) -> dict[str, float]:
        """Write all metrics added since the last call, and ``extra``, as the line of ``step``.

        Figures that are not finite are written as null.

        Returns:
            The figures, without the step.
        """
        self.add(extra or {})
        figures, self._pending = self.figures, {}
        if self._writes:
            finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
            files.append_line(
                self._run_dir / "metrics.jsonl", json.dumps({"step": step, **finite}, allow_nan=False)
            )
            with self._tensorboard_may_fail():
                if self._tensorboard:
                    for name, value in figures.items():
                        self._tensorboard.add_scalar(name, value, step)
                    self._tensorboard.flush()
            if self._wandb:
                self._wandb.log(figures, step=step)
        return figures

    def sync(self) -> None:
        """Flush the lines to the disk, so that they survive a power failure."""
        if self._writes:
            for name in ("metrics.jsonl", "events.jsonl"):
                files.sync(self._run_dir / name)

    def rewind(self, step: int) -> None:
        """Remove the lines after ``step``, for a run that rolled back to it.

        Weights & Biases cannot remove steps and keeps the figures that were logged first.
        """
        if self._writes:
            cut_after(self._run_dir / "metrics.jsonl", step)
            with self._tensorboard_may_fail():
                if self._tensorboard:
                    self._tensorboard.close()
                    self._tensorboard = self._tensorboard_from(step)

    def event(self, name: str, **fields: Any) -> None:
        """Append ``{"time", "event", ...}`` to ``events.jsonl``, for example a resume or a checkpoint."""
        if self._writes:
            append_event(self._run_dir, name, **fields)

    def close(self) -> None:
        with self._tensorboard_may_fail():
            if self._tensorboard:
                self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    @contextmanager
    def _tensorboard_may_fail(self) -> Iterator[None]:
        """Continue without TensorBoard, with a warning, if its files cannot be written in the block."""
        try:
            yield
        except OSError as error:
            self._tensorboard = None
            folder = self._run_dir / "tensorboard"
            log.warning(f"warning: {folder} cannot be written ({error.strerror}); the run goes on without it")

    def _tensorboard_from(self, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=step + 1 if step else 0)


def _without_tensorboards_thread(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    """Return ``threading.excepthook`` without the traceback of TensorBoard's writer for a failed write.

    The writer's next call in the main thread raises the same error.
    """

    def shown(error: Any) -> object:
        expected = (
            isinstance(error.exc_value, OSError) and type(error.thread).__name__ == "_AsyncWriterThread"
        )
        return None if expected else hook(error)

    return shown


def cut_after(path: Path, step: int) -> None:
    """Remove the lines after ``step``, and lines that are no object with a step, from a JSON-lines file.

    A crash may leave an incomplete line. A warning states how many lines could not be read. With ``step`` 0
    the file becomes empty. A missing file is not created.
    """
    if not path.exists():
        return
    kept, unreadable = [], 0
    # read bytes, because a crash may leave half a character, and str.splitlines also splits at U+2028
    for line in path.read_bytes().splitlines() if step else []:
        found = _step_of(line)
        if found is None:
            unreadable += 1
        elif found <= step:
            kept.append(line + b"\n")
    if unreadable:
        log.warning(f"warning: {path}: {unreadable} lines could not be read and are removed")
    files.write(path, b"".join(kept))


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):  # no JSON, no object, no step
        return None
    return step if type(step) is int else None


class Timer:
    """Measure the wall time of a step's phases in seconds.

    Usage: ``with timer("rollout"): ...``, then ``logger.add(timer.take())``.

    Args:
        enter: function called with the name of each phase at its start, and with ``other`` at its end unless
            an error ended it.
    """

    def __init__(self, enter: Callable[[str], None] = lambda phase: None) -> None:
        self._enter = enter
        self._spent: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self._enter(name)
        try:
            yield
        finally:
            self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - start
        self._enter("other")

    def take(self) -> dict[str, float]:
        """Return the times since the last ``take`` and reset them.

        ``time/{name}`` is the time of each phase, ``time/step`` the total, ``time/other`` the time outside
        all phases.
        """
        now = time.perf_counter()
        step = now - self._start
        taken = {f"time/{name}": spent for name, spent in self._spent.items()}
        taken |= {"time/step": step, "time/other": step - sum(self._spent.values())}
        self._spent, self._start = {}, now
        return taken


def throughput(tokens: int, seconds: Mapping[str, float]) -> dict[str, float]:
    """Return ``throughput/tokens_per_second`` of a step, from its tokens and the result of ``Timer.take``."""
    return {"throughput/tokens_per_second": tokens / sum(seconds.get(f"time/{name}", 0) for name in WORK)}
