"""Bad input is refused before any work starts, with exit code 2 and one error line.

The line names the field and the remedy.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.data.prompts import load_tokenizer
from megatron_gmpo.data.stream import PromptStream
from megatron_gmpo.models.description import read_hf_config
from megatron_gmpo.models.identity import model_identity
from megatron_gmpo.testing.arithmetic import write_addition_problems
from megatron_gmpo.weights.run_checkpoint import write_state

from ..support.commands import CONFIG, OUR_TORCHRUN, ROOT, error_lines, last_of_report, options, run_module
from ..support.run_states import run_state

pytestmark = pytest.mark.distributed

Case = dict[str, Any]


def case(world_size: int = 1, **values: object) -> Case:
    return {"argv": options(**values), "env": {"WORLD_SIZE": str(world_size)}}


# description -> (options, pattern of the error line); {tmp} is the folder of the fixture ``folder``
CASES: dict[str, tuple[Case, str]] = {
    "unknown key": (
        case(optimizer__learning_rat=1),
        r"unknown config key 'optimizer\.learning_rat': did you mean '",
    ),
    "unknown megatron field": (
        case(megatron__moe_aux_loss_coef=0.1),
        r"'megatron\.moe_aux_loss_coef'.*'megatron\.moe_aux_loss_coeff'",
    ),
    "megatron field of a wrong type": (
        case(megatron__moe_router_force_load_balancing="Flase"),
        r"megatron\.moe_router_force_load_balancing = 'Flase': Input should be a valid boolean",
    ),
    "text for a number": (
        {"argv": ["--optimizer.lr", "1e-6x"], "env": {}},
        r"optimizer\.lr = '1e-6x': Input should be a valid number",
    ),
    "infinite learning rate": (case(optimizer__lr="inf"), r"optimizer\.lr = 'inf': .*finite number"),
    "no run folder": (
        {"argv": ["--run_dir", ""], "env": {}},
        r"run_dir = '': Input should not be empty",
    ),
    "fp8 without a GPU": (
        case(fp8__recipe="tensorwise", model__dtype="bf16"),
        r"fp8\.recipe = .tensorwise. needs an NVIDIA GPU",
    ),
    "world size": (
        case(world_size=3, parallel__pipeline_model_parallel_size=2),
        r"= 2 does not divide the world size 3",
    ),
    "expert world size": (
        case(world_size=2, parallel__expert_model_parallel_size=4),
        r"expert 4 .* = 4 does not divide the world size 2",
    ),
    "heads": (
        case(world_size=3, parallel__tensor_model_parallel_size=3),
        r"tensor_model_parallel_size = 3 does not divide num_attention_heads = 4: choose a divisor of 2",
    ),
    "key-value heads": (
        case(world_size=4, parallel__tensor_model_parallel_size=4),
        r"tensor_model_parallel_size = 4 does not divide num_key_value_heads = 2",
    ),
    "layers": (
        case(world_size=3, parallel__pipeline_model_parallel_size=3),
        r"pipeline_model_parallel_size.* = 3 does not divide num_layers = 2",
    ),
    "experts": (
        case(world_size=3, parallel__expert_model_parallel_size=3),
        r"expert_model_parallel_size = 3 does not divide num_experts = 8",
    ),
    "tensor parallel MoE without sequence parallel": (
        case(
            world_size=2,
            parallel__tensor_model_parallel_size=2,
            parallel__expert_model_parallel_size=2,
            parallel__sequence_parallel="false",
        ),
        r"parallel\.sequence_parallel = false .* MoE model: "
        r"Megatron requires sequence parallelism; set it to true",
    ),
    "tensor parallel experts left unreduced": (
        case(world_size=2, parallel__tensor_model_parallel_size=2),
        r"expert_tensor_parallel_size = 1 with tensor_model_parallel_size = 2 .*: "
        r"set expert_tensor_parallel_size = 2",
    ),
    "no config file": (
        {"argv": [], "env": {}},
        r"config file nowhere\.toml does not exist: give the path of a TOML file",
    ),
    "bad TOML": ({"argv": [], "env": {}}, r"config file .*broken\.toml cannot be read as TOML: .*line 2"),
    "no value": ({"argv": ["--train.num_steps"], "env": {}}, r"--train\.num_steps has no value"),
    "no model": (
        case(model__path="nowhere"),
        r"model\.path = 'nowhere' has no config\.json: give a Hugging Face model folder",
    ),
    "model family": (
        case(model__path="{tmp}/gpt2"),
        r"is a 'gpt2' model, a family without a table: use one of .*qwen3_moe",
    ),
    "tokenizer beyond the vocabulary": (
        case(model__path="{tmp}/larger_tokenizer"),
        r"the tokenizer gives '<pad2>' the number \d+, and vocab_size in config\.json is \d+: use the",
    ),
    "code in the model folder": (
        case(model__path="{tmp}/code"),
        r"config\.json names code of the folder to run \(auto_map: 'evil\.Config'\)",
    ),
    "link out of the model folder": (
        case(model__path="{tmp}/linked"),
        r"linked': 'vocab\.txt' is a link to '.*/broken\.toml', outside the folder: replace it by a copy",
    ),
    "two sets of weights": (
        case(model__path="{tmp}/two_sets"),
        r"two sets of weights, model\.safetensors and the files of .*: remove the older set",
    ),
    "no data file": (
        case(data__path="nowhere.jsonl"),
        r"data\.path = 'nowhere\.jsonl' does not exist: give a \.jsonl",
    ),
    "no column": (
        case(data__prompt_column="question"),
        r"data\.prompt_column = 'question' is not a column of .*choose one of",
    ),
    "no rows": (case(data__path="{tmp}/empty.jsonl"), r"data\.path = '.*empty\.jsonl' has no rows"),
    "no benchmark file": (
        case(eval__sets__heldout__path="nowhere.csv"),
        r"eval\.sets\.heldout\.path = 'nowhere\.csv' does not exist",
    ),
    "negative clip": (
        case(algorithm__clip_low=-0.2),
        r"algorithm\.clip_low = '-0\.2': .*greater than or equal to 0",
    ),
    "unknown loss": (
        case(algorithm__loss="gmp"),
        r"algorithm\.loss = 'gmp' is unknown: did you mean 'gmpo'\?",
    ),
    "unknown loss option": (
        case(algorithm__options__dual_clp=3.0),
        r"algorithm\.options\.dual_clp .*did you mean algorithm\.options\.dual_clip",
    ),
    "loss import": (
        case(algorithm__loss="tests.nowhere:loss"),
        r"algorithm\.loss = 'tests\.nowhere:loss' cannot be imported \(No module named 'tests\.nowhere'\)",
    ),
    "loss attribute": (
        case(algorithm__loss="tests.support.losses:nothing"),
        r"algorithm\.loss = 'tests\.support\.losses:nothing' cannot be imported \(.*no attribute 'nothing'",
    ),
    "loss signature": (
        case(algorithm__loss="tests.support.losses:with_many_parameters"),
        r"algorithm\.loss = .*: parameter 'old_logprobs' is not keyword-only: write def loss\(tokens, \*",
    ),
    "loss option of a wrong type": (
        case(algorithm__loss="tests.support.losses:scaled", algorithm__options__scale="big"),
        r"algorithm\.options\.scale = 'big': .*valid number",
    ),
    "loss without a column": (
        case(algorithm__loss="tests.support.losses:unmade"),
        r"needs the column 'temperature', which nothing makes: "
        r"choose one that the trainer makes, .*NewColumn",
    ),
    "unknown advantage": (
        case(algorithm__advantage="normalised"),
        r"algorithm\.advantage = 'normalised' is unknown: did you mean 'normalized'\?",
    ),
    "unknown reward": (
        case(reward__name="maths"),
        r"reward\.name = 'maths' is unknown: did you mean 'math'\?",
    ),
    "reward import": (
        case(reward__name="tests.nowhere:reward"),
        r"reward\.name = 'tests\.nowhere:reward' cannot be imported",
    ),
    "k above samples": (case(eval__k="[1, 8]"), r"eval: k = 8 needs samples_per_prompt >= 8, not 1"),
    "checkpoint of another model": (
        case(run_dir="{tmp}/other"),
        r"iter_0000007 is of another model \(hidden_size = 128, this run has 64\): choose another run_dir",
    ),
    "resume refused": (
        case(run_dir="{tmp}/same", checkpoint__resume="false"),
        r"run_dir = '.*same' already holds iter_0000007: "
        r"set checkpoint\.resume = true or choose another run_dir",
    ),
    "resume with other data": (
        case(run_dir="{tmp}/trained"),
        r"error: data has other prompts and other answers than the checkpoint's data: "
        r"resume with .*, or set data\.allow_changed = true",
    ),
    "position beyond the data": (
        case(run_dir="{tmp}/damaged"),
        r"iter_0000007 is damaged: state\.json has prompts = \{.*\} "
        r"\(position = 5 is beyond the 4 prompts\); "
        r"no older checkpoint is whole: restore the file, or use another run",
    ),
    "prompts beyond the positions": (
        case(rollout__max_new_tokens=2048, eval__max_new_tokens=8),
        r"rollout\.max_new_tokens = 2048: prompt train/\d+ of data has \d tokens, and a prompt and its "
        r"response can have 2048 together \(max_position_embeddings = 2048\): lower it",
    ),
    "benchmark beyond the positions": (
        case(eval__max_new_tokens=2047),
        r"eval\.max_new_tokens = 2047: prompt heldout/\d+ of eval\.sets\.heldout has \d tokens, and .* 2048 "
        r"together \(max_position_embeddings = 2048\): set eval\.sets\.heldout\.max_prompt_tokens = 1 or ",
    ),
    "an environment without a chat template": (
        case(rollout__environment="tests.support.games:Echo"),
        r"rollout\.environment and rollout\.tools need a chat template",
    ),
    "broken replay": (
        case(rollout__replay_path="{tmp}/rollouts", train__num_steps=2),
        r"rollout\.replay_path: .*step_000000\.jsonl has no groups",
    ),
    "no folder for the tokens": (
        case(rollout__exchange_folder="{tmp}/nowhere"),
        r"rollout\.exchange_folder = '.*nowhere' cannot be written \(No such file or directory\): choose",
    ),
    "negative seed": (case(seed=-7), r"seed = '-7': .*greater than or equal to 0"),
    "no replay": (
        case(rollout__replay_path="nowhere"),
        r"rollout\.replay_path = 'nowhere' has no groups for step 0, it has no steps at all: "
        r"save them with rollout\.save_path",
    ),
    "replay too short": (
        case(rollout__replay_path="{tmp}/rollouts", train__num_steps=3),
        r"has no groups for step 2, it has steps 0 to 1",
    ),
    "GPU": (case(device="cuda"), r"device = 'cuda', but this machine has no usable GPU: set device = 'cpu'"),
}
if os.path.exists("/dev/nvidia0"):
    del CASES["GPU"]


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, problems, and all invalid files that the cases name."""
    folder = tmp_path_factory.mktemp("bad")
    write_addition_problems(folder)
    model = tiny_model("qwen3_moe", num_layers=2)
    (folder / "model").symlink_to(model)
    (folder / "empty.jsonl").touch()
    (folder / "broken.toml").write_text("seed = 1\nrun_dir = runs/x\n")
    for name in ("larger_tokenizer", "code", "linked", "two_sets"):
        shutil.copytree(model, folder / name)
    tokenizer = load_tokenizer(str(model))
    tokenizer.add_tokens(["<pad2>"])
    tokenizer.save_pretrained(folder / "larger_tokenizer")
    config = json.loads((model / "config.json").read_text()) | {"auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "code" / "config.json").write_text(json.dumps(config))
    (folder / "linked" / "vocab.txt").symlink_to(folder / "broken.toml")
    shutil.copy(model / "model.safetensors", folder / "two_sets" / "model-1.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-1.safetensors"}}
    (folder / "two_sets" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "gpt2").mkdir()
    (folder / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folder / "rollouts").mkdir()
    for step in range(2):
        (folder / "rollouts" / f"step_{step:06d}.jsonl").touch()
    identity = model_identity(read_hf_config(str(model)), "fp32")
    prompts = [Prompt(str(i), answer=str(i), input_ids=[i]) for i in range(4)]
    stream = PromptStream(prompts, seed=1234, shuffle=True).state_dict()
    state = run_state(7, model=identity, prompts=stream)
    for name, changes in {
        "same": {},
        "other": {"model": identity | {"hidden_size": 128}},
        "trained": {},
        "damaged": {"prompts": stream | {"position": 5}},
    }.items():
        checkpoint = folder / name / "checkpoints" / "iter_0000007"
        checkpoint.mkdir(parents=True)
        write_state(checkpoint, state | changes)
        (checkpoint.parent / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


def arguments(name: str, folder: Path) -> list[str]:
    config = {"no config file": "nowhere.toml", "bad TOML": str(folder / "broken.toml")}.get(name, CONFIG)
    paths = options(
        run_dir=folder / "run",
        model__path=folder / "model",
        data__path=folder / "train.jsonl",
        data__max_prompts=4,
        eval__sets__heldout__path=folder / "heldout.jsonl",
        eval__sets__heldout__max_prompts=4,
    )
    return [config, *paths, *(argument.replace("{tmp}", str(folder)) for argument in CASES[name][0]["argv"])]


@pytest.fixture(scope="module")
def refusals(folder: Path) -> dict[str, dict[str, Any]]:
    """Run all cases in one process and return their results."""
    cases = [{"argv": arguments(name, folder), "env": CASES[name][0]["env"]} for name in CASES]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.refusals"],
        input=json.dumps(cases),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_with_one_line(
    name: str, refusals: dict[str, dict[str, Any]], folder: Path
) -> None:
    result = refusals[name]
    assert result["code"] == 2, result["stderr"]
    (line,) = error_lines(result["stderr"])
    assert re.search(CASES[name][1], line), line
    assert result["stderr"].splitlines()[-1] == line
    assert "Traceback" not in result["stderr"]
    assert not (folder / "run").exists()


@pytest.mark.parametrize("name", ["unknown key", "bad TOML"])
def test_the_command_itself_exits_with_code_2(name: str, folder: Path) -> None:
    done = run_module("megatron_gmpo.train", *arguments(name, folder), fresh=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == error_lines(done.stderr)
    assert re.search(CASES[name][1], done.stderr)


def test_evaluate_wants_a_benchmark(folder: Path) -> None:
    done = run_module(
        "megatron_gmpo.evaluate", *options(model__path=folder / "model", run_dir=folder / "run")
    )
    assert done.returncode == 2
    assert error_lines(done.stderr) == [
        "error: eval.sets is empty: name a benchmark, e.g. --eval.sets.math500 {} or "
        "--eval.sets.mine.path problems.parquet"
    ]


def test_plot_metrics_wants_a_run(tmp_path: Path) -> None:
    done = run_module("tools.plot_metrics", tmp_path / "nowhere")
    assert done.returncode == 2
    (line,) = error_lines(done.stderr)
    assert "nowhere/metrics.jsonl does not exist: give the folder of a run" in line
    assert "Traceback" not in done.stderr


def test_under_torchrun_one_rank_speaks_for_all(folder: Path) -> None:
    done = run_module("megatron_gmpo.train", *arguments("unknown loss", folder), ranks=2)
    assert done.returncode != 0
    (line,) = error_lines(done.stderr)
    assert "algorithm.loss = 'gmp' is unknown" in line
    assert done.stdout == ""
    assert done.stderr.startswith(line)  # before it nothing, after it only torchrun's own report
    assert last_of_report(done.stderr) == line


@pytest.mark.parametrize("ranks", [1, 2])
def test_under_our_torchrun_the_line_is_the_last(ranks: int, folder: Path) -> None:
    argv = arguments("unknown loss", folder)
    done = run_module("megatron_gmpo.train", *argv, ranks=ranks, launcher=OUR_TORCHRUN)
    assert done.returncode == 2
    (line,) = error_lines(done.stderr)
    assert "algorithm.loss = 'gmp' is unknown" in line
    assert done.stderr == f"{line}\n"


def test_trouble_of_one_rank_alone_is_not_silent(folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    argv = [*arguments("unknown loss", folder), *options(run_dir=run_dir, algorithm__loss="gmpo")]
    done = run_module(
        "megatron_gmpo.train",
        *argv,
        *options(reward__name="tests.support.rewards:broken_on_rank_1", train__num_steps=1),
        ranks=2,
    )
    assert done.returncode != 0
    (line,) = error_lines(done.stderr)
    assert re.search(r"reward\.name = .* returned None for .*: return a finite number", line)


def test_an_episode_beyond_the_positions(text_model: Path, tmp_path: Path) -> None:
    """The model has 2048 positions, and an episode 4 * 512 tokens."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"problem": "Go.", "answer": "go"}) + "\n")
    argv = options(
        run_dir=tmp_path / "run",
        model__path=text_model,
        data__path=problems,
        eval__sets="{}",
        rollout__environment="tests.support.games:Echo",
        rollout__max_new_tokens=512,
    )
    done = run_module("megatron_gmpo.train", CONFIG, *argv)
    assert done.returncode == 2
    (line,) = error_lines(done.stderr)
    assert line.startswith("error: rollout.max_episode_tokens = 2048: prompt problems/0 of data has ")
