"""SGLang servers of tiny vision-language models: log probabilities, token ids and weight syncs."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.config import Config
from megatron_gmpo.distributed import Nodes
from megatron_gmpo.errors import InputError
from megatron_gmpo.models.description import read_hf_config, vision_of
from megatron_gmpo.rollout.embedded_model import weight_slots
from megatron_gmpo.rollout.engine import SamplingParams
from megatron_gmpo.rollout.images import run_images
from megatron_gmpo.rollout.player import make_player
from megatron_gmpo.rollout.sglang.engine import SGLangEngine
from megatron_gmpo.rollout.sglang.image_requests import TOWER, check_serves_images
from megatron_gmpo.rollout.sglang.processes import LocalServers
from megatron_gmpo.rollout.sglang.start import local_servers
from megatron_gmpo.rollout.sglang.sync import make_weight_sync
from megatron_gmpo.supervision.records import node_name
from megatron_gmpo.testing.tiny_models import make_tiny_model

from ..support.groups import in_order
from ..support.sglang_servers import CPU, PYTHON, needs_sglang
from ..support.vision import SIZES, VisionReference, picture

pytestmark = [needs_sglang, pytest.mark.slow, pytest.mark.timeout(600)]

SHOWN = [picture(*size, seed=4 + i) for i, size in enumerate(SIZES[:2])]
"""Pictures in the environment's observations: that of its reset, and that after the first turn."""
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


@dataclass
class Served:
    reference: VisionReference
    cfg: Config
    servers: LocalServers
    prompts: list[Prompt]

    @property
    def run_dir(self) -> Path:
        return Path(self.cfg.run_dir)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """Start a server of each family; they load at the same time."""
    made: dict[str, Served] = {}
    try:
        for family in FAMILIES:
            folder = tmp_path_factory.mktemp(family)
            make_tiny_model(folder / "model", family=family, num_layers=2, randomize_norms=True)
            cfg = Config.model_validate(
                {
                    "run_dir": str(folder / "run"),
                    "model": {"path": str(folder / "model"), "dtype": "fp32", "freeze_vision": False},
                    "data": {"path": "none", "image_column": "images", "max_pixels": 20_000},
                    "rollout": {
                        "engine": "sglang",
                        "routed_experts": family == "qwen3_vl_moe",
                        "environment": "tests.support.environments:ShowsPictures",
                        "environment_args": {"pictures": list(map(encoded, SHOWN))},
                        "max_new_tokens": 5,
                        "max_episode_tokens": 600,
                    },
                    "sglang": {"python": str(PYTHON), "start_timeout_s": 400.0},
                    "weight_sync": {"verify": True},
                }
            )
            servers = local_servers(cfg, CPU, folder / "servers")
            reference = VisionReference(folder / "model")
            reference.processor.size["longest_edge"] = cfg.data.max_pixels
            made[family] = Served(reference, cfg, servers, prompts(reference, folder / "data"))
            servers.start()
        yield made
    finally:
        for served in made.values():
            served.servers.stop()


@pytest.fixture(params=FAMILIES)
def served(started: dict[str, Served], request: pytest.FixtureRequest) -> Served:
    found = started[request.param]
    found.servers.wait_ready()
    return found


@pytest.fixture
def engine(served: Served, tmp_path: Path) -> Iterator[Callable[..., SGLangEngine]]:
    """Return ``make(route, plays=False)``, which makes an engine on the running server."""
    reference, made = served.reference, []
    text = reference.model.config.get_text_config()
    routed = (text.num_hidden_layers, text.num_experts_per_tok) if served.cfg.rollout.routed_experts else None
    images = run_images(served.cfg, vision_of(read_hf_config(served.cfg.model.path)))
    player = make_player(served.cfg, reference.tokenizer, 2048, images)

    def make(route: str, plays: bool = False) -> SGLangEngine:
        cfg = served.cfg.weight_sync.model_copy(update={"route": route})
        sync = make_weight_sync(cfg, "disaggregated", CPU, tmp_path)
        nodes, servers = Nodes(node_name()), served.servers.servers
        tokenizer = reference.tokenizer
        plays_with = player if plays else None
        made.append(
            SGLangEngine(served.cfg, servers, None, sync, tokenizer, nodes, routed, plays_with, images)
        )
        return made[-1]

    yield make
    for one in made:
        one.close()


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def prompts(reference: VisionReference, folder: Path) -> list[Prompt]:
    """Return a prompt without images, one for each of ``SIZES``, and one with all of these images."""
    pictures = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    parts: list[list[str | bytes]] = [["1 + 2?"], *([one, "What?"] for one in pictures)]
    parts.append(["Compare ", *pictures, " with ", pictures[0], "."])
    return [reference.prompt(str(i), folder, part) for i, part in enumerate(parts)]


@torch.no_grad()
def set_weights(reference: VisionReference, seed: int, *, tower: bool) -> dict[str, Tensor]:
    """Move the reference's weights and return them by the names of the policy's export."""
    generator = torch.Generator().manual_seed(seed)
    slots = weight_slots(reference.model)
    for name, slot in slots.items():
        if tower or "visual." not in name:
            slot += 0.3 * slot.std() * torch.randn(slot.shape, generator=generator)
    return {name: slot.clone() for name, slot in slots.items()}


def assert_as_transformers(served: Served, engine: SGLangEngine) -> None:
    """Check samples of all prompts, and that another image would give other log probabilities."""
    groups = in_order(engine.generate(served.prompts, SamplingParams(n=3, max_new_tokens=12)))
    assert [len(group.samples[0].images) for group in groups] == [0, 1, 1, 1, 1, 5]
    stored = served.run_dir / "images"
    for sample in (sample for group in groups for sample in group.samples):
        expected = served.reference.logprobs(sample, stored)
        found = torch.from_numpy(sample.rollout_logprobs[sample.response_mask])
        assert_close(found, expected, atol=2e-5, rtol=0)
        if served.cfg.rollout.routed_experts:
            served.reference.assert_experts(sample)
    shown = groups[1].samples[0]
    other = served.reference.stored(picture(*SIZES[0], seed=9), stored).ref
    here, there = (
        served.reference.logprobs(each, stored) for each in (shown, replace(shown, images=(other,)))
    )
    assert (here - there).abs().max() > 1e-2


def test_samples_are_what_transformers_says_under_the_weights_of_every_route(
    engine: Callable[[str], SGLangEngine], served: Served
) -> None:
    """The images stay the same while the tower changes: no features of the old weights are left.

    They are resized by the server, and one prompt has five of them. The last sync leaves out the tower, and
    the verification of all syncs finds the weights of the others replaced.
    """
    for number, (route, tower) in enumerate(
        (("distributed", True), ("disk", True), ("tensor", True), ("distributed", False))
    ):
        made = engine(route)
        weights = set_weights(served.reference, number, tower=tower)
        if not tower:
            assert made._sync.verification
            made._sync.verification.left_out.append(TOWER)
            weights = {name: weight for name, weight in weights.items() if "visual." not in name}
        made.update_weights(weights.items(), number)
        assert_as_transformers(served, made)


def test_observations_show_images(engine: Callable[..., SGLangEngine], served: Served) -> None:
    """The second turn's request has the images of the prompt and of both observations."""
    made = engine("tensor", plays=True)
    made.update_weights(set_weights(served.reference, 9, tower=True).items(), 1)
    (group,) = in_order(made.generate(served.prompts[1:2], SamplingParams(n=6, max_new_tokens=5)))
    stored = served.run_dir / "images"
    whole = [sample for sample in group.samples if sample.finish_reason == "stop"]
    assert len(whole) >= 3, [sample.episode for sample in group.samples]
    for sample in whole:
        assert (len(sample.images), sample.num_turns) == (3, 2)
        found = torch.from_numpy(sample.rollout_logprobs[sample.response_mask])
        assert_close(found, served.reference.logprobs(sample, stored), atol=2e-5, rtol=0)


def test_a_server_that_reads_images_in_another_way_is_refused(served: Served) -> None:
    check_serves_images(served.cfg, served.servers.servers, CPU)
    data = served.cfg.data.model_copy(update={"max_pixels": 30_000})
    with pytest.raises(InputError, match=r"has mm_process_config = .*20000.*, and images would differ"):
        check_serves_images(served.cfg.model_copy(update={"data": data}), served.servers.servers, CPU)
