"""Write and read the groups of a step, to replay them in another run, and write transcripts."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..batch.samples import Prompt, Sample, SampleGroup, version_spans_of
from ..distributed import rank
from ..errors import InputError


def save_groups(folder: str | Path, step: int, groups: list[SampleGroup]) -> None:
    """Write ``folder/step_000000.jsonl``, one group per line, without rounding. Atomic; rank 0 only."""
    if rank() != 0:
        return
    path = _step_file(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.written_aside(path) as aside, aside.open("w") as file:
        for group in groups:
            file.write(json.dumps(asdict(group), default=_encode_array) + "\n")


def check_groups(folder: str | Path, steps: Iterable[int]) -> None:
    """Check that the folder has the groups of all ``steps``.

    Raises:
        InputError: a step is missing; the message names the first missing step and the existing steps.
    """
    for step in steps:
        if not _step_file(folder, step).exists():
            found = sorted(int(p.stem.removeprefix("step_")) for p in Path(folder).glob("step_*.jsonl"))
            there = f"it has steps {found[0]} to {found[-1]}" if found else "it has no steps at all"
            raise InputError(
                f"rollout.replay_path = {str(folder)!r} has no groups for step {step}, {there}: "
                "save them with rollout.save_path"
            )


def load_groups(folder: str | Path, step: int) -> list[SampleGroup]:
    """Read the groups of a step, written by ``save_groups``.

    Raises:
        InputError: the folder has no such step, or a line of its file is broken.
    """
    check_groups(folder, [step])
    path = _step_file(folder, step)
    groups = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            groups.append(
                SampleGroup(Prompt(**record["prompt"]), [_decode_sample(s) for s in record["samples"]])
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"rollout.replay_path: line {number} of {path} is broken ({error}): save the step again"
            ) from None
    return groups


def append_transcripts(path: str | Path, step: int, groups: list[SampleGroup], limit: int) -> None:
    """Append the first ``limit`` groups to a transcript, one JSON object per line; rank 0 only."""
    if rank() != 0:
        return
    with Path(path).open("a") as file:
        for group in islice(groups, limit):
            samples = [
                {
                    "text": s.text,
                    "reward": s.reward,
                    "finish_reason": s.finish_reason,
                    "length": s.response_length,
                }
                for s in group.samples
            ]
            record = {
                "step": step,
                "prompt_id": group.prompt.id,
                "prompt": group.prompt.messages or group.prompt.text,
                "answer": group.prompt.answer,
                "samples": samples,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _step_file(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"step_{step:06d}.jsonl"


def _encode_array(array: Any) -> dict[str, Any]:
    assert isinstance(array, np.ndarray), type(array)
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return {"dtype": array.dtype.name, "shape": array.shape, "base64": base64.b64encode(data).decode()}


def _decode_array(record: dict[str, Any]) -> np.ndarray:
    old = "int16" in record  # the format before all columns were arrays
    dtype = np.dtype("int16" if old else record["dtype"])
    data = base64.b64decode(record["int16" if old else "base64"])
    return np.frombuffer(data, dtype.newbyteorder("<")).reshape(record["shape"]).astype(dtype)


def _decode_sample(record: dict[str, Any]) -> Sample:
    fields: dict[str, Any] = {
        name: _decode_array(value) if isinstance(value, dict) else value for name, value in record.items()
    }
    if "token_versions" in fields:  # the format with one version per token
        versions = fields.pop("token_versions")
        fields["version_spans"] = None if versions is None else version_spans_of(versions)
    return Sample(**fields)
