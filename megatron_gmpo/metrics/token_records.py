"""Record the tokens of a few samples of a step in tokens/step_000012.jsonl, for ``megatron-gmpo view``.

The first line of a file is about the step; each other line is a ``Record``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from .. import files

FOLDER_BYTES = 256 * 2**20
"""Size of the folder above which the files of the oldest steps are removed."""
PROMPT_CHARACTERS = 4000
"""Number of characters that are kept of the end of a prompt."""

_DIGITS = 5


@dataclass(frozen=True)
class Record:
    """The n response tokens of one sequence of the loss, as the update that trained on them saw them.

    The sequence is a sample, or one turn of it (``algorithm.unit``). The record of an episode leaves out its
    observations.

    Attributes:
        prompt_id: name of the prompt.
        index: position of the sample among the samples of its prompt.
        prompt: end of the text before the first of the tokens.
        chosen: why the sample is recorded: ``outlier`` or ``random``.
        reward: its reward.
        advantage: its advantage.
        sequence_ratio: exp of the mean of the clipped log ratios, by which GMPO weighs the sequence.
        ids: (n,) token ids.
        text: n strings, one a token.
        log_ratio: (n,) log pi - log pi_old, before any clip.
        clipped: (n,) bool; True where the loss clips the token.
        entropy: (n,) nats, or None.
        rollout_difference: (n,) log pi_old minus the rollout engine's log probability, or None.
        layers_rerouted: (n,) number of MoE layers whose experts differ from the rollout's, or None.
        turn: (n,) number of the token's turn in its sample, from 0; None in records of earlier versions.

    Raises:
        ValueError: the columns have different lengths, or are empty.
    """

    prompt_id: str
    index: int
    prompt: str
    chosen: str
    reward: float
    advantage: float
    sequence_ratio: float
    ids: np.ndarray
    text: Sequence[str]
    log_ratio: np.ndarray
    clipped: np.ndarray
    entropy: np.ndarray | None = None
    rollout_difference: np.ndarray | None = None
    layers_rerouted: np.ndarray | None = None
    turn: np.ndarray | None = None

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self._columns().items()}
        if len(set(lengths.values())) != 1 or not len(self.ids):
            raise ValueError(f"the columns of a record have the lengths {lengths}")

    def _columns(self) -> dict[str, Any]:
        names = ("ids", "text", "log_ratio", "clipped", "entropy", "rollout_difference", "layers_rerouted")
        names += ("turn",)
        return {name: column for name in names if (column := getattr(self, name)) is not None}

    def token(self, at: int) -> dict[str, Any]:
        """Return the columns' values of one token."""
        return {name: column[at] for name, column in self._columns().items()}

    def to_json(self) -> bytes:
        """Return one line. Numbers are rounded to five digits after the point."""
        fields = asdict(self) | {"prompt": self.prompt[-PROMPT_CHARACTERS:], "text": list(self.text)}
        rounded = {
            name: np.round(value, _DIGITS).astype(np.float32)
            if isinstance(value, np.ndarray) and value.dtype.kind == "f"
            else value
            for name, value in fields.items()
        }
        return orjson.dumps(rounded, option=orjson.OPT_SERIALIZE_NUMPY)

    @classmethod
    def from_json(cls, line: bytes) -> Record:
        """Read a line that ``to_json`` wrote.

        Raises:
            ValueError: the line is not a record. KeyError, TypeError: a field is missing or has a wrong type.
        """
        fields = orjson.loads(line)
        kinds = {"ids": np.int64, "log_ratio": np.float32, "clipped": np.bool_, "entropy": np.float32}
        kinds |= {"rollout_difference": np.float32, "layers_rerouted": np.int64, "turn": np.int64}
        fields.setdefault("turn", None)
        columns = {
            name: None if fields[name] is None else np.array(fields[name], kind)
            for name, kind in kinds.items()
        }
        numbers = {name: float(fields[name]) for name in ("reward", "advantage", "sequence_ratio")}
        return cls(**fields | columns | numbers)


def choose(largest: np.ndarray, count: int, seed: int) -> dict[int, str]:
    """Choose the sequences of a step to record: one half by their largest |log ratio|, the rest at random.

    Args:
        largest: (n,) largest \\|log ratio\\| of each sequence; NaN for a sequence that was not computed,
            which is not chosen.
        count: number of sequences to choose; all are chosen if there are fewer.
        seed: equal seeds choose equal sequences.

    Returns:
        Index of each chosen sequence -> why. The sequence with the largest value of all is always among them.
    """
    order = np.argsort(-largest, kind="stable")
    order = order[np.isfinite(largest[order])]
    outliers, others = order[: -(-count // 2)], order[-(-count // 2) :]
    drawn = np.random.default_rng(seed).permutation(others)[: count // 2]
    return dict.fromkeys(outliers.tolist(), "outlier") | dict.fromkeys(drawn.tolist(), "random")


def write_records(folder: Path, step: int, about: dict[str, Any], records: Sequence[Record]) -> Path:
    """Write ``folder/step_000012.jsonl`` and remove the oldest files above ``FOLDER_BYTES``.

    Args:
        about: what the first line says of the step beside its number, e.g. loss, clip_low and clip_high.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = _file_of(folder, step)
    header = orjson.dumps({"step": step, **about}, option=orjson.OPT_SERIALIZE_NUMPY)
    files.write(
        path, b"".join(line + b"\n" for line in [header, *(r.to_json() for r in records)]), durable=False
    )
    kept = 0
    for file in sorted(folder.glob("step_*.jsonl"), reverse=True):
        kept += file.stat().st_size
        if kept > FOLDER_BYTES and file != path:
            file.unlink()
    return path


def remove_after(folder: Path, step: int) -> None:
    """Remove the records of the steps after ``step``, for a run that resumes from it or rolled back to it."""
    for file in folder.glob("step_*.jsonl"):
        if file > _file_of(folder, step):
            file.unlink()


def _file_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}.jsonl"
