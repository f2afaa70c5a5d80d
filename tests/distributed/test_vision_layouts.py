"""Vision-language models: in every layout, log probabilities and three steps equal a float64 reference.

The reference is transformers, with the pixel values of its own image processor. Unless a test says otherwise,
the vision tower is trained too.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoImageProcessor

from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.batch.images import ImageFolder, ImageRef, digest_of, image_columns, image_rows
from megatron_gmpo.config import Config
from megatron_gmpo.testing import VisionFamily

from ..support import cases, reference
from ..support.batches import split
from ..support.ranks import RankPool
from .test_layouts import (
    BUDGETS,
    CLIP,
    CLIP_GRAD,
    CP,
    EP,
    EPS,
    LR,
    PP,
    STEPS,
    TP,
    VPP,
    check,
    config,
    distance,
)

pytestmark = pytest.mark.distributed

SIZES = {"square": (64, 64), "wide": (130, 64), "tall": (64, 96)}
"""Width and height of the images in pixels; each has another grid."""
SEQUENCES: list[tuple[list[int | str], int, float]] = [
    ([5, "square", 4], 6, 1.0),
    ([9], 7, -1.0),
    (["wide", 2, "square", 3], 5, 0.7),
    ([3, "tall", 2], 8, -0.6),
    ([4, "square", 3], 4, 0.9),
    ([2, "wide", 1, "tall", "square"], 0, 1.5),
    ([6], 3, 0.5),
]
"""The parts of each prompt (numbers of text tokens, and images), number of response tokens, and advantage.

Some sequences have no image, and one image is in several sequences."""
SETTINGS: dict[str, Any] = {
    "lr": LR,
    "eps": EPS,
    "clip_grad": CLIP_GRAD,
    "loss": "gmpo",
    "clip_low": CLIP,
    "clip_high": CLIP,
    "entropy_coef": 0.0,
}
"""Optimizer and loss of the reference."""
SMALL = {"ffn_hidden_size": 32, "head_dim": 16, "num_experts": 4}


def png(name: str) -> bytes:
    width, height = SIZES[name]
    noise = np.random.default_rng(width + height).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def make_images(path: Path) -> dict[str, tuple[ImageRef, dict[str, Tensor]]]:
    """Write the images into the model's folder; return each with what transformers' processor makes of it."""
    processor, folder = AutoImageProcessor.from_pretrained(path), ImageFolder(path / "images")
    made: dict[str, tuple[ImageRef, dict[str, Tensor]]] = {}
    for name in SIZES:
        data = png(name)
        inputs = dict(processor(Image.open(io.BytesIO(data)), return_tensors="pt"))
        ref = ImageRef(digest_of(data), tuple(inputs["image_grid_thw"][0].tolist()), ".png")
        folder.write(ref, data)
        made[name] = ref, inputs
    return made


def make_problem(path: Path) -> tuple[TrainBatch, reference.ImagesBySequence]:
    """Return the batch of ``SEQUENCES`` for a model, and the images of its sequences for the reference."""
    hf, images = AutoConfig.from_pretrained(path), make_images(path)
    merge_size = hf.vision_config.spatial_merge_size
    generator = torch.Generator().manual_seed(0)
    sequences: list[Tensor] = []
    inputs: reference.ImagesBySequence = {}
    for parts, response, _ in SEQUENCES:
        pieces: list[Tensor] = []
        for part in [*parts, response]:
            if isinstance(part, str):
                tokens = [hf.image_token_id] * (images[part][0].patches // merge_size**2)
                pieces.append(torch.tensor([hf.vision_start_token_id, *tokens, hf.vision_end_token_id]))
            else:
                pieces.append(torch.randint(3, 250, (part,), generator=generator))
        sequences.append(torch.cat(pieces))
        of_sequence = [images[part][1] for part in parts if isinstance(part, str)]
        if of_sequence:
            inputs[tuple(sequences[-1].tolist())] = {
                name: torch.cat([each[name] for each in of_sequence]) for name in of_sequence[0]
            }
    names = [[part for part in parts if isinstance(part, str)] for parts, *_ in SEQUENCES]
    tokens, lengths = torch.cat(sequences), torch.tensor([len(each) for each in sequences])
    mask = torch.cat(
        [torch.arange(len(s)) >= len(s) - n for s, (_, n, _) in zip(sequences, SEQUENCES, strict=True)]
    )
    columns = image_columns(
        tokens,
        mask,
        lengths,
        torch.tensor([len(of_sequence) for of_sequence in names]),
        image_rows([images[name][0] for of_sequence in names for name in of_sequence]),
        SimpleNamespace(image_token=hf.image_token_id, merge_size=merge_size),
    )
    advantages = torch.tensor([advantage for *_, advantage in SEQUENCES])
    return TrainBatch(tokens, lengths, mask, advantages, torch.zeros(len(tokens)), **columns), inputs


class VisionReference:
    """Models, batches and expected results of three steps, computed once for each set of options."""

    def __init__(self, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> None:
        self._tiny_model, self._tmp = tiny_model, tmp_path_factory
        self._known: dict[Any, dict[str, Any]] = {}

    def model(self, family: VisionFamily) -> Path:
        # a head of Qwen2.5-VL has a quarter of the width, and needs 8 channel pairs for its sections
        return self._tiny_model(family, hidden_size=64 if family == "qwen2_5_vl" else 32, **SMALL)

    def __call__(
        self, family: VisionFamily, rows: tuple[int, ...] = (), *, freeze_vision: bool = False
    ) -> dict[str, Any]:
        """Train on the sequences in ``rows``, or on all, and return the results."""
        key = (family, rows, freeze_vision)
        if key not in self._known:
            path = self.model(family)
            batch, images = make_problem(path)
            if rows:
                batch = batch.take(torch.tensor(rows))
            old = reference.batch_logprobs(path, batch, images=images)
            noise = torch.randn(len(old), generator=torch.Generator().manual_seed(1)) * 0.4
            batch.old_logprobs = torch.where(batch.response_mask, old.float() + noise, 0.0)
            folder = self._tmp.mktemp("reference")
            known = reference.train(
                path,
                batch,
                STEPS,
                folder,
                images=images,
                freeze_vision=freeze_vision,
                kl_coef=0.0,
                **SETTINGS,
            )
            assert min(known["norms"]) > CLIP_GRAD
            reference.load_float64(path).save_pretrained(folder / "before")
            before = reference.saved_tensors(folder / "before")
            known |= {"path": path, "batch": batch, "images": images, "before": before, "logprobs": old}
            self._known[key] = known
        return self._known[key]


@pytest.fixture(scope="session")
def seen(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> VisionReference:
    return VisionReference(tiny_model, tmp_path_factory)


def training(path: Path, parallel: dict[str, Any], budget: str = "all in one", **changes: Any) -> Config:
    changes["model"] = {"freeze_vision": False} | changes.get("model", {})
    return config(path, parallel, max_tokens=BUDGETS[budget], **changes)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "tp2": (2, {TP: 2}),
    "tp2 without sequence parallelism": (2, {TP: 2, "sequence_parallel": False}),
    "pp2": (2, {PP: 2}),
    "pp2 vpp2": (2, {PP: 2, VPP: 2}),  # the second layer, a deepstack layer, is on another stage
    "cp2": (2, {CP: 2}),
    "tp2 pp2": (4, {TP: 2, PP: 2}),
    "ep2": (2, {EP: 2}),
    "tp2 ep2": (2, {TP: 2, EP: 2}),
    "tp2 pp2 ep2": (4, {TP: 2, PP: 2, EP: 2}),
}
CASES: dict[VisionFamily, tuple[str, ...]] = {
    "qwen2_5_vl": ("one rank", "tp2", "pp2", "cp2", "tp2 pp2"),
    "qwen3_vl": (
        "one rank",
        "tp2",
        "tp2 without sequence parallelism",
        "pp2 vpp2",
        "cp2",
        "tp2 pp2",
    ),
    "qwen3_vl_moe": ("one rank", "pp2 vpp2", "cp2", "ep2", "tp2 ep2", "tp2 pp2 ep2"),
}


@pytest.mark.parametrize("budget", ["a sequence each", "all in one"])
@pytest.mark.parametrize(
    ("family", "layout"), [(family, layout) for family, layouts in CASES.items() for layout in layouts]
)
def test_layout_equals_float64_reference(
    ranks: RankPool, seen: VisionReference, family: VisionFamily, layout: str, budget: str
) -> None:
    known = seen(family)
    moved = sum(not torch.equal(known["weights"][n], t.double()) for n, t in known["before"].items())
    assert moved > 0.9 * len(known["before"])  # also in the tower
    world_size, parallel = LAYOUTS[layout]
    cfg = training(known["path"], parallel, budget)
    check(ranks.run(world_size, cases.train, cfg, known["batch"], STEPS), known)


def test_deepstack_features_pass_through_several_stages(ranks: RankPool, seen: VisionReference) -> None:
    """The features of the second layer, on the second stage, travel there with sequence parallelism too."""
    known = seen("qwen3_vl")
    check(ranks.run(4, cases.train, training(known["path"], {PP: 4}), known["batch"], STEPS), known)
    parallel = {TP: 2, PP: 2, VPP: 2}
    check(ranks.run(4, cases.train, training(known["path"], parallel), known["batch"], STEPS), known)


@pytest.mark.parametrize(("family", "layout"), [("qwen2_5_vl", "cp2"), ("qwen3_vl", "pp2 vpp2")])
def test_recomputation(ranks: RankPool, seen: VisionReference, family: VisionFamily, layout: str) -> None:
    """A recomputed layer adds the features of its own microbatch, and the tower is recomputed too."""
    known = seen(family)
    world_size, parallel = LAYOUTS[layout]
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    cfg = training(known["path"], parallel, "a sequence each", megatron=recompute)
    check(ranks.run(world_size, cases.train, cfg, known["batch"], STEPS), known)


@pytest.mark.parametrize("parallel", [{}, {CP: 2}])
def test_ranks_without_images_take_part_in_overlapped_communication(
    ranks: RankPool, seen: VisionReference, parallel: dict[str, int]
) -> None:
    """One replica trains on an image, the others on text. Gradients are reduced in many small buckets."""
    known = seen("qwen3_vl", rows=(0, 1, 6))
    overlap = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    cfg = training(known["path"], parallel, "a sequence each", optimizer=overlap)
    check(ranks.run(4, cases.train_in_small_buckets, cfg, known["batch"], STEPS), known)


@pytest.mark.parametrize("layout", ["cp2", "tp2 pp2"])
def test_minibatches_without_and_with_images_and_a_reference_policy(
    ranks: RankPool, seen: VisionReference, tiny_model: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    """Two updates with a KL penalty equal float64 updates; only the sequences of the second have images."""
    path = seen.model("qwen3_vl")
    other = tiny_model("qwen3_vl", hidden_size=32, seed=1, **SMALL)
    batch, images = make_problem(path)
    batch = batch.take(torch.tensor([1, 6, 0, 2]))
    own = reference.batch_logprobs(path, batch, images=images)
    noise = 0.4 * torch.randn(len(own), generator=torch.Generator().manual_seed(2))
    batch.rollout_logprobs = torch.where(batch.response_mask, own.float() + noise, 0.0)
    known: list[dict[str, Any]] = []
    start = path
    for number, minibatch in enumerate(split(batch, 2)):
        minibatch.old_logprobs = minibatch.rollout_logprobs
        saved = tmp_path / str(number)
        known.append(
            reference.train(
                start, minibatch, 1, saved, ref_path=other, images=images, kl_coef=0.2, **SETTINGS
            )
        )
        start = saved
    world_size, parallel = LAYOUTS[layout]
    cfg = training(
        path,
        parallel,
        train={"minibatches_per_step": 2},
        algorithm={"old_logprobs": "rollout", "kl_coef": 0.2},
        model={"reference_path": str(other)},
    )
    for result in ranks.run(world_size, cases.learn, cfg, batch, 1, False):
        for update, wanted in zip(result["history"], known, strict=True):
            assert update["loss"] == pytest.approx(wanted["losses"][0], rel=1e-4)
            assert update["grad_norm"] == pytest.approx(wanted["norms"][0], rel=1e-4)


@pytest.mark.parametrize(("family", "layout"), [("qwen2_5_vl", "one rank"), ("qwen3_vl_moe", "tp2 pp2 ep2")])
def test_frozen_tower(ranks: RankPool, seen: VisionReference, family: VisionFamily, layout: str) -> None:
    known = seen(family, freeze_vision=True)
    world_size, parallel = LAYOUTS[layout]
    cfg = training(known["path"], parallel, model={"freeze_vision": True})
    results = ranks.run(world_size, cases.train, cfg, known["batch"], STEPS)
    check(results, known)
    tower = [name for name in known["before"] if "visual." in name]
    assert tower
    for name in tower:
        assert torch.equal(results[0]["weights"][name].double(), known["before"][name])


@pytest.mark.parametrize("frozen", [True, False])
def test_copies_of_the_tower(ranks: RankPool, seen: VisionReference, frozen: bool) -> None:
    """The first stage has the only copies, equal to the last bit. A frozen one has no gradients and state."""
    known = seen("qwen3_vl")
    cfg = training(known["path"], {TP: 2, PP: 2}, "a sequence each", model={"freeze_vision": frozen})
    first, second, *later = ranks.run(4, cases.tower, cfg, known["batch"], 2)
    assert [result["weights"] for result in later] == [{}, {}]
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(tensor, second["weights"][name]) for name, tensor in first["weights"].items())
    trained = 0 if frozen else len(first["weights"])
    for result in (first, second):
        assert (result["trained"], result["with_state"]) == (trained, trained)


def test_checkpoint_of_another_layout(ranks: RankPool, seen: VisionReference, tmp_path: Path) -> None:
    known = seen("qwen3_vl")
    distributed = {"use_distributed_optimizer": True}
    saved = training(known["path"], {PP: 2, VPP: 2}, optimizer=distributed)
    ranks.run(4, cases.run_on, saved, known["batch"], tmp_path, 0, 2, [2])
    loaded = training(known["path"], {TP: 2})
    results = ranks.run(2, cases.run_on, loaded, known["batch"], tmp_path, 2, STEPS, [])
    assert results[0]["history"][0]["loss"] == pytest.approx(known["losses"][2], rel=1e-4)
    assert distance(results[0]["weights"], known) < 1e-4


@pytest.mark.parametrize("layout", ["one rank", "tp2 ep2", "pp2 vpp2"])
def test_replay_of_the_engines_routing(ranks: RankPool, seen: VisionReference, layout: str) -> None:
    """With a record of random experts, the model equals one that is forced to use them."""
    known = seen("qwen3_vl_moe")
    batch, images, (world_size, parallel) = known["batch"], known["images"], LAYOUTS[layout]
    experts = torch.rand(len(batch.tokens), 4, 4, generator=torch.Generator().manual_seed(2)).topk(2).indices
    expected = reference.batch_logprobs(known["path"], batch, experts=experts, images=images)
    assert (expected - known["logprobs"]).abs().max() > 0.01
    record = experts.short()
    record[batch.lengths.cumsum(0) - 1] = -1
    replaying = {"algorithm": {"moe_routing_replay": "rollout"}, "rollout": {"routed_experts": True}}
    cfg = training(known["path"], parallel, **replaying)
    recorded = replace(batch, routed_experts=record, old_logprobs=None)
    for result in ranks.run(world_size, cases.replay, cfg, recorded, 1, 1):
        assert_close(result["logprobs"].double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["tp2 ep2", "pp2 vpp2"])
def test_replay_of_the_policys_routing(ranks: RankPool, seen: VisionReference, layout: str) -> None:
    """The routers record the experts that transformers chooses, and a first update repeats them."""
    known = seen("qwen3_vl_moe")
    batch, (world_size, parallel) = known["batch"], LAYOUTS[layout]
    expected = reference.own_routing(known["path"], batch, known["images"])
    cfg = training(known["path"], parallel, algorithm={"moe_routing_replay": "policy"})
    for result in ranks.run(world_size, cases.replay, cfg, replace(batch, old_logprobs=None), 1, 1):
        recorded = result["routed_experts"].long().sort().values
        assert torch.equal(recorded, expected.sort().values)
        assert result["history"][0]["moe/routing_drift"] == 0


def test_bf16(ranks: RankPool, seen: VisionReference) -> None:
    known = seen("qwen3_vl")
    cfg = training(known["path"], {TP: 2, PP: 2}, model={"dtype": "bf16"})
    (step,) = ranks.run(4, cases.train, cfg, known["batch"], 1)[0]["history"]
    assert step["loss"] == pytest.approx(known["losses"][0], abs=0.03)
    assert step["grad_norm"] == pytest.approx(known["norms"][0], rel=0.05)


def test_batches_of_text(ranks: RankPool, seen: VisionReference) -> None:
    known = seen("qwen3_vl")
    text, span = known["batch"].take(torch.tensor([1])), reference.spans(known["batch"])[1]
    for parallel in ({}, {CP: 2}):
        for result in ranks.run(2, cases.train, training(known["path"], parallel), text, 1):
            assert_close(result["logprobs"].double(), known["logprobs"][span], atol=1e-4, rtol=0)
