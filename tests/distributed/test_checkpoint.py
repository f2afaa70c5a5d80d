"""Resuming is bit-exact in the same layout and exact up to rounding in another; kills lose no checkpoint."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.config import Config
from megatron_gmpo.errors import InputError
from megatron_gmpo.testing.tiny_tokenizers import text_tokenizer
from megatron_gmpo.weights.pickles import read_metadata
from megatron_gmpo.weights.run_checkpoint import checkpoint_before, full_damage, read_state

from ..support import cases, conversion_cases, reference
from ..support.batches import split
from ..support.ranks import RankPool
from ..support.run_states import newest
from .test_layouts import CP, EP, ETP, PP, TP, VPP, config, make_batch

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]

Layout = tuple[int, dict[str, int], bool]
LAYOUTS: dict[str, Layout] = {
    "one rank": (1, {}, False),
    "dp2": (2, {}, False),
    "dp2 distributed optimizer": (2, {}, True),
    "pp2": (2, {PP: 2}, False),
    "tp2 pp2": (4, {TP: 2, PP: 2}, True),
    "ep2": (2, {EP: 2}, False),
    "ep2 distributed optimizer": (2, {EP: 2}, True),
    "tp2 ep2": (2, {TP: 2, EP: 2}, False),
    "tp2 etp2": (2, {TP: 2, ETP: 2}, True),
    "pp2 cp2": (4, {PP: 2, CP: 2}, False),
    "pp2 vpp2 ep2": (4, {PP: 2, VPP: 2, EP: 2}, True),
    "dp2 tp2 ep2": (4, {TP: 2, EP: 2}, True),
    "dp4 ep2": (4, {EP: 2}, True),
    "dp4 ep2 without": (4, {EP: 2}, False),
}


def make_config(layout: str, path: Path, dtype: str = "fp32") -> tuple[int, Config]:
    world_size, parallel, distributed = LAYOUTS[layout]
    optimizer = {
        "use_distributed_optimizer": distributed,
        "lr_schedule": "linear",
        "lr_warmup_steps": 3,
        "weight_decay": 0.1,
    }
    changes: dict[str, Any] = {"optimizer": optimizer, "model": {"dtype": dtype}, "train": {"num_steps": 8}}
    return world_size, config(path, parallel, max_tokens=64, **changes)


@pytest.fixture(scope="session")
def model_of(tiny_model: Callable[..., Path]) -> Callable[[str], Path]:
    """Return a function that makes a model folder by name: a family, or a family and ``tied``.

    A tied model shares embeddings and output weights.
    """
    tokenizer = text_tokenizer()

    def make(name: str) -> Path:
        family, _, tied = name.partition(" ")
        options = {
            "hidden_size": 32,
            "ffn_hidden_size": 32,
            "head_dim": 16,
            "num_experts": 4,
            "tie_word_embeddings": bool(tied),
        }
        return tiny_model(family, tokenizer=tokenizer, **options)

    return make


def replayed(path: Path) -> TrainBatch:
    batch = make_batch()
    batch.old_logprobs = reference.batch_logprobs(path, batch).float()
    return batch


@pytest.fixture(scope="session")
def straight_runs(
    model_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Return a function that runs four steps in a layout and saves after the second.

    It returns the folder of the run and rank 0's result; equal calls share one run.
    """
    done: dict[tuple[str, str, str], tuple[Path, dict[str, Any]]] = {}

    def make(ranks: RankPool, *key: str) -> tuple[Path, dict[str, Any]]:
        if key not in done:
            model, layout, dtype = key
            path = model_of(model)
            world_size, cfg = make_config(layout, path, dtype)
            folder = tmp_path_factory.mktemp("run")
            done[key] = folder, ranks.run(world_size, cases.run_on, cfg, replayed(path), folder, 0, 4, [2])[0]
        return done[key]

    return make


@pytest.mark.parametrize(
    ("model", "dtype", "saved_in", "loaded_in"),
    [
        ("qwen3", "fp32", "one rank", "one rank"),
        ("qwen3", "fp32", "one rank", "tp2 pp2"),
        ("qwen3", "bf16", "tp2 pp2", "tp2 pp2"),
        ("qwen3 tied", "fp32", "pp2", "pp2"),
        ("qwen3 tied", "fp32", "pp2", "one rank"),
        ("qwen3_moe", "fp32", "one rank", "ep2"),
        ("qwen3_moe", "fp32", "one rank", "dp2 distributed optimizer"),
        ("qwen3_moe", "fp32", "dp2 distributed optimizer", "dp2"),
        ("qwen3_moe", "fp32", "tp2 ep2", "tp2 ep2"),
        ("qwen3_moe", "fp32", "tp2 ep2", "pp2 cp2"),
        ("qwen3_moe", "fp32", "ep2 distributed optimizer", "ep2 distributed optimizer"),
        ("qwen3_moe", "fp32", "ep2 distributed optimizer", "one rank"),
        ("qwen3_moe", "fp32", "pp2 vpp2 ep2", "pp2 vpp2 ep2"),
        ("qwen3_moe", "fp32", "pp2 vpp2 ep2", "tp2 etp2"),
        ("qwen3_moe", "bf16", "dp2 tp2 ep2", "dp2 tp2 ep2"),
        ("qwen3_moe", "bf16", "ep2 distributed optimizer", "ep2 distributed optimizer"),
        ("qwen3_moe", "bf16", "ep2 distributed optimizer", "ep2"),
        ("deepseek_v3", "fp32", "tp2 ep2", "pp2 cp2"),
        ("glm4_moe", "bf16", "dp2 tp2 ep2", "dp2 tp2 ep2"),
        ("qwen2_moe", "fp32", "tp2 ep2", "pp2"),
    ],
)
def test_two_steps_and_two_after_resuming_are_four_steps(
    ranks: RankPool,
    straight_runs: Callable[..., tuple[Path, dict[str, Any]]],
    model_of: Callable[[str], Path],
    model: str,
    dtype: str,
    saved_in: str,
    loaded_in: str,
) -> None:
    folder, straight = straight_runs(ranks, model, saved_in, dtype)
    path = model_of(model)
    world_size, cfg = make_config(loaded_in, path, dtype)
    resumed = ranks.run(world_size, cases.run_on, cfg, replayed(path), folder, 2, 4, [])[0]
    assert resumed["weights"].keys() == straight["weights"].keys()
    if saved_in == loaded_in:
        assert resumed["history"] == straight["history"][2:]
        for name, tensor in straight["weights"].items():
            assert torch.equal(resumed["weights"][name], tensor), name
        return
    tolerance = {"fp32": 1e-5, "bf16": 2e-3}[dtype]
    for name in ("loss", "grad_norm", "learning_rate"):
        wanted = [step[name] for step in straight["history"][2:]]
        assert [step[name] for step in resumed["history"]] == pytest.approx(
            wanted, rel=tolerance, abs=tolerance
        ), name
    assert distance(resumed["weights"], straight["weights"], reference.saved_tensors(path)) < 10 * tolerance


def distance(weights: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Return |weights - expected| relative to the distance that training moved from ``start``."""
    off = sum((weights[name].double() - tensor.double()).square().sum() for name, tensor in expected.items())
    moved = sum((start[name].double() - tensor.double()).square().sum() for name, tensor in expected.items())
    return float((off / moved) ** 0.5)


def test_saving_leaves_the_run_as_it_was(
    ranks: RankPool, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    path = model_of("qwen3_moe")
    world_size, cfg = make_config("ep2 distributed optimizer", path, "bf16")
    saving, plain = (
        ranks.run(world_size, cases.run_on, cfg, replayed(path), tmp_path, 0, 3, saves)[0]
        for saves in ([1, 2], [])
    )
    assert saving["history"] == plain["history"]
    for name, tensor in plain["weights"].items():
        assert torch.equal(saving["weights"][name], tensor), name


def test_saving_before_the_first_step(
    ranks: RankPool, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    path = model_of("qwen3")
    for layout in ("one rank", "dp2 distributed optimizer"):
        world_size, cfg = make_config(layout, path)
        fresh, after = (
            ranks.run(world_size, cases.steps_after_saving, cfg, replayed(path), tmp_path, save)[0]
            for save in (False, True)
        )
        assert fresh == after


def test_every_generator_goes_on_where_it_was(
    ranks: RankPool, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    world_size, cfg = make_config("tp2 ep2", model_of("qwen3_moe"))
    numbers = ranks.run(world_size, cases.random_numbers, cfg, tmp_path)
    for before, again in numbers:
        assert again == before
    assert numbers[0] != numbers[1]  # ranks have different generators


@pytest.mark.parametrize(
    ("model", "layout", "dtype"),
    [("qwen3_moe", "dp2 tp2 ep2", "bf16"), ("qwen3_moe", "dp4 ep2", "bf16"), ("qwen3", "one rank", "fp32")],
)
def test_a_save_in_the_background_is_one_of_its_step(
    ranks: RankPool, model_of: Callable[[str], Path], tmp_path: Path, model: str, layout: str, dtype: str
) -> None:
    path = model_of(model)
    world_size, cfg = make_config(layout, path, dtype)
    both = ranks.run(world_size, cases.save_both_ways, cfg, replayed(path), tmp_path, tmp_path / "go")
    at_once, background = (tmp_path / name / "iter_0000002" for name in ("at_once", "background"))
    # .metadata holds a random number of torch's; state.json the checksum of .metadata
    names = {str(file.relative_to(at_once)) for file in at_once.rglob("*") if file.is_file()}
    assert {"__0_0.distcp", "random/rank_00000.safetensors", "common.pt"} <= names
    for name in names - {".metadata", "state.json"}:
        assert (background / name).read_bytes() == (at_once / name).read_bytes(), name
    states = [json.loads((checkpoint / "state.json").read_text()) for checkpoint in (at_once, background)]
    for state in states:
        del state["checksum"], state["files"][".metadata"]
    assert states[0] == states[1]
    assert states[0]["clip"] == {"low": 2, "high": 1}
    assert ranks.run(world_size, full_damage, background) == [""] * world_size

    # the older checkpoint stays until the new one is complete
    assert all(result["stored"] == ["iter_0000001"] for result in both)
    assert [file.name for file in (tmp_path / "background").glob("iter_*")] == ["iter_0000002"]

    plain = ranks.run(world_size, cases.run_on, cfg, replayed(path), tmp_path, 0, 4, [])[0]
    assert both[0]["history"] == plain["history"]

    # one copy of what the rank writes, and one tensor at a time in fp32 and as it is written
    largest = 4 * max(tensor.numel() for tensor in reference.saved_tensors(path).values())
    for rank, result in enumerate(both):
        mine = [background / f"__{rank}_0.distcp", background / "random" / f"rank_{rank:05d}.safetensors"]
        assert result["held"] == sum(file.stat().st_size for file in mine)
        if world_size == 1:  # on more ranks, small tensors are less than the plan that rank 0 gathers
            assert result["peak"] <= 3 * largest < result["held"] / 3


@pytest.mark.parametrize("layout", ["dp4 ep2", "dp4 ep2 without"])
def test_writers_are_spread_over_the_replicas(
    ranks: RankPool, model_of: Callable[[str], Path], tmp_path: Path, layout: str
) -> None:
    """Two expert-parallel ranks, twice: the nodes of ranks 0 and 1, and of ranks 2 and 3.

    Everything is in both nodes, except main weights and moments, which the distributed optimizer spreads.
    Before, ranks 0 and 1 wrote all experts and rank 0 everything else.
    """
    path = model_of("qwen3_moe")
    world_size, cfg = make_config(layout, path, "bf16")
    ranks.run(world_size, cases.run_on, cfg, replayed(path), tmp_path, 0, 1, [1])
    shares: dict[str, list[int]] = {"all": [0] * world_size, "experts": [0] * world_size}
    for index, place in read_metadata(tmp_path / "iter_0000001" / ".metadata").storage_data.items():
        rank = int(place.relative_path.split("_")[2])
        shares["all"][rank] += place.length
        shares["experts"][rank] += place.length * (".experts." in index.fqn)
    for name, share in shares.items():
        assert max(share) < 1.1 * sum(share) / world_size, (name, share)
        assert sum(share[2:]) == pytest.approx(sum(share) / 2, rel=0.05), (name, share)


def test_megatron_alone_reads_a_checkpoint(
    ranks: RankPool,
    straight_runs: Callable[..., tuple[Path, dict[str, Any]]],
    model_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    path = model_of("qwen3_moe")
    for layout in ("tp2 ep2", "pp2 vpp2 ep2"):
        world_size, cfg = make_config(layout, path)
        at_two = ranks.run(world_size, cases.run_on, cfg, replayed(path), tmp_path / layout, 0, 2, [2])[0]
        checkpoint = newest(tmp_path / layout)
        saved, names, weights = ranks.run(
            1, cases.load_with_megatron_alone, make_config("one rank", path)[1], checkpoint
        )[0]
        moments = {f"optimizer.{moment}.{name}" for name in names for moment in ("exp_avg", "exp_avg_sq")}
        assert "embedding.word_embeddings.weight" in names
        assert saved == names | moments
        for name, tensor in at_two["weights"].items():
            assert torch.equal(weights[name], tensor), name


def test_another_model_or_precision_is_refused(
    ranks: RankPool,
    straight_runs: Callable[..., tuple[Path, dict[str, Any]]],
    model_of: Callable[[str], Path],
) -> None:
    folder, _ = straight_runs(ranks, "qwen3", "one rank", "fp32")
    others = {"qwen3 tied": "tie_word_embeddings = False", "qwen3_moe": "model_type = 'qwen3'"}
    for model, named in others.items():
        for message in ranks.run(2, cases.refused_resume, make_config("dp2", model_of(model))[1], folder):
            assert "of another model" in message
            assert named in message
    (message,) = ranks.run(
        1, cases.refused_resume, make_config("one rank", model_of("qwen3"), "bf16")[1], folder
    )
    assert "dtype = 'fp32'" in message


def test_which_checkpoints_stay(ranks: RankPool, model_of: Callable[[str], Path], tmp_path: Path) -> None:
    path = model_of("qwen3")
    world_size, cfg = make_config("dp2", path)
    batch = split(replayed(path), 5)[0]

    def folders() -> list[str]:
        # a thread may still remove an old checkpoint, under another name
        return sorted(
            item.name
            for item in tmp_path.iterdir()
            if item.name != "hf" and not item.name.endswith(".removed")
        )

    latest = "latest_checkpointed_iteration.txt"
    ranks.run(world_size, cases.run_on, cfg, batch, tmp_path, 0, 4, [1, 2, 3, 4], 2)
    assert folders() == ["iter_0000003", "iter_0000004", latest]
    assert newest(tmp_path) == tmp_path / "iter_0000004"

    # Point to step 3, like a kill between the rename and the text file, and add the leftovers of a killed
    # save.
    (tmp_path / latest).write_text("3")
    shutil.copytree(tmp_path / "iter_0000004", tmp_path / "iter_0000006")
    (tmp_path / ".partial_iter_0000009").mkdir()
    (tmp_path / ".partial_iter_0000009" / "__0_0.distcp").touch()
    ranks.run(world_size, cases.run_on, cfg, batch, tmp_path, 3, 7, [5, 7], 2)
    assert folders() == ["iter_0000005", "iter_0000007", latest]
    assert newest(tmp_path) == tmp_path / "iter_0000007"
    assert read_state(tmp_path / "iter_0000007").step == 7

    with next((tmp_path / "iter_0000007").glob("*.distcp")).open("r+b") as file:
        file.write(bytes(8))
    assert ranks.run(2, checkpoint_before, tmp_path, 8, True) == [tmp_path / "iter_0000005"] * 2
    assert ranks.run(2, checkpoint_before, tmp_path, 8, False) == [tmp_path / "iter_0000007"] * 2

    shutil.rmtree(tmp_path / "iter_0000007")
    with pytest.raises(InputError, match="iter_0000007"):
        newest(tmp_path)
    assert newest(tmp_path / "nowhere") is None


def forget_checksums(checkpoint: Path) -> None:
    """Turn a checkpoint into one of an older version."""
    state = json.loads((checkpoint / "state.json").read_text())
    del state["files"], state["checksum"]
    (checkpoint / "state.json").write_text(json.dumps(state))


def test_code_in_a_checkpoint_is_refused_before_it_runs(
    ranks: RankPool,
    straight_runs: Callable[..., tuple[Path, dict[str, Any]]],
    model_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Each file that Megatron unpickles has code in turn. Checksums do not tell: anyone can write them."""
    path, evil = model_of("qwen3_moe"), tmp_path / "evil"
    _, cfg = make_config("one rank", path)
    ranks.run(1, cases.run_on, cfg, replayed(path), tmp_path / "run", 0, 1, [1])

    def in_metadata(checkpoint: Path) -> None:
        (checkpoint / ".metadata").write_bytes(pickle.dumps(conversion_cases.Evil(evil)))

    def in_common(checkpoint: Path) -> None:
        torch.save({"args": conversion_cases.Evil(evil)}, checkpoint / "common.pt")

    def in_extra_state(checkpoint: Path) -> None:
        stored = pickle.loads((checkpoint / ".metadata").read_bytes()).storage_data
        place = next(place for index, place in stored.items() if "_extra_state" in index.fqn)
        code = io.BytesIO()
        torch.save([conversion_cases.Evil(evil)], code, _use_new_zipfile_serialization=False)
        assert len(code.getvalue()) <= place.length
        with (checkpoint / place.relative_path).open("r+b") as file:
            file.seek(place.offset)
            file.write(code.getvalue())

    for put in (in_metadata, in_common, in_extra_state):
        run = tmp_path / put.__name__
        shutil.copytree(tmp_path / "run", run)
        put(run / "iter_0000001")
        forget_checksums(run / "iter_0000001")
        for load in (cases.refused_resume, cases.refused_weights):
            (line,) = ranks.run(1, load, cfg, run)
            assert str(run / "iter_0000001") in line
            assert "cannot be trusted or read (it asks for " in line, line
            assert "\n" not in line
        assert not evil.exists()


def test_a_damaged_checkpoint_without_checksums_is_one_line(
    ranks: RankPool, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Checkpoints of older versions have none, and ``checkpoint.verify`` may be false."""
    path = model_of("qwen3")
    _, cfg = make_config("one rank", path)
    ranks.run(1, cases.run_on, cfg, replayed(path), tmp_path / "run", 0, 1, [1])
    for name in (".metadata", "metadata.json", "common.pt", "__0_0.distcp", "random/rank_00000.safetensors"):
        for content in (None, b"", 20):
            run = tmp_path / f"{name.replace('/', '_')}_{content}"
            shutil.copytree(tmp_path / "run", run)
            file = run / "iter_0000001" / name
            whole = file.read_bytes()
            file.unlink()
            if content is not None:
                file.write_bytes(whole[:content] if isinstance(content, int) else content)
            forget_checksums(run / "iter_0000001")
            (line,) = ranks.run(1, cases.refused_resume, cfg, run)
            assert str(run / "iter_0000001") in line, (name, content)
            assert "\n" not in line


@pytest.mark.parametrize(("mode", "killed"), [([], 9), (["background"], 29)], ids=["at once", "background"])
def test_a_kill_while_saving_loses_nothing_older(
    model_of: Callable[[str], Path], tmp_path: Path, mode: list[str], killed: int
) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.support.saver",
        str(model_of("qwen3")),
        str(tmp_path / "run"),
        "0",
        *mode,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lives = [line.split() for line in done.stdout.splitlines()]
    assert len(lives) == killed + 1
    for life, after in itertools.pairwise(lives):
        assert life[0] == "loaded"
        steps = [int(word) for word in life[1::2]]
        assert len(steps) > 2
        # no reported checkpoint is lost; the interrupted one may be complete
        assert steps[-1] <= int(after[1]) <= steps[-1] + 1
    assert len(list((tmp_path / "run").glob(".partial_iter_*"))) <= 1
