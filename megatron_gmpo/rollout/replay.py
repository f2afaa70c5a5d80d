"""Write and read the groups of a step, to replay them in another run, and write transcripts."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
from pydantic import TypeAdapter

from .. import files
from ..batch.samples import FinishReason, Prompt, Sample, SampleGroup, version_spans_of
from ..distributed import all_gather_objects, rank
from ..errors import InputError

_PROMPT = TypeAdapter(Prompt)


def save_groups(folder: str | Path, step: int, groups: Mapping[int, SampleGroup]) -> None:
    """Write ``folder/step_000000.jsonl``, one group per line, without rounding. Atomic. Collective.

    Args:
        groups: this rank's groups by their position in the step. Rank 0 writes those of all ranks.
    """
    everyone = {p: group for part in all_gather_objects(groups) for p, group in part.items()}
    if rank() != 0:
        return
    path = _step_file(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.written_aside(path) as aside, aside.open("w") as file:
        for _, group in sorted(everyone.items()):
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


def load_groups(
    folder: str | Path, step: int, vocab_size: int, limit: int | None = None
) -> list[SampleGroup]:
    """Read the groups of a step, written by ``save_groups``.

    Args:
        vocab_size: number of token ids of the model that is trained on the groups.
        limit: number of groups to read from the start of the file; None reads all.

    Raises:
        InputError: the folder has no such step, its file has no groups, or a line or sample of the file is
            broken or does not fit the model.
    """
    check_groups(folder, [step])
    path = _step_file(folder, step)
    groups: list[SampleGroup] = []
    with path.open("rb") as file:
        for number, line in enumerate(islice(file, limit), 1):
            place = f"line {number}"
            try:
                record = json.loads(line)
                group = SampleGroup(_PROMPT.validate_python(record["prompt"]), [])
                for i, fields in enumerate(record["samples"]):
                    place = f"line {number}, sample {i}"
                    group.samples.append(_decode_sample(fields))
                    _check_sample(group.samples[-1], vocab_size)
                groups.append(group)
            except (
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                ArithmeticError,
                RecursionError,
            ) as error:
                reason = " ".join(str(error).split())
                raise InputError(
                    f"rollout.replay_path: {place} of {path} is broken ({reason}): "
                    "save the step again, with the model of model.path"
                ) from None
    if not all(group.samples for group in groups) or not groups:
        raise InputError(f"rollout.replay_path: {path} has no groups, or one without samples: save it again")
    return groups


def append_transcripts(path: str | Path, step: int, groups: Mapping[int, SampleGroup], limit: int) -> None:
    """Append the first ``limit`` groups to a transcript, one JSON object per line. Collective.

    Args:
        groups: this rank's groups by their position in the step. Rank 0 writes those of all ranks.
    """
    mine = {p: _transcript(step, group) for p, group in groups.items() if p < limit}
    records = {p: record for part in all_gather_objects(mine) for p, record in part.items()}
    if rank() == 0:
        with files.named(Path(path)), Path(path).open("a") as file:
            for _, record in sorted(records.items()):
                file.write(record + "\n")


def _transcript(step: int, group: SampleGroup) -> str:
    samples = [
        {"text": s.text, "reward": s.reward, "finish_reason": s.finish_reason, "length": s.response_length}
        for s in group.samples
    ]
    record = {
        "step": step,
        "prompt_id": group.prompt.id,
        "prompt": group.prompt.messages or group.prompt.text,
        "answer": group.prompt.answer,
        "samples": samples,
    }
    return json.dumps(record, ensure_ascii=False)


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


def _check_sample(sample: Sample, vocab_size: int) -> None:
    """Raise a ValueError if training cannot use the sample. ``Sample`` has checked types and shapes."""
    tokens, length = sample.tokens, len(sample.tokens)
    if length == 0 or sample.response_mask[0]:
        raise ValueError("it does not start with a prompt token")
    if not 0 <= tokens.min() <= tokens.max() < vocab_size:
        wrong = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
        raise ValueError(f"token id {wrong} is outside the vocabulary of {vocab_size}")
    if not np.isfinite(sample.rollout_logprobs).all():
        raise ValueError("a log probability is not finite")
    if sample.version_spans is not None:
        starts = sample.version_spans[:, 0]
        if not (len(starts) and starts[0] >= 0 and (np.diff(starts) > 0).all() and starts[-1] < length):
            raise ValueError(f"version_spans start at {starts.tolist()} of {length} tokens")
    if not isinstance(sample.text, str):
        raise ValueError(f"text = {sample.text!r} is not text")
    if sample.finish_reason not in get_args(FinishReason):
        raise ValueError(f"finish_reason = {sample.finish_reason!r} is not one of {get_args(FinishReason)}")
    if type(sample.policy_version) is not int or not -1 <= sample.policy_version < 2**31:
        raise ValueError(f"policy_version = {sample.policy_version!r} is not a training step")
    if type(sample.reward) not in (int, float) or not math.isfinite(sample.reward):
        raise ValueError(f"reward = {sample.reward!r} is not a finite number")
