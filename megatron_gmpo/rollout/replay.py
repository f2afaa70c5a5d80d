"""Write and read the groups of a step, to replay them in another run, and write transcripts."""

from __future__ import annotations

import base64
import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from .. import files
from ..batch.images import SUFFIXES, ImageFolder, ImageRef
from ..batch.samples import Episode, FinishReason, Prompt, Sample, SampleGroup, version_spans_of
from ..distributed import agreed, folder_written_by_all, gather_bytes, rank, world_size
from ..errors import InputError
from .images import RunImages, StoredImage, copy_images

_INDEX = "index.json"


@dataclass
class _SavedImage:
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    grid: tuple[PositiveInt, PositiveInt, PositiveInt]
    suffix: Literal[SUFFIXES]  # pyright: ignore[reportInvalidTypeForm]

    def to_ref(self) -> ImageRef:
        return ImageRef(bytes.fromhex(self.digest), self.grid, self.suffix)


@dataclass
class _SavedPrompt(Prompt):
    images: list[_SavedImage] = field(default_factory=list)  # pyright: ignore[reportIncompatibleVariableOverride]


_PROMPT = TypeAdapter(_SavedPrompt)
_IMAGES = TypeAdapter(list[_SavedImage])
_EPISODE = TypeAdapter(Episode)
_PLACES = TypeAdapter(list[tuple[Annotated[str, Field(pattern=r"^rank_\d+\.jsonl$")], NonNegativeInt]])


def save_groups(
    folder: str | Path,
    step: int,
    groups: Mapping[int, SampleGroup],
    images: ImageFolder | None = None,
) -> None:
    """Write the groups of a step into the folder ``folder/step_000000``, without rounding. Collective.

    Each rank with groups writes a shard ``rank_00000.jsonl`` with a group per line. ``index.json`` has the
    shard and the offset of each group, in the order of the step. The folder appears when it is complete. All
    nodes must see it. ``folder/images`` has each image of the samples once.

    Args:
        groups: this rank's groups by their position in the step.
        images: the images of the run; None for a model without vision.
    """
    final, name = _step_folder(folder, step), f"rank_{rank():05d}.jsonl"
    with folder_written_by_all(final) as partial:
        places: list[tuple[int, str, int]] = []  # position, shard and offset of each group
        with agreed(), files.named(partial / name):
            if groups:
                with (partial / name).open("wb") as file:
                    for position, group in sorted(groups.items()):
                        if images:
                            refs = [ref for sample in group.samples for ref in sample.images]
                            copy_images(refs, images, _images(folder))
                        places.append((position, name, file.tell()))
                        prompt = replace(group.prompt, images=group.prompt.image_refs)
                        record = asdict(SampleGroup(prompt, group.samples))
                        file.write(json.dumps(record, default=_encode).encode() + b"\n")
        everywhere = gather_bytes(json.dumps(places).encode())
        with agreed(), files.named(partial / _INDEX):
            if rank() == 0:
                ordered = sorted(place for part in everywhere for place in json.loads(part))
                (partial / _INDEX).write_text(json.dumps([place[1:] for place in ordered]))
                if final.exists():
                    files.remove(final)


def check_groups(folder: str | Path, steps: Iterable[int]) -> None:
    """Check that the folder has the groups of all ``steps``.

    Raises:
        InputError: a step is missing; the message names the first missing step and the existing steps.
    """
    for step in steps:
        if not (_step_folder(folder, step) / _INDEX).exists() and not _step_file(folder, step).exists():
            stored = [p.parent for p in Path(folder).glob(f"step_*/{_INDEX}")]
            stored += Path(folder).glob("step_*.jsonl")
            found = sorted(int(p.stem.removeprefix("step_")) for p in stored)
            there = f"it has steps {found[0]} to {found[-1]}" if found else "it has no steps at all"
            raise InputError(
                f"rollout.replay_path = {str(folder)!r} has no groups for step {step}, {there}: "
                "save them with rollout.save_path"
            )


def load_share(
    folder: str | Path, step: int, vocab_size: int, images: RunImages | None = None
) -> dict[int, SampleGroup]:
    """Read this rank's share of the groups of a step, by position, with their images. Collective.

    Args:
        images: receives the images of the samples; None for a model without vision.

    Raises:
        InputError: see ``load_groups``. Raised on every rank.
    """
    with agreed():
        groups = load_groups(folder, step, vocab_size, slice(rank(), None, world_size()), images)
        if images:
            refs = [ref for group in groups for sample in group.samples for ref in sample.images]
            copy_images(refs, _images(folder), images.folder)
    return {rank() + number * world_size(): group for number, group in enumerate(groups)}


def load_groups(
    folder: str | Path,
    step: int,
    vocab_size: int,
    chosen: slice = slice(None),
    images: RunImages | None = None,
) -> list[SampleGroup]:
    """Read groups of a step, written by ``save_groups`` or by an earlier version, on any number of nodes.

    Args:
        vocab_size: number of token ids of the model that is trained on the groups.
        chosen: positions of the groups to read.
        images: the images of the run; None for a model without vision.

    Raises:
        InputError: the folder has no such step, it has no groups, or a line or sample of a file is broken or
            does not fit the model.
    """
    check_groups(folder, [step])
    groups: list[SampleGroup] = []
    for path, number, line in _lines(folder, step, chosen):
        place = f"line {number}"
        try:
            record = json.loads(line)
            group = SampleGroup(_decode_prompt(record["prompt"], _images(folder)), [])
            for i, fields in enumerate(record["samples"]):
                place = f"line {number}, sample {i}"
                group.samples.append(_decode_sample(fields))
                _check_sample(group.samples[-1], vocab_size)
                _check_images(group.samples[-1], _images(folder), images)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"rollout.replay_path: {place} of {path} is broken ({reason}): "
                "save the step again, with the model of model.path"
            ) from None
        if not group.samples:
            raise _empty(path)
        groups.append(group)
    return groups


def _lines(folder: str | Path, step: int, chosen: slice) -> Iterator[tuple[Path, int, bytes]]:
    """Yield the file, the number and the content of the line of each chosen group."""
    index = _step_folder(folder, step) / _INDEX
    if not index.exists():  # an earlier version wrote all groups into one file
        path = _step_file(folder, step)
        if path.stat().st_size == 0:
            raise _empty(path)
        with path.open("rb") as file:
            for number, line in islice(enumerate(file, 1), chosen.start, chosen.stop, chosen.step):
                yield path, number, line
        return
    try:
        places = _PLACES.validate_json(index.read_bytes())
    except ValidationError:
        raise InputError(f"rollout.replay_path: {index} is broken: save the step again") from None
    if not places:
        raise _empty(index)
    offsets: dict[str, list[int]] = {}
    for name, offset in sorted(places):
        offsets.setdefault(name, []).append(offset)
    for name, offset in places[chosen]:
        path = index.with_name(name)
        if not path.exists():
            raise InputError(f"rollout.replay_path: {path} is missing, which {_INDEX} names: copy all files")
        with path.open("rb") as file:
            file.seek(offset)
            yield path, bisect_right(offsets[name], offset), file.readline()


def _empty(path: Path) -> InputError:
    return InputError(f"rollout.replay_path: {path} has no groups, or one without samples: save it again")


def append_transcripts(path: str | Path, step: int, groups: Mapping[int, SampleGroup], limit: int) -> None:
    """Append the first ``limit`` groups to a transcript, one JSON object per line. Collective.

    Args:
        groups: this rank's groups by their position in the step. Rank 0 writes those of all ranks.
    """
    mine = {p: _transcript(step, group) for p, group in groups.items() if p < limit}
    everywhere = gather_bytes(json.dumps(sorted(mine.items())).encode())
    records = sorted(record for part in everywhere for record in json.loads(part))
    with agreed():
        if rank() == 0:
            # an environment can say half a character, which JSON escapes as Python does
            with files.named(Path(path)), Path(path).open("a", errors="backslashreplace") as file:
                for _, record in records:
                    file.write(record + "\n")


def _transcript(step: int, group: SampleGroup) -> str:
    record = {
        "step": step,
        "prompt_id": group.prompt.id,
        "prompt": group.prompt.messages or group.prompt.text,
        "answer": group.prompt.answer,
        **({"images": [ref.name for ref in group.prompt.image_refs]} if group.prompt.images else {}),
        "samples": [_transcript_of(sample) for sample in group.samples],
    }
    return json.dumps(record, ensure_ascii=False)


def _transcript_of(sample: Sample) -> dict[str, Any]:
    record: dict[str, Any] = {
        "text": sample.text,
        "reward": sample.reward,
        "finish_reason": sample.finish_reason,
        "length": sample.response_length,
    }
    if sample.episode:
        episode = asdict(sample.episode)
        record |= {"turns": episode.pop("messages"), "episode": episode}
    return record


def _images(folder: str | Path) -> ImageFolder:
    return ImageFolder(Path(folder) / "images")


def _step_folder(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"step_{step:06d}"


def _step_file(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"step_{step:06d}.jsonl"


def _encode(array: Any) -> dict[str, Any] | str:
    if isinstance(array, bytes):  # the digest of an image
        return array.hex()
    assert isinstance(array, np.ndarray), type(array)
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return {"dtype": array.dtype.name, "shape": array.shape, "base64": base64.b64encode(data).decode()}


def _decode_array(record: dict[str, Any]) -> np.ndarray:
    old = "int16" in record  # the format before all columns were arrays
    dtype = np.dtype("int16" if old else record["dtype"])
    data = base64.b64decode(record["int16" if old else "base64"])
    return np.frombuffer(data, dtype.newbyteorder("<")).reshape(record["shape"]).astype(dtype)


def _decode_prompt(record: Any, folder: ImageFolder) -> Prompt:
    prompt = _PROMPT.validate_python(record)
    images = tuple(StoredImage(image.to_ref(), folder) for image in prompt.images)
    fields: dict[str, Any] = vars(prompt) | {"images": images}
    return Prompt(**fields)


def _decode_sample(record: dict[str, Any]) -> Sample:
    episode, images = record.pop("episode", None), record.pop("images", [])
    fields: dict[str, Any] = {
        name: _decode_array(value) if isinstance(value, dict) else value for name, value in record.items()
    }
    if episode is not None:
        fields["episode"] = _EPISODE.validate_python(episode)
    if "token_versions" in fields:  # the format with one version per token
        versions = fields.pop("token_versions")
        fields["version_spans"] = None if versions is None else version_spans_of(versions)
    images = tuple(image.to_ref() for image in _IMAGES.validate_python(images))
    return Sample(**fields, images=images)


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
    if episode := sample.episode:
        if not math.isfinite(episode.reward):
            raise ValueError(f"episode.reward = {episode.reward!r} is not finite")
        for name in ("tool_calls", "tool_errors", "seconds"):
            if not 0 <= (value := getattr(episode, name)) < 2**31:
                raise ValueError(f"episode.{name} = {value!r} is not a number from 0 to 2^31")


def _check_images(sample: Sample, stored: ImageFolder, images: RunImages | None) -> None:
    """Raise a ValueError if training cannot use the images of the sample."""
    if sample.images and not images:
        raise ValueError("it has images, and the model has no vision")
    if not images:
        return
    for ref in sample.images:
        if not stored.path(ref).exists():
            raise ValueError(f"its image {stored.path(ref)} is missing")
        time, height, width = ref.grid
        if time != 1 or height % images.merge_size or width % images.merge_size:
            raise ValueError(f"the model has no image of {time} x {height} x {width} patches")
    places = int(((sample.tokens == images.image_token) & ~sample.response_mask).sum())
    if places != (wanted := int(images.tokens_of(sample.images).sum())):
        raise ValueError(f"it has {places} image tokens for images of {wanted} tokens")
