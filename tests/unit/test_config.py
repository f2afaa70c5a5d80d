"""The schema of a run: defaults, contradictory fields, derived values, and all example configs."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from megatron_gmpo.command_line import load_config
from megatron_gmpo.config import AlgorithmConfig, Config, EvalConfig, ParallelConfig
from megatron_gmpo.config.benchmarks import BENCHMARKS
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
            ["--algorithm.old_logprobs", "rollout", "--algorithm.correction", "geometric"],
            ["correction = 'geometric' needs old_logprobs = 'policy'", "or correction = 'none'"],
        ),
        (
            ["--algorithm.old_logprobs", "rollout", "--algorithm.mask", "icepop"],
            ["mask = 'icepop' needs old_logprobs = 'policy'", "or mask = 'none'"],
        ),
        (
            ["--algorithm.old_logprobs", "rollout", "--algorithm.mask", "geometric"],
            ["mask = 'geometric' needs old_logprobs = 'policy'"],
        ),
        (
            [
                *("--algorithm.old_logprobs", "rollout", "--algorithm.moe_routing_replay", "policy"),
                *("--train.minibatches_per_step", "2"),
            ],
            [
                "algorithm.moe_routing_replay = 'policy' with train.minibatches_per_step = 2",
                "replay 'rollout'",
            ],
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
            ["rollout.stop.1 = ''", "at least 1 character"],
        ),
        (
            ["--rollout.environment", "m:Room", "--rollout.tools", '["m:f"]'],
            ["environment = 'm:Room' and tools = ['m:f']", "leave one out"],
        ),
        (["--rollout.tools", '["m:f", "m:f"]'], ["tools = ['m:f', 'm:f'] names a function twice"]),
        (["--rollout.max_episode_tokens", "9"], ["max_episode_tokens = 9 needs environment or tools"]),
        (["--rollout.environment_args.n", "9"], ["environment_args = {'n': 9} needs environment or tools"]),
        (
            ["--rollout.environment", "m:Room", "--rollout.environment_args", "{day = 2026-01-31}"],
            ["rollout.environment_args: Object of type date is not JSON serializable: give a text instead"],
        ),
        (
            ["--rollout.environment", "m:Room", "--rollout.max_episode_tokens", "9"],
            ["max_episode_tokens = 9 is below max_new_tokens = 1024", "the limit of one turn"],
        ),
        (
            ["--rollout.environment", "m:Room", "--rollout.overlong_buffer", "4097"],
            ["overlong_buffer = 4097 is above max_episode_tokens = 4096"],
        ),
        (
            ["--reward.name", "environment", "--rollout.tools", '["m:f"]'],
            ["reward.name = 'environment' needs rollout.environment", "choose another reward"],
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


def fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted key and the field of every setting."""
    for name, field in section.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        if sections := [kind for kind in kinds if issubclass(kind, BaseModel)]:
            yield from fields(sections[0], f"{prefix}{name}.{'x.' * (sections[0] is not field.annotation)}")
        else:
            yield prefix + name, field


FIELDS = dict(fields())
MAY_BE_EMPTY = {
    "model.path": "a conversion needs no path; a run refuses it by name",
    "model.reference_path": "model.path",
    "data.path": "a replay needs no data; a run refuses it by name",
    "data.image_column": "no images",
    "data.template": "no text around the prompt",
    "data.system_prompt": "no system message",
    "rollout.servers_file": "no file",
    "rollout.exchange_folder": "/dev/shm",
    "rollout.environment": "responses of one turn",
    "rollout.save_path": "save nothing",
    "rollout.replay_path": "no replay",
    "weight_sync.folder": "a folder in run_dir",
    "eval.folder": "the benchmarks of the hub",
    "log.wandb_project": "no logging to Weights & Biases",
}
"""Text that may be empty -> what that means."""
NO_PATHS = {
    *("data.split", "data.prompt_column", "data.answer_column", "data.image_column", "data.template"),
    *("data.system_prompt", "rollout.environment", "sglang.host", "reward.name", "algorithm.loss"),
    "log.wandb_project",
}


def tree(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def refusal(key: str, value: Any) -> str:
    """Return the error of the first field that ``key = value`` in a file breaks, or an empty text."""
    try:
        Config.model_validate(tree(key, value))
    except ValidationError as error:
        first = error.errors()[0]
        assert ".".join(map(str, first["loc"])).startswith(key)
        return first["msg"]
    return ""


FLOATS = [key for key, field in FIELDS.items() if "float" in str(field.annotation)]


def test_numbers_are_finite() -> None:
    """inf is allowed where the docstring says that it disables a limit. NaN is never a setting."""
    assert {"optimizer.lr", "algorithm.entropy_coef", "algorithm.clip_bounds"} <= set(FLOATS)
    for key in FLOATS:
        disables = "inf disables" in (FIELDS[key].description or "")
        for text in ("nan", "inf", "-inf"):
            values: list[Any] = [float(text), text]
            if "tuple" in str(FIELDS[key].annotation):
                values = [[float(text)] * 2, [text] * 2]
            for value in values:
                assert bool(refusal(key, value)) is not (disables and text == "inf"), (key, value)
    assert [key for key in FLOATS if "inf disables" in (FIELDS[key].description or "")] == [
        "collapse.grad_norm_factor",
        "collapse.reward_drop",
    ]


def test_true_and_false_are_no_numbers() -> None:
    """TOML has a type for bools; pydantic's default reads them as 1 and 0."""
    for key, field in FIELDS.items():
        if "bool" not in str(field.annotation) and "dict" not in str(field.annotation):
            assert refusal(key, True) == refusal(key, [False]) == "Input should not be true or false", key


TEXTS = [key for key, field in FIELDS.items() if field.annotation is str]


def test_empty_paths_and_names_are_refused() -> None:
    """Without the check, run_dir = "" writes checkpoints into the working directory."""
    assert "run_dir" in TEXTS
    empty = {key.replace("eval.sets.x", "data") for key in TEXTS if not refusal(key, "")}
    assert empty == MAY_BE_EMPTY.keys()
    for key in set(TEXTS) - MAY_BE_EMPTY.keys() - {f"eval.sets.x{key[4:]}" for key in MAY_BE_EMPTY}:
        assert refusal(key, " ") == "Input should not be empty"
    assert refusal("rollout.stop", [""])
    assert refusal("rollout.server_urls", [""])
    assert refusal("algorithm.advantage", "")
    assert refusal("data.files", [""])
    assert Config.model_validate(tree("rollout.stop", ["\n"])).rollout.stop == ("\n",)


def test_the_home_folder_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    for key in TEXTS:
        values = tree(key, "~/x")
        if key == "rollout.servers_file":
            values["rollout"]["engine"] = "sglang"
        found: Any = Config.model_validate(values)
        for part in key.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        is_path = key.replace("eval.sets.x", "data") not in NO_PATHS
        assert found == ("/home/ann/x" if is_path else "~/x"), key


@pytest.mark.parametrize("name", ["", "a/b", " "])
def test_names_of_benchmarks_are_names_of_files(name: str) -> None:
    with pytest.raises(ValidationError, match=r"empty|files are named after it"):
        Config.model_validate({"eval": {"sets": {name: {"path": "x"}}}})


def test_a_benchmark_is_known_by_its_name() -> None:
    named = {
        "math500": {},
        "gsm8k": {"max_prompts": 10},
        "aime24": {"path": "own.jsonl"},
        "own": {"path": "x"},
    }
    sets = Config.model_validate({"eval": {"sets": named}}).eval.sets
    # hub names, splits and columns as the data sets' pages have them
    assert (sets["math500"].path, sets["math500"].split) == ("HuggingFaceH4/MATH-500", "test")
    assert (sets["gsm8k"].path, sets["gsm8k"].split) == ("openai/gsm8k:main", "test")
    assert (sets["gsm8k"].prompt_column, sets["gsm8k"].max_prompts) == ("question", 10)
    assert "{prompt}" in sets["gsm8k"].template
    assert "\\boxed{{}}" in sets["gsm8k"].template
    assert (sets["aime24"].path, sets["aime24"].template) == ("own.jsonl", "")
    for name in BENCHMARKS:
        again = load_config([f"--eval.sets.{name}", "{}", "--eval.folder", "data"])
        assert (again.eval.sets[name].path, again.eval.sets[name].split) == (f"data/{name}.parquet", "train")
        saved = again.model_dump(mode="json", exclude_none=True)
        assert Config.model_validate(saved) == again


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_fit_into_the_generators(seed: int) -> None:
    """torch.manual_seed takes 64 bits; numpy's SeedSequence takes no negative number."""
    assert "Input should be" in refusal("seed", seed)


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
    rollout = {"old_logprobs": "rollout", "clip": "adaptive", "mask": "off_policy", "kl_coef": 0.1}
    for replay, minibatches in (("policy", 1), ("rollout", 4), ("none", 4)):
        algorithm = rollout | {"moe_routing_replay": replay}
        tree = {"train": {"minibatches_per_step": minibatches}, "rollout": {"routed_experts": True}}
        assert Config.model_validate(tree | {"algorithm": algorithm}).algorithm.old_logprobs == "rollout"
    saved = load_config(["--algorithm.moe_routing_replay", "rollout", "--rollout.replay_path", "rollouts"])
    assert saved.needs_rollout_routing
    assert not load_config(["--algorithm.moe_routing_replay", "policy"]).needs_rollout_routing


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], True),
        (["--model.dtype", "fp32"], False),
        (["--model.fp32_head", "false"], False),
        (["--rollout.engine", "sglang"], True),
        (["--rollout.engine", "sglang", "--rollout.server_urls", '["http://a:1"]'], False),
        (
            [
                *("--rollout.engine", "sglang", "--rollout.server_urls", '["http://a:1"]'),
                *("--model.fp32_head", "true"),
            ],
            True,
        ),
    ],
)
def test_logits_stay_in_fp32_where_the_engine_can_match(argv: list[str], expected: bool) -> None:
    assert load_config(argv).uses_fp32_head is expected


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


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/[mv]*/*.toml")), ids=lambda path: path.name)
def test_every_example_loads(path: Path) -> None:
    assert load_config([str(path)]) != Config()
    assert tomllib.loads(path.read_text())


def test_an_environment_is_the_reward_unless_one_is_set() -> None:
    episodes = {"environment": "household"}
    assert Config.model_validate({"rollout": episodes}).reward.name == "environment"
    assert Config.model_validate({"rollout": episodes, "reward": {"workers": 3}}).reward.name == "environment"
    assert Config.model_validate({"rollout": episodes, "reward": {"name": "math"}}).reward.name == "math"
    assert Config.model_validate({}).reward.name == "math"
