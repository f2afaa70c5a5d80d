"""The data of ``megatron-gmpo view``, its server, and the records of tokens.

tests/integration/test_view_page.py opens the page in a browser.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import os
import re
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.commands import view
from megatron_gmpo.errors import InputError
from megatron_gmpo.metrics import token_records
from megatron_gmpo.metrics.logger import MetricLogger
from megatron_gmpo.metrics.token_records import Record, choose, remove_after, write_records
from megatron_gmpo.rollout.replay import append_transcripts
from megatron_gmpo.view import curves
from megatron_gmpo.view.answers import answer, to_json
from megatron_gmpo.view.curves import Metrics, thinned
from megatron_gmpo.view.folder import RunFolder, named_runs
from megatron_gmpo.view.page import export
from megatron_gmpo.view.samples import explain
from megatron_gmpo.view.server import make_app
from megatron_gmpo.view.tokens import recorded_steps, summary

from ..support.view_runs import MARKUP, add_pictures, write_run

TOKEN = "a-token"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "made", 30)


def ask(folder: Path, path: str, **query: str) -> Any:
    return json.loads(to_json(answer([RunFolder(folder, "run")], path, query)))


# curves


@settings(max_examples=40)
@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=5000))
def test_a_thinned_curve_keeps_ends_and_extremes(values: list[int]) -> None:
    kept = thinned(np.array(values, float))
    assert len(kept) <= curves.POINTS + 2
    assert (np.diff(kept) > 0).all()
    assert {kept[0], kept[-1]} == {0, len(values) - 1}
    shown = [values[i] for i in kept]
    assert (min(shown), max(shown)) == (min(values), max(values))


def test_metrics_are_read_on_and_read_again_after_a_rollback(tmp_path: Path) -> None:
    logger = MetricLogger(tmp_path, tensorboard=False)
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.refresh()
    assert metrics.series(0, 99) == {}
    for step in range(1, 5):
        logger.log(step, {"loss": float(step), "not/shown": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    metrics.refresh()
    assert {name: (x.tolist(), y.tolist()) for name, (x, y) in metrics.series(2, 3).items()} == {
        "loss": ([2, 3], [2.0, 3.0])
    }
    logger.rewind(2)
    logger.log(3, {"loss": 30.0, "grad_norm": 1.0})
    metrics.refresh()
    assert metrics.series(0, 99)["loss"][1].tolist() == [1.0, 2.0, 30.0]
    assert metrics.series(0, 99)["grad_norm"][0].tolist() == [3]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 31}\nnot JSON\n[1]\n{"step": "x"}\n{"step": 4, "loss": "x"}\n')
    metrics.refresh()
    assert metrics.series(0, 99)["loss"][1].tolist() == [1.0, 2.0, 31.0]
    assert metrics.unreadable == 3


def test_the_parts_of_a_step_share_their_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacking adds the parts of one step, so that a thinned part must not lack a step of the others."""
    monkeypatch.setattr(curves, "POINTS", 10)  # a few steps are then thinned
    found = ask(folder, "curves")
    parts = {name: part["x"] for name, part in found["runs"][0].items() if name.startswith("time/")}
    assert len(parts) == 5
    assert len({tuple(x) for x in parts.values()}) == 1
    assert len(parts["time/step"]) <= 12
    (panel,) = (panel for panel in found["panels"] if panel["kind"] == "stack")
    assert "time/step" not in panel["metrics"]


def test_steps_and_intervals(folder: Path) -> None:
    found = ask(folder, "curves", first="5", last="20")["runs"][0]
    assert found["reward/mean"]["x"] == list(range(5, 21))
    at_10 = found["eval/math500/pass@1"]
    assert at_10["x"] == [10, 20]
    # the interval that the run has logged, see tests/support/view_runs.py
    assert at_10["low"] == pytest.approx([y - 0.0625 for y in at_10["y"]])
    assert at_10["high"] == pytest.approx([y + 0.03125 for y in at_10["y"]])


def test_the_success_of_an_evaluation_has_a_panel_and_its_interval(tmp_path: Path) -> None:
    figures = {"eval/unseen/success": 0.5, "eval/unseen/ci_low@success": 0.25}
    figures |= {"eval/unseen/ci_high@success": 0.75, "eval/unseen/pass@1": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 4} | figures) + "\n")
    found = ask(tmp_path, "curves")
    panels = {panel["title"]: list(panel["metrics"]) for panel in found["panels"]}
    assert panels == {
        "Evaluation, pass@k": ["eval/unseen/pass@1"],
        "Successful episodes of an evaluation, fraction": ["eval/unseen/success"],
    }
    points = found["runs"][0]["eval/unseen/success"]
    assert points == {"x": [4], "y": [0.5], "low": [0.25], "high": [0.75]}


# samples


def test_groups_of_a_step(folder: Path) -> None:
    state = ask(folder, "state")[0]
    assert state["samples"] == [28, 29, 30]
    one, other = ask(folder, "samples/0/29")
    assert [sample["over_mean"] for sample in one["samples"]] == [-0.5, 0.5, -0.5, 0.5]
    assert [sample["extracted"] for sample in one["samples"]] == ["41", "42", "41", "42"]
    assert one["samples"][0]["why"] == "The answer differs from the truth."
    assert one["samples"][1]["why"] == "The answer equals the truth."
    assert other["prompt"].endswith(MARKUP)
    assert ask(folder, "samples/0/7") == []


@pytest.mark.parametrize(
    ("reward", "sample", "extracted", "why"),
    [
        ("math", {"text": "hm", "reward": 0.0, "finish_reason": "length"}, None, "The response reached"),
        ("math", {"text": "so 42", "reward": 0.0}, "42", "but the reward is not positive"),
        ("arithmetic", {"text": " 42 ", "reward": 1.0, "finish_reason": "stop"}, "42", "equals"),
        ("my:reward", {"text": "x", "reward": 0.25}, None, "my:reward gave 0.25 and states no reason."),
        ("environment", {"text": "x", "reward": 0.25, "episode": {"ended": "done"}}, None,
         "The rewards of the steps sum up to 0.25. The environment ended the episode."),
        ("math", {"text": "42", "reward": 1.0, "finish_reason": "length", "episode": {"ended": "turns"}},
         "42", "The answer equals the truth. The episode reached the limit of turns."),
        ("math", {"text": "42", "reward": 0.0, "episode": {"ended": "tokens"}}, "42", "the limit of tokens."),
        ("my:reward", {"text": "", "reward": 0.0, "episode": {"ended": "error"}}, None,
         "The environment failed."),
    ],
)  # fmt: skip
def test_why_a_response_got_its_reward(
    reward: str, sample: dict[str, Any], extracted: str | None, why: str
) -> None:
    found, reason = explain(reward, "42", sample)
    assert found == extracted
    assert why in reason


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("6*7", "The expression reaches the target with every number."),
        ("6+7", "The value is 13, not 42."),
        ("42", "The numbers are [42], not [6, 7]."),
        ("6*7/0", "The expression divides by zero."),
        ("6*(7", "The expression cannot be read."),
        ("six", "The answer is not an expression of numbers, + - * / and parentheses."),
    ],
)
def test_why_a_countdown_failed(answer: str, why: str) -> None:
    sample = {"text": f"so <answer> {answer} </answer>", "reward": float(answer == "6*7")}
    assert explain("countdown", "6,7=42", sample) == (answer, why)


def test_images_come_from_the_folder_of_images_alone(tmp_path: Path) -> None:
    """An image is named by its digest, and its type is what its content says."""
    folder, outside = tmp_path / "run", tmp_path / "outside.png"
    folder.mkdir()
    names = add_pictures(folder, 1)
    found = ask(folder, f"images/0/{names[0]}")
    start, _, content = found.partition(",")
    assert start == "data:image/png;base64"
    assert base64.b64decode(content) == (folder / "images" / names[0]).read_bytes()
    page = export([RunFolder(folder, "run")])
    assert all(f"images/0/{name}" in page for name in names)
    digest = "0" * 32
    outside.write_bytes(base64.b64decode(content))
    (folder / "images" / f"{digest}.png").symlink_to(outside)
    (folder / "images" / f"{digest}.gif").write_text("<svg onload=alert(1)>")
    (folder / "images" / f"{digest}.webp").write_bytes(b"\xff\xd8\xff" + bytes(9 * 2**20))
    (folder / "images" / f"{digest}.jpg").write_bytes(b"GIF89a")
    (folder / "images" / f"{digest}.bmp").mkdir()
    os.mkfifo(folder / "images" / f"{digest}.tiff")
    (folder / names[0]).write_bytes(b"\x89PNG\r\n\x1a\n")
    assert ask(folder, f"images/0/{digest}.jpg") == "data:image/gif;base64,R0lGODlh"
    for name in (
        *(f"{digest}.{suffix}" for suffix in ("png", "gif", "webp", "bmp", "tiff")),
        f"../{names[0]}",
        f"..%2F{names[0]}",
        "../config.toml",
        names[0].upper(),
        f"{names[0]}\n",
        "",
    ):
        with pytest.raises(LookupError):
            ask(folder, f"images/0/{name}")
    with pytest.raises(LookupError):
        ask(folder, f"images/1/{names[0]}")


def test_a_damaged_list_of_images_spoils_no_other_group(tmp_path: Path) -> None:
    add_pictures(tmp_path, 1)
    file = tmp_path / "transcripts.jsonl"
    first, second = file.read_text().splitlines()
    file.write_text(json.dumps(json.loads(first) | {"images": 7}) + "\n" + second + "\n")
    damaged, whole = ask(tmp_path, "samples/0/1")
    assert "is damaged" in damaged["problem"]
    assert len(whole["images"]) == 1
    assert "images/0/" in export([RunFolder(tmp_path, "run")])


@pytest.mark.slow
def test_long_files_are_not_held_in_memory(tmp_path: Path) -> None:
    """30 MB of transcripts and 2000 steps take less memory than a fifth of the files' size."""
    write_run(tmp_path, 2000)
    sample = Sample.from_response(
        [1], [2], [0.0], text="word " * 20_000, finish_reason="stop", policy_version=0
    )
    group = SampleGroup(Prompt("p", "1", "q"), [sample])
    for step in range(300):
        append_transcripts(tmp_path / "transcripts.jsonl", step, {0: group}, 1)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.jsonl"))
    assert size > 30e6
    tracemalloc.start()
    try:
        for path in ("state", "curves", "samples/0/200"):
            to_json(answer([RunFolder(tmp_path, "run")], path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 5


# tokens


def record(log_ratio: list[float], advantage: float = 1.0, **fields: Any) -> Record:
    deltas = np.array(log_ratio, np.float32)
    given = {"prompt_id": "p", "index": 0, "prompt": "q", "chosen": "random", "reward": 1.0}
    given |= {
        "advantage": advantage,
        "sequence_ratio": 1.1,
        "ids": np.arange(len(deltas)),
        "log_ratio": deltas,
    }
    given |= {"text": [f"t{i}" for i in range(len(deltas))], "clipped": deltas > 0.4}
    return Record(**given | fields)


def test_a_record_survives_its_file() -> None:
    written = record(
        [0.1, 0.5],
        entropy=np.array([1.25, 0.5], np.float32),
        layers_rerouted=np.array([3, 0]),
        text=["a\n", "\U0001f600"],
    )
    read = Record.from_json(written.to_json())
    assert read.to_json() == written.to_json()
    token = {"ids": 0, "text": "a\n", "log_ratio": np.float32(0.1), "clipped": False}
    assert read.token(0) == token | {"entropy": 1.25, "layers_rerouted": 3}
    with pytest.raises(ValueError, match="lengths"):
        record([0.1, 0.5], text=["a"])


def test_a_sample_beside_what_grpo_would_weigh(tmp_path: Path) -> None:
    """Ratios 1, 2, 4: arithmetic mean 7/3; GRPO's min(r, 1.2) for A > 0 and max(r, 0.8) for A < 0."""
    ratios = [0.0, math.log(2), math.log(4)]
    write_records(tmp_path, 3, {"loss": "gmpo"}, [record(ratios), record(ratios, advantage=-1.0)])
    found = json.loads(to_json(summary(tmp_path, 3)))
    up, down = found["samples"]
    assert up["arithmetic_mean"] == pytest.approx(7 / 3, abs=1e-4)
    assert up["grpo_mean"] == pytest.approx((1 + 1.2 + 1.2) / 3, abs=1e-4)
    assert down["grpo_mean"] == pytest.approx(7 / 3, abs=1e-4)
    assert up["sequence_ratio"] == pytest.approx(1.1)
    assert (up["clipped"], up["length"]) == (2, 3)
    assert up["largest"] == pytest.approx(math.log(4), abs=1e-4)
    assert found["header"] == {"step": 3, "loss": "gmpo"}
    assert sum(found["histograms"]["tokens"]) == 6
    assert sum(found["histograms"]["sequences"]) == 2
    assert found["problems"] == []


def test_the_worst_tokens_have_their_context(tmp_path: Path) -> None:
    deltas = np.zeros(500)
    deltas[[7, 300]] = [-2.0, 1.5]
    write_records(tmp_path, 1, {}, [record(deltas.tolist())])
    worst = {token["at"]: token for token in summary(tmp_path, 1)["worst"]}
    assert worst[7]["before"] == "t0t1t2t3t4t5t6"
    assert worst[300]["after"].startswith("t301t302")
    assert worst[300]["clipped"]
    assert len(worst) < 100


def test_the_context_of_a_token_is_of_its_turn(tmp_path: Path) -> None:
    """Between two turns lies an observation, which the record does not have."""
    write_records(tmp_path, 1, {}, [record([0.0, 0.1, 0.9, 0.1, 0.2], turn=np.array([0, 0, 1, 1, 2]))])
    worst = {token["at"]: token for token in summary(tmp_path, 1)["worst"]}
    assert [(worst[at]["before"], worst[at]["after"]) for at in range(5)] == [
        ("", "t1"),
        ("t0", ""),
        ("", "t3"),
        ("t2", ""),
        ("", ""),
    ]


def test_a_record_of_an_earlier_version_has_no_turns() -> None:
    fields = json.loads(record([0.1, 0.5]).to_json())
    del fields["turn"]
    assert Record.from_json(json.dumps(fields).encode()).turn is None


@settings(max_examples=40)
@given(st.lists(st.floats(0, 9) | st.just(math.nan), max_size=40), st.integers(1, 20))
def test_which_samples_are_recorded(largest: list[float], count: int) -> None:
    chosen = choose(np.array(largest), count, seed=1)
    computed = [i for i, value in enumerate(largest) if not math.isnan(value)]
    assert len(chosen) == min(count, len(computed))
    assert set(chosen) <= set(computed)
    outliers = [i for i, why in chosen.items() if why == "outlier"]
    assert len(outliers) == min((count + 1) // 2, len(computed))
    rest = [largest[i] for i in computed if i not in outliers]
    assert not outliers or min(largest[i] for i in outliers) >= max(rest, default=0)
    assert chosen == choose(np.array(largest), count, seed=1)


def test_the_folder_of_records_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = len(write_records(tmp_path, 0, {}, [record([0.1])]).read_bytes())
    monkeypatch.setattr(token_records, "FOLDER_BYTES", 3 * one + 20)  # instead of 256 MiB of records
    for step in range(1, 7):
        write_records(tmp_path, step, {}, [record([0.1])])
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"step_{step:06d}.jsonl" for step in (4, 5, 6)
    ]
    monkeypatch.setattr(token_records, "FOLDER_BYTES", 1)  # less than one record
    write_records(tmp_path, 7, {}, [record([0.1])])
    assert [file.name for file in tmp_path.iterdir()] == ["step_000007.jsonl"]  # the newest always stays


def test_a_run_that_goes_back_has_no_records_of_later_steps(tmp_path: Path) -> None:
    for step in (0, 2, 10, 11):
        write_records(tmp_path, step, {}, [record([0.1])])
    remove_after(tmp_path, 10)
    assert recorded_steps(tmp_path) == [0, 2, 10]
    remove_after(tmp_path / "nowhere", 0)


# folders that are not whole


def test_a_missing_and_an_empty_folder(tmp_path: Path) -> None:
    (missing,) = ask(tmp_path / "nowhere", "state")
    assert "does not exist" in missing["problems"][0]
    (empty,) = ask(tmp_path, "state")
    assert empty["problems"] == ["The run has not logged a step yet."]
    assert ask(tmp_path, "curves") == {"panels": [], "runs": [{}]}


FILES = (
    "config.toml",
    "metrics.jsonl",
    "events.jsonl",
    "restarts.jsonl",
    "outcome.json",
    "transcripts.jsonl",
)
FILES += (
    "heartbeats/rank_00000.json",
    "errors/rank_00000.txt",
    "servers/server_0.log",
    "tokens/step_000001.jsonl",
)
HUGE = b"99999999999999999999"
BROKEN = (
    b"", b"\n", b"{", b"[]\n", b"1\n", b'"x"\n', b"\xff\xfe\n", b"[" * 9999, b"{}\n" * 3, b"train = 3\n",
    b'{"step": 1e999}\n', b'{"step": 1, "samples": 3}\n', b'{"step": true}\n', b'{"step": %s}\n' % HUGE,
    b'{"step": 1}\n{"ids": []}\n', b'{"step": 1}\n{"step": -1}\n', b'{"time": "x", "rank": []}\n',
    b"[train]\nnum_steps = %s\n[optimizer]\nlr = %s\n" % (HUGE, HUGE),
)  # fmt: skip


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(FILES), st.sampled_from(BROKEN) | st.binary(max_size=60)))
def test_damaged_files_become_lines_on_the_page(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as made:
        for name, content in files.items():
            (Path(made) / name).parent.mkdir(exist_ok=True)
            (Path(made) / name).write_bytes(content)
        runs = [RunFolder(Path(made), "run")]
        for path in ("state", "curves", "samples/0/1", "tokens/0/1"):
            json.loads(to_json(answer(runs, path)))
        assert "<main" in export(runs)


def test_nothing_in_the_folder_changes(folder: Path) -> None:
    def files() -> dict[str, tuple[int, int]]:
        return {str(file): (file.stat().st_mtime_ns, file.stat().st_size) for file in folder.rglob("*")}

    before = files()
    export([RunFolder(folder, "run")])
    assert files() == before


# the server and the page


def served(folder: Path, method: str, path: str, **headers: str) -> tuple[int, str, Any]:
    async def request() -> tuple[int, str, Any]:
        app = make_app([RunFolder(folder, "run")], TOKEN)
        async with TestClient(TestServer(app)) as client:
            response = await client.request(method, path, headers=headers, allow_redirects=False)
            return response.status, await response.text(), response.headers

    return asyncio.run(request())


@pytest.mark.parametrize(
    ("method", "path", "host", "status"),
    [
        ("GET", f"/{TOKEN}/", "127.0.0.1:1", 200),
        ("GET", f"/{TOKEN}/", "localhost:8080", 200),
        ("GET", f"/{TOKEN}/data/state", "127.0.0.1:1", 200),
        ("GET", f"/{TOKEN}/", "evil.example:80", 403),  # a name that its owner lets resolve to this machine
        ("GET", f"/{TOKEN}/data/state", "evil.example", 403),
        ("GET", "/", "127.0.0.1:1", 403),
        ("GET", "/other/", "127.0.0.1:1", 403),
        ("GET", "/data/state", "127.0.0.1:1", 403),
        ("POST", f"/{TOKEN}/data/state", "127.0.0.1:1", 405),
        ("GET", f"/{TOKEN}/data/samples/0/../../config.toml", "127.0.0.1:1", 404),
        ("GET", f"/{TOKEN}/data/..%2Fconfig.toml", "127.0.0.1:1", 404),
        ("GET", f"/{TOKEN}/data/samples/7/1", "127.0.0.1:1", 404),
        ("GET", f"/{TOKEN}/data/samples/0/-1", "127.0.0.1:1", 404),
        ("GET", f"/{TOKEN}/data/tokens/0/29/99", "127.0.0.1:1", 404),
        ("GET", f"/{TOKEN}/data/curves?first=x", "127.0.0.1:1", 404),
    ],
)
def test_requests(folder: Path, method: str, path: str, host: str, status: int) -> None:
    found, text, headers = served(folder, method, path, Host=host)
    assert found == status
    if status != 405:  # aiohttp's own answer
        assert headers["Content-Security-Policy"] == "frame-ancestors 'none'"
        assert headers["Referrer-Policy"] == "no-referrer"
    if status != 200:
        assert str(folder) not in text


def test_the_policy_allows_the_scripts_of_the_page_alone(folder: Path) -> None:
    page = export([RunFolder(folder, "run")])
    policy = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[0]
    script, style = (re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL) for tag in ("script", "style"))
    for name, contents in (("script-src", script), ("style-src", style)):
        (content,) = contents
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.count("</script>") == 2  # the page's two elements; the markup of the prompts is escaped
    assert "http://" not in page.replace("http://www.w3.org/", "")


def test_an_exported_page_has_the_newest_steps_that_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # instead of 30 MiB of a long run
    monkeypatch.setattr("megatron_gmpo.view.page.EXPORT_BYTES", 150_000)
    page = export([RunFolder(folder, "run")])
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)[0])
    state = data["state"][0]
    assert state["tokens"] == [30]
    assert any("1 of 3 steps of tokens" in line for line in state["problems"])
    assert "tokens/0/30/3" in data


def test_names_of_runs(tmp_path: Path) -> None:
    assert [run.name for run in named_runs([tmp_path / "a" / "seed_1", tmp_path / "b"])] == ["seed_1", "b"]
    assert [run.name for run in named_runs([tmp_path / "a/x", tmp_path / "b/x"])] == [
        f"{tmp_path}/a/x",
        f"{tmp_path}/b/x",
    ]


def test_the_command_exports(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    view.main([str(folder), "--export", str(tmp_path / "page.html")])
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    with pytest.raises(InputError, match=r"--export .* cannot be written"):
        view.main([str(folder), "--export", str(tmp_path / "no" / "page.html")])


def test_a_port_in_use(folder: Path) -> None:
    with pytest.raises(InputError, match="choose a free port"):
        view.main([str(folder), "--host", "192.0.2.1"])  # an address of no machine (RFC 5737)
