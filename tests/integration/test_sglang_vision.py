"""SGLang servers of tiny vision-language models: log probabilities, token ids and weight syncs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from megatron_gmpo.batch.images import ImageFolder
from megatron_gmpo.batch.samples import Prompt, Sample
from megatron_gmpo.config import Config
from megatron_gmpo.distributed import Nodes
from megatron_gmpo.rollout.engine import SamplingParams
from megatron_gmpo.rollout.images import RunImages
from megatron_gmpo.rollout.sglang.engine import SGLangEngine
from megatron_gmpo.rollout.sglang.processes import LocalServers
from megatron_gmpo.rollout.sglang.start import local_servers
from megatron_gmpo.rollout.sglang.sync import make_weight_sync
from megatron_gmpo.supervision.records import node_name
from megatron_gmpo.testing.tiny_models import make_tiny_model

from ..support.groups import in_order
from ..support.sglang_servers import CPU, PYTHON, needs_sglang
from ..support.vision import SIZES, VisionReference, picture

pytestmark = [needs_sglang, pytest.mark.slow, pytest.mark.timeout(600)]

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
                    "rollout": {"engine": "sglang", "routed_experts": family == "qwen3_vl_moe"},
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
def engine(served: Served, tmp_path: Path) -> Iterator[SGLangEngine]:
    reference = served.reference
    images = RunImages(
        ImageFolder(served.run_dir / "images"), reference.image_token, reference.merge_size, cast(Any, None)
    )
    sync = make_weight_sync(served.cfg.weight_sync, "disaggregated", CPU, tmp_path)
    text = reference.model.config.get_text_config()
    routed = (text.num_hidden_layers, text.num_experts_per_tok) if served.cfg.rollout.routed_experts else None
    made = SGLangEngine(
        served.cfg,
        served.servers.servers,
        None,
        sync,
        reference.tokenizer,
        Nodes(node_name()),
        routed,
        images=images,
    )
    yield made
    made.close()


def prompts(reference: VisionReference, folder: Path) -> list[Prompt]:
    """Return a prompt without images, one for each of ``SIZES``, and one with all of these images."""
    pictures = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    parts: list[list[str | bytes]] = [["1 + 2?"], *([one, "What?"] for one in pictures)]
    parts.append(["Compare ", *pictures, " with ", pictures[0], "."])
    return [reference.prompt(str(i), folder, part) for i, part in enumerate(parts)]


def samples(engine: SGLangEngine, prompts: list[Prompt], **sampling: Any) -> list[Sample]:
    groups = in_order(engine.generate(prompts, SamplingParams(**sampling)))
    return [sample for group in groups for sample in group.samples]


def test_log_probabilities_are_those_of_transformers(engine: SGLangEngine, served: Served) -> None:
    reference = served.reference
    weights = dict(reference.hub_tensors())
    engine.update_weights(weights.items(), 0)
    drawn = samples(engine, served.prompts, n=4, max_new_tokens=12)
    assert [len(sample.images) for sample in drawn[::4]] == [0, 1, 1, 1, 1, 5]
    worst = 0.0
    for sample in drawn:
        expected = reference.logprobs(sample, served.run_dir / "images")
        found = torch.from_numpy(sample.rollout_logprobs[sample.response_mask])
        worst = max(worst, float((found - expected).abs().max()))
        print(
            served.cfg.model.path.split("/")[-2],
            len(sample.images),
            float((found - expected).abs().max()),
            float(expected.std()),
            float(expected.mean()),
        )
    assert worst < 1e-4
