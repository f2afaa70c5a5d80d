"""Positions, columns and microbatches of images equal transformers and references token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from megatron_gmpo.batch.assembly import whole_batch
from megatron_gmpo.batch.columns import Microbatch, TrainBatch
from megatron_gmpo.batch.images import (
    ImageFolder,
    ImageRef,
    MicrobatchImages,
    digest_of,
    patches_of,
    rope_positions,
)
from megatron_gmpo.batch.index import StepIndex
from megatron_gmpo.batch.packing import pack, plan_microbatches
from megatron_gmpo.batch.pixels import PixelReader
from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.config import Config
from megatron_gmpo.models.description import describe_model
from megatron_gmpo.models.vision_language import rotary_axes
from megatron_gmpo.policy.schedule import Schedule

from ..support.groups import index_of, step_batch

IMAGE = 7
MERGE = 2
quick = settings(deadline=None, max_examples=25)


@dataclass(frozen=True)
class Processor:
    """Makes pixel values that name their image and patch: the file, and the number of its patches."""

    image_token: int = IMAGE
    merge_size: int = MERGE
    patch_values: int = 2

    def pixels(self, data: bytes, grid: Sequence[int]) -> Tensor:
        count = int(np.prod(grid))
        return torch.tensor([int(data), count]).float().repeat(count, 1)


GRIDS = [(1, 2, 2), (1, 4, 6), (1, 6, 2), (1, 2, 10), (1, 4, 4), (1, 2, 4)]
FILES = [b"0", b"1", b"2", b"3", b"4", b"4"]  # the last two are one file, resized to two grids
REFS = [ImageRef(digest_of(data), grid, ".png") for data, grid in zip(FILES, GRIDS, strict=True)]


def tokens_of(ref: ImageRef) -> int:
    return ref.patches // MERGE**2


def name_of(ref: ImageRef) -> tuple[float, ...]:
    """Return the pixel values of each patch."""
    return float(FILES[REFS.index(ref)]), float(ref.patches)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Return a sample of text and images in turn; its response may hold the id of the image token."""
    tokens, images = [1] * draw(st.integers(1, 4)), []
    for number in draw(st.lists(st.integers(0, len(REFS) - 1), max_size=3)):
        tokens += [IMAGE] * tokens_of(REFS[number]) + [2] * draw(st.integers(1, 4))
        images.append(REFS[number])
    response = draw(st.lists(st.sampled_from([3, IMAGE]), max_size=5))
    reason = draw(st.sampled_from(["stop", "length"]))
    others: dict[str, Any] = {"text": "", "finish_reason": reason, "policy_version": 0}
    return Sample.from_response(tokens, response, [-1.0] * len(response), images=tuple(images), **others)


batches = st.lists(samples(), min_size=1, max_size=6)


def batch_of(found: list[Sample]) -> TrainBatch:
    return whole_batch([SampleGroup(Prompt("p", "a"), found)], Processor())


def transformers_positions(model: Any, sample: Sample) -> tuple[Tensor, int]:
    """Return (L, 3) positions and the delta."""
    tokens = torch.from_numpy(sample.tokens).long()
    kinds = ((tokens == IMAGE) & ~torch.from_numpy(sample.response_mask)).int()
    grids = torch.tensor([image.grid for image in sample.images])
    positions, delta = model.get_rope_index(tokens[None], kinds[None], grids)
    return positions[:, 0].T, int(delta)


@pytest.fixture(scope="module")
def families() -> list[Any]:
    """Return the models of Qwen2.5-VL and Qwen3-VL without weights."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen3VLConfig, Qwen3VLModel

    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}
    tower = {"hidden_size": 8, "depth": 1, "num_heads": 2, "spatial_merge_size": MERGE}
    with torch.device("meta"):
        return [
            Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=shape, vision_config=tower)),
            Qwen3VLModel(Qwen3VLConfig(text_config=shape, vision_config=tower)),
        ]


@quick
@given(batches)
def test_positions_equal_those_of_transformers(families: list[Any], found: list[Sample]) -> None:
    batch = batch_of(found)
    assert batch.rope_positions is not None
    assert batch.image_grids is not None
    image_tokens = (batch.tokens == IMAGE) & ~batch.response_mask
    _, deltas = rope_positions(image_tokens, batch.lengths, batch.image_sizes, batch.image_grids, MERGE)
    for model in families:
        expected = [transformers_positions(model, sample) for sample in found]
        torch.testing.assert_close(
            batch.rope_positions, torch.cat([positions for positions, _ in expected]).int(), rtol=0, atol=0
        )
        assert deltas.tolist() == [delta for _, delta in expected]


def test_images_and_tokens_that_do_not_match_are_refused() -> None:
    image_tokens, lengths = torch.tensor([False, True, True, False]), torch.tensor([2, 2])
    grids = torch.tensor([[1, 2, 4]])
    with pytest.raises(ValueError, match="sequence 0 has 1 image tokens, and its images have 2"):
        rope_positions(image_tokens, lengths, torch.tensor([1, 0]), grids, MERGE)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> PixelReader:
    folder = ImageFolder(tmp_path_factory.mktemp("run") / "images")
    for ref, data in zip(REFS, FILES, strict=True):
        folder.write(ref, data)
    return PixelReader(folder, Processor(), cached_bytes=200)  # smaller than two of the images


def features_of(microbatches: list[Microbatch]) -> list[tuple[tuple[float, ...], int]]:
    """Return (image, number of the token in the image) of every feature, over all context-parallel ranks."""
    found: list[tuple[tuple[float, ...], int]] = []
    for rank, microbatch in enumerate(microbatches):
        images = microbatch.images
        assert images
        names = [tuple(patch) for patch in images.pixels[:: MERGE**2].tolist()]
        sizes = (images.grids.prod(1) // MERGE**2).tolist()
        found += zip(names, [token for size in sizes for token in range(size)], strict=True)
        assert images.features[rank] == len(names)
        assert images.features == microbatches[0].images.features  # type: ignore[union-attr]
    return found


@quick
@given(batches, st.sampled_from([1, 2, 4]), st.data())
def test_every_image_token_finds_its_feature(
    reader: PixelReader, found: list[Sample], cp: int, data: st.DataObject
) -> None:
    batch = batch_of(found)
    chosen = data.draw(st.lists(st.integers(0, len(found) - 1), unique=True))
    options: dict[str, Any] = {"cp_size": cp, "sequence_multiple": 2 * cp if cp > 1 else 1, "pixels": reader}
    microbatches = [pack(batch, chosen, cp_rank=rank, **options) for rank in range(cp)]
    if not any(found[i].images for i in chosen):
        assert all(microbatch.images is None for microbatch in microbatches)
        return
    features = features_of(microbatches)
    distinct = {image for i in chosen for image in found[i].images}
    assert len(features) == len(set(features)) == sum(map(tokens_of, distinct))
    # each token's image and number in it, by index in the batch
    expected: dict[int, tuple[tuple[float, ...], int]] = {}
    for i in chosen:
        places = np.flatnonzero((found[i].tokens == IMAGE) & ~found[i].response_mask) + int(batch.starts[i])
        of_images = [(name_of(ref), k) for ref in found[i].images for k in range(tokens_of(ref))]
        expected |= dict(zip(places.tolist(), of_images, strict=True))
    seen = {}
    for microbatch in microbatches:
        assert microbatch.images
        slots = zip(microbatch.input_index.tolist(), microbatch.images.feature_index.tolist(), strict=True)
        seen |= {token: features[feature] for token, feature in slots if feature >= 0}
    assert seen == expected
    for rank, microbatch in enumerate(microbatches):  # stages without the tower know the slots only
        later = pack(batch, chosen, cp_rank=rank, encodes=False, **options).images
        assert later
        assert microbatch.images
        assert later.pixels.shape == (0, 2)
        assert later.grids.shape == (0, 3)
        assert torch.equal(later.feature_index, microbatch.images.feature_index)
        assert later.features == microbatch.images.features
    # the largest images first, each to the smallest rank: no rank has more than the mean and one image
    patches = [int(m.images.grids.prod(1).sum()) for m in microbatches if m.images]
    assert max(patches) <= sum(patches) / cp + max((image.patches for image in distinct), default=0)


def test_dummy_microbatch_has_no_images(reader: PixelReader) -> None:
    batch = batch_of([Sample([1, 2], [False, True], [0.0, -1.0], "", "stop", 0, images=())])
    dummy = pack(batch, [], cp_size=2, cp_rank=0, sequence_multiple=4, total_multiple=8, pixels=reader)
    assert dummy.images is None
    assert dummy.rope_positions is not None
    assert dummy.rope_positions.tolist() == [[0, 0, 0]] * 4


def test_the_reader_keeps_the_last_images(reader: PixelReader) -> None:
    made: list[bytes] = []

    class Counting(Processor):
        def pixels(self, data: bytes, grid: Sequence[int]) -> Tensor:
            made.append(data)
            return super().pixels(data, grid)

    def read(counting: PixelReader, *numbers: int) -> list[bytes]:
        made.clear()
        digests = torch.stack(
            [torch.frombuffer(bytearray(REFS[n].digest), dtype=torch.uint8) for n in numbers]
        )
        pixels = counting.read(digests, torch.tensor([GRIDS[n] for n in numbers]))
        parts = pixels.split([REFS[n].patches for n in numbers])
        assert [part[0, 0] for part in parts] == list(numbers)
        return sorted(made)

    # images 0, 1 and 2 have 4, 24 and 12 patches of 8 bytes
    counting = PixelReader(reader._folder, Counting(), cached_bytes=8 * 36)
    assert read(counting, 1, 2) == FILES[1:3]
    assert read(counting, 2, 1) == []
    assert read(counting, 0) == FILES[:1]  # takes the place of image 2, whose last use is the oldest
    assert read(counting, 1, 0) == []
    assert read(counting, 2) == FILES[2:3]
    assert read(PixelReader(reader._folder, Counting(), cached_bytes=0), 0, 1, 2) == FILES[:3]


@quick
@given(batches, st.data())
def test_rows_of_images_follow_their_sequences(found: list[Sample], data: st.DataObject) -> None:
    batch, count = batch_of(found), len(found)
    chosen = data.draw(st.lists(st.integers(0, count - 1), min_size=1))
    taken, alone = batch.take(torch.tensor(chosen)), batch_of([found[i] for i in chosen])
    groups = [SampleGroup(Prompt("p", "a"), [sample]) for sample in found]
    # without the mask of truncated responses, a sampled image token in them is still text
    step = step_batch(groups, torch.ones(count), mask_truncated=True, vision=Processor()).minibatch(0)
    for name in ("rope_positions", "image_counts", "image_starts", "image_grids", "image_digests"):
        assert torch.equal(getattr(taken, name), getattr(alone, name)), name
        assert torch.equal(getattr(step, name), getattr(batch, name)), name


@quick
@given(batches, st.data())
def test_index_carries_digests_and_grids(found: list[Sample], data: st.DataObject) -> None:
    groups = [SampleGroup(Prompt("p", "a"), [sample]) for sample in found]
    index = StepIndex.gather(dict(enumerate(groups)), len(groups))
    rows = index.image_rows
    images = [image for sample in found for image in sample.images]
    assert [(row["digest"].tobytes(), tuple(row["grid"])) for row in rows] == [
        (i.digest, i.grid) for i in images
    ]
    kept = sorted(data.draw(st.sets(st.integers(0, len(groups) - 1), min_size=1)))
    expected = index_of([groups[i] for i in kept])
    parts = StepIndex.joined([index.take(np.array([i])) for i in kept])
    for part in (index.take(np.array(kept)), parts):
        assert part.images.tolist() == expected.images.tolist()
        assert part.image_rows.tobytes() == expected.image_rows.tobytes()


def test_the_tower_counts_in_the_balance_of_replicas() -> None:
    # Four sequences of one length, two with an image. Without its cost in the plan, both could go to one
    # replica.
    counts = np.array([1, 0, 1, 0])
    rows = index_of(
        [
            SampleGroup(Prompt("p", "a"), [Sample([1], [False], [0.0], "", "stop", 0, images=(r,))])
            for r in REFS[1:3]
        ]
    ).image_rows
    patches = patches_of(counts, rows)
    assert [patches([i]) for i in range(4)] == [24, 0, 12, 0]
    assert patches([0, 1, 2]) == 36
    plan = plan_microbatches(
        [100] * 4, max_tokens=100, data_parallel_size=2, image_cost=lambda members: 100 * patches(members)
    )
    assert [sum(patches(members) for members in microbatches) > 0 for microbatches in plan] == [True, True]


@pytest.mark.parametrize(("family", "frozen"), [("qwen2_5_vl", True), ("qwen3_vl_moe", False)])
def test_cost_of_a_patch(tiny_model: Callable[..., Path], family: str, frozen: bool) -> None:
    """The tower's parameters are used once a patch, as those of the layers that a token uses once a token."""
    path = tiny_model(family)
    tree = {"device": "cpu", "model": {"path": str(path), "dtype": "fp32", "freeze_vision": frozen}}
    schedule: Any = object.__new__(Schedule)
    schedule.cfg = Config.model_validate(tree)
    schedule.description = describe_model(schedule.cfg, 1, torch.device("cpu"))
    schedule.groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: 2), pp=SimpleNamespace(size=lambda: 3))
    model = AutoModelForImageTextToText.from_pretrained(path).model
    used = sum(
        p.numel() * (2 / len(p) if p.dim() == 3 else 1)  # 2 of the experts
        for name, p in model.language_model.layers.named_parameters()
        if p.dim() > 1 and "mlp.gate.weight" not in name
    )
    tower = sum(p.numel() for p in model.visual.parameters())
    # Of 4 passes over a token (old log probabilities, forward, two of backward), a frozen tower has 2.
    # A rank of the first of 3 stages has a sixth of the language model and the whole tower.
    assert schedule._patch_cost() == pytest.approx(tower / used * (0.5 if frozen else 1) * 6)


def test_an_image_of_several_sequences_is_encoded_once() -> None:
    sample = Sample([1], [False], [0.0], "", "stop", 0, images=(REFS[1], REFS[2]))
    index = index_of([SampleGroup(Prompt("p", "a"), [sample, sample])])
    assert patches_of(index.images, index.image_rows)([0, 1]) == 24 + 12


def test_a_folder_holds_each_image_once(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path / "images")
    for _ in range(2):
        folder.write(REFS[0], FILES[0])
    assert [path.name for path in folder.folder.iterdir()] == [f"{REFS[0].digest.hex()}.png"]
    assert folder.read(REFS[0].digest) == FILES[0] == folder.path(REFS[0]).read_bytes()
    with pytest.raises(FileNotFoundError, match=REFS[1].digest.hex()):
        folder.read(REFS[1].digest)


def test_slots_of_a_part_of_a_microbatch() -> None:
    index = torch.tensor([-1, 4, 5, -1, -1, 0])
    images = MicrobatchImages(torch.empty(0, 2), torch.empty(0, 3).long(), (6,), index)
    found = [images.cut(part, 2) for part in (0, 1)]
    assert [(part.slots.tolist(), part.rows.tolist()) for part in found] == [([1, 2], [4, 5]), ([2], [0])]
    assert images.cut(0, 1).slots.tolist() == [1, 2, 5]


@pytest.mark.parametrize(
    ("rotary", "sections", "interleaved"),
    [  # of Qwen2.5-VL-7B and Qwen3-VL-8B
        (Qwen2_5_VLRotaryEmbedding, [16, 24, 24], False),
        (Qwen3VLTextRotaryEmbedding, [24, 20, 20], True),
    ],
)
def test_axis_of_each_rotary_pair(rotary: Any, sections: list[int], interleaved: bool) -> None:
    axes = torch.arange(3.0)[:, None].expand(3, 64).clone()
    expected = rotary.recomposition_frequencies(SimpleNamespace(mrope_section=sections), axes)
    assert rotary_axes(tuple(sections), interleaved=interleaved) * 2 == expected.tolist()
