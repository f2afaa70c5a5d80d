"""The schema of a run: defaults, contradictory fields, derived values, and all example configs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_gmpo.command_line import load_config
from megatron_gmpo.config import AlgorithmConfig, Config, EvalConfig, ParallelConfig
from megatron_gmpo.errors import InputError

ROOT = Path(__file__).parents[2]


def mistake(*argv: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(list(argv))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (
            ["--parallel.virtual_pipeline_model_parallel_size", "2"],
            ["virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1"],
        ),
        (["--eval.k", "[1, 8]", "--eval.temperature", "1"], ["k = 8", "samples_per_prompt >= 8"]),
        (["--eval.samples_per_prompt", "4"], ["samples_per_prompt > 1", "temperature > 0"]),
        (
            ["--algorithm.clip", "adaptive"],
            ["algorithm.clip = 'adaptive' needs train.minibatches_per_step > 1"],
        ),
        (
            ["--algorithm.clip_bounds", "[0.5, 0.1]"],
            ["clip_bounds = [0.5, 0.1]", "put the smaller value first"],
        ),
        (
            ["--algorithm.mask", "icepop", "--algorithm.mask_low", "6"],
            ["mask_low = 6 is above mask_high = 5"],
        ),
        (
            ["--rollout.engine", "sglang", "--rollout.dtype", "fp32"],
            ["dtype = 'fp32' needs engine = 'embedded'", "sglang.args.dtype"],
        ),
        (
            ["--rollout.engine", "sglang", "--rollout.router_noise", "0.5"],
            ["router_noise = 0.5 needs engine = 'embedded'"],
        ),
        (
            ["--rollout.stop", '["###", ""]'],
            ["rollout", "stop = ['###', ''] has an empty string", "leave it out"],
        ),
        (
            ["--algorithm.moe_routing_replay", "rollout"],
            ["algorithm.moe_routing_replay = 'rollout' needs rollout.routed_experts = true"],
        ),
    ],
)
def test_fields_that_contradict_each_other(argv: list[str], parts: list[str]) -> None:
    message = mistake(*argv)
    assert all(part in message for part in parts), message


def test_fields_that_fit_together() -> None:
    assert AlgorithmConfig(mask="icepop").mask_band == (0.5, 5.0)
    assert AlgorithmConfig(mask="geometric", mask_low=0.9).mask_band == (0.9, 1.01)
    assert (
        ParallelConfig(
            pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
        ).model_parallel_size
        == 2
    )
    assert EvalConfig(k=(1, 8), samples_per_prompt=8, temperature=0.6).k == (1, 8)
    saved = load_config(["--algorithm.moe_routing_replay", "rollout", "--rollout.replay_path", "rollouts"])
    assert saved.needs_rollout_routing
    assert not load_config(["--algorithm.moe_routing_replay", "policy"]).needs_rollout_routing


@pytest.mark.parametrize(
    ("tp", "sequence_parallel", "expected"),
    [(1, None, False), (2, None, True), (2, False, False), (1, True, False), (2, True, True)],
)
def test_sequence_parallelism_follows_tensor_parallelism(
    tp: int, sequence_parallel: bool | None, expected: bool
) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel)
    assert parallel.uses_sequence_parallel is expected


def test_the_tree_is_frozen_and_survives_json() -> None:
    cfg = load_config(
        ["--parallel.pipeline_model_parallel_size", "2", "--eval.sets.a.path", "b", "--rollout.stop", '["x"]']
    )
    with pytest.raises(ValidationError):
        cfg.train.num_steps = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert Config.model_validate_json(cfg.model_dump_json()) == cfg


def test_the_readmes_example_loads(tmp_path: Path) -> None:
    block = re.search(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    (tmp_path / "c.toml").write_text(block[1])
    assert load_config([str(tmp_path / "c.toml")]).algorithm.loss == "gmpo"


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/moe/*.toml")), ids=lambda path: path.name)
def test_every_example_loads(path: Path) -> None:
    assert load_config([str(path)]) != Config()
    assert tomllib.loads(path.read_text())
