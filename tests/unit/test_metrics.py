"""Metrics: merging, logging across crashes and resumes, terminal output and training curves."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_gmpo.errors import InputError
from megatron_gmpo.metrics import plots
from megatron_gmpo.metrics.across_ranks import RankReduction
from megatron_gmpo.metrics.figures import Metric, reduce_metrics, value_of, weights_metric
from megatron_gmpo.metrics.histogram import BINS
from megatron_gmpo.metrics.logger import MetricLogger, Timer, check_wandb, cut_after, throughput
from megatron_gmpo.metrics.plots import PANELS, plot_run, read_metrics
from megatron_gmpo.metrics.progress import Progress

from ..support.small_disk import fill, small_disk


def json_lines(path: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# --- merging ---


def test_means_are_weighted_and_extremes_stay() -> None:
    parts = [
        {
            "loss": Metric(6.0, 2),
            "high": Metric(1.0, op="max"),
            "low": Metric(1.0, op="min"),
            "here": Metric(3.0),
        },
        {"loss": Metric(0.0, 1), "high": Metric(-2.0, op="max"), "low": Metric(-2.0, op="min")},
        {"loss": Metric(torch.tensor(3.0), torch.tensor(6)), "high": Metric(torch.tensor(5.0), op="max")},
    ]
    merged = reduce_metrics(parts)
    assert {name: value_of(metric) for name, metric in merged.items()} == {
        "loss": 1.0,
        "high": 5.0,
        "low": -2.0,
        "here": 3.0,
    }
    assert isinstance(merged["loss"].total, torch.Tensor)  # no synchronisation with the device
    assert reduce_metrics([]) == {}


def test_one_process_reduces_metrics_to_floats_and_fetches_tensors() -> None:
    reduce = RankReduction(torch.device("cpu"))
    counts = torch.arange(BINS, dtype=torch.float64)
    mine = {
        "mean": Metric(torch.tensor(3.0), torch.tensor(2)),
        "low": Metric(torch.tensor(-2.5), op="min"),
        "high": Metric(7.0, op="max"),
        "spread": Metric(counts, op="histogram"),
        "empty": Metric(torch.tensor(math.nan), 0),
    }
    for _ in range(2):  # the first call learns the names
        found, host = reduce(mine, {"a": torch.ones(2, 3)}, {"b": torch.tensor([4])})
        assert found.keys() == mine.keys()
        assert found["mean"] == Metric(3.0, 2.0)
        assert (found["low"], found["high"]) == (Metric(-2.5, op="min"), Metric(7.0, op="max"))
        assert torch.equal(torch.as_tensor(found["spread"].total), counts)
        assert math.isnan(found["empty"].total)
        assert torch.equal(host["a"], torch.ones(2, 3, dtype=torch.float64))
        assert host["b"].tolist() == [4]
    found, _ = reduce({"mean": Metric(1.0), "new": Metric(5.0)})
    assert found == {"mean": Metric(1.0), "new": Metric(5.0)}
    assert reduce({})[0] == {}
    with pytest.raises(AssertionError, match="high is both max and min"):
        reduce({"high": Metric(1.0, op="min")})


numbers = st.floats(-1e6, 1e6)


@given(st.lists(st.tuples(numbers, st.integers(1, 50)), min_size=1), st.data())
def test_any_split_merges_to_the_same(pairs: list[tuple[float, int]], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(pairs)))
    parts = [
        {"mean": Metric(total, count), "max": Metric(total, op="max"), "min": Metric(total, op="min")}
        for total, count in pairs
    ]
    merged = reduce_metrics([reduce_metrics(parts[:cut]), reduce_metrics(parts[cut:])])
    totals, counts = zip(*pairs, strict=True)
    assert value_of(merged["mean"]) == pytest.approx(math.fsum(totals) / sum(counts), abs=1e-6)
    assert (value_of(merged["max"]), value_of(merged["min"])) == (max(totals), min(totals))


@given(st.lists(st.lists(st.floats(-2000, 2000), min_size=1, max_size=6), min_size=1, max_size=4))
def test_the_effective_sample_size_does_not_depend_on_the_split(parts: list[list[float]]) -> None:
    """Kish: (sum w)^2 / (n sum w^2). Weights up to e^2000 are exact fractions of the largest."""
    logs = [x for part in parts for x in part]
    weights = [math.exp(x - max(logs)) for x in logs]
    expected = math.fsum(weights) ** 2 / (len(logs) * math.fsum(w * w for w in weights))
    merged = reduce_metrics(
        [{"w": weights_metric(torch.tensor(part, dtype=torch.float64))} for part in parts]
    )
    assert value_of(merged["w"]) == pytest.approx(expected, rel=1e-9)
    reduced, _ = RankReduction(torch.device("cpu"))(merged)
    assert value_of(reduced["w"]) == pytest.approx(expected, rel=1e-9)


def test_one_name_has_one_kind() -> None:
    with pytest.raises(AssertionError, match="loss is both mean and max"):
        reduce_metrics([{"loss": Metric(1.0)}, {"loss": Metric(1.0, op="max")}])


def test_a_mean_with_count_zero_is_nan() -> None:
    assert math.isnan(value_of(Metric(0.0, 0)))
    assert math.isnan(value_of(Metric(torch.tensor(0.0), torch.tensor(0))))
    assert value_of(2) == 2.0


# --- the logger ---


def test_a_step_is_a_line_of_strict_json(tmp_path: Path) -> None:
    logger = MetricLogger(tmp_path / "new" / "run", tensorboard=False)
    logger.add(
        {"loss": Metric(3.0, 2), "grad_norm": 0.5, "policy/ratio_max": Metric(torch.tensor(1.5), op="max")}
    )
    logger.add(
        {"loss": Metric(1.0, 2), "grad_norm": 1.5, "policy/ratio_max": Metric(torch.tensor(1.25), op="max")}
    )
    returned = logger.log(1, {"moe/none": Metric(0.0, 0), "eval/a/pass@1": 0.25})
    assert math.isnan(returned.pop("moe/none"))
    assert returned == {"loss": 1.0, "grad_norm": 1.0, "policy/ratio_max": 1.5, "eval/a/pass@1": 0.25}
    logger.log(2, {"loss": math.inf, "reward/mean": -math.inf})
    logger.close()
    assert json_lines(tmp_path / "new" / "run" / "metrics.jsonl") == [
        {"step": 1, "moe/none": None, **returned},
        {"step": 2, "loss": None, "reward/mean": None},
    ]
    assert not (tmp_path / "new" / "run" / "tensorboard").exists()


def test_a_step_is_on_disk_when_it_is_logged(tmp_path: Path) -> None:
    logger = MetricLogger(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        logger.log(step, {"loss": step})
        assert [line["step"] for line in json_lines(tmp_path / "metrics.jsonl")] == list(range(1, step + 1))


def resumed(run_dir: Path, step: int, contents: str) -> list[int]:
    (run_dir / "metrics.jsonl").write_text(contents)
    MetricLogger(run_dir, tensorboard=False, resume_step=step)
    assert [p.name for p in run_dir.iterdir()] == ["metrics.jsonl"]
    return [line["step"] for line in json_lines(run_dir / "metrics.jsonl")]


def test_resuming_removes_lines_left_by_a_crash(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"step": step, "loss": 0.1}) + "\n" for step in range(5))
    assert resumed(tmp_path, 2, lines) == [0, 1, 2]
    assert resumed(tmp_path, 2, lines.replace('{"step": 3, "loss": 0.1}', '{"step": 3, "lo')) == [0, 1, 2]
    assert resumed(tmp_path, 4, lines[:-1]) == [0, 1, 2, 3, 4]
    assert resumed(tmp_path, 4, lines[:-5]) == [0, 1, 2, 3]
    assert resumed(tmp_path, 9, lines) == [0, 1, 2, 3, 4]
    assert resumed(tmp_path, 0, lines) == []


def test_the_first_line_after_a_resume_starts_a_new_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}')
    logger = MetricLogger(tmp_path, tensorboard=False, resume_step=2)
    logger.log(3, {"loss": 3.0})
    assert [line["loss"] for line in json_lines(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 3.0]


def test_cut_after_keeps_any_text_and_removes_half_a_character(tmp_path: Path) -> None:
    file = tmp_path / "transcripts.jsonl"
    line = json.dumps({"step": 1, "text": "a\u2028b\x85c\u2029 🍎"}, ensure_ascii=False).encode() + b"\n"
    assert "\u2028".encode() in line  # str.splitlines would split here
    file.write_bytes(line + line[: line.index("🍎".encode()) + 2])
    cut_after(file, 1)
    assert file.read_bytes() == line
    cut_after(tmp_path / "none.jsonl", 1)
    assert not (tmp_path / "none.jsonl").exists()


def test_what_cannot_be_read_is_removed_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unreadable = [
        "[1]",
        "7",
        "null",
        '"step"',
        '{"loss": 1}',
        '{"step": null}',
        '{"step": "1"}',
        "{",
        "\0" * 9,
    ]
    lines = ['{"step": 1}', *unreadable, '{"step": 2}', '{"step": 3}']
    assert resumed(tmp_path, 2, "\n".join([*lines, '{"step": 3, "lo'])) == [1, 2]
    assert f"{tmp_path / 'metrics.jsonl'}: 10 lines could not be read and are removed" in caplog.text
    caplog.clear()
    assert resumed(tmp_path, 2, '{"step": 2}\n{"step": 3}\n') == [2]
    assert caplog.text == ""


def test_a_kill_within_an_event_loses_no_other(tmp_path: Path) -> None:
    logger = MetricLogger(tmp_path, tensorboard=False)
    logger.event("resume", step=1)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1.0, "eve')
    logger.event("checkpoint", step=2)
    first, torn, last = (tmp_path / "events.jsonl").read_text().splitlines()
    assert (json.loads(first)["step"], torn, json.loads(last)["step"]) == (1, '{"time": 1.0, "eve', 2)


def test_lines_are_on_the_disk_after_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = MetricLogger(tmp_path, tensorboard=False)
    logger.sync()  # without files
    logger.log(1, {"loss": 1.0})
    logger.event("resume")
    flushed = set()
    # a test cannot cut the power, so it records which files the kernel is asked to flush
    monkeypatch.setattr(os, "fsync", lambda number: flushed.add(os.readlink(f"/proc/self/fd/{number}")))
    logger.sync()
    assert flushed == {str(tmp_path / "metrics.jsonl"), str(tmp_path / "events.jsonl")}


def test_a_full_disk_ends_metrics_but_not_tensorboard_and_events(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "tensorboard", "4k") as disk:
        logger = MetricLogger(tmp_path)
        fill(disk)
        for step in (1, 2, 3):
            logger.log(step, {f"metric_{i}": float(step) for i in range(200)})
        logger.rewind(2)
        logger.close()
    assert [line["step"] for line in json_lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert caplog.text.count("tensorboard cannot be written (No space left on device)") == 1
    assert capfd.readouterr().err == ""  # no traceback of TensorBoard's thread
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to("/dev/full")
    logger.event("checkpoint", step=3)
    assert "events.jsonl lacks the event 'checkpoint' (No space left on device)" in caplog.text
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        logger.log(4, {"loss": 1.0})


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    read = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in read.Scalars(tag)]


def test_tensorboard_reads_back_what_was_logged_across_a_resume(tmp_path: Path) -> None:
    crashed = MetricLogger(tmp_path)
    for step in (1, 2, 3, 4):
        crashed.log(step, {"loss": 1.0 / step, "reward/mean": Metric(step, 2)})
    assert scalars(tmp_path, "reward/mean") == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]  # flushed every step
    resumed = MetricLogger(tmp_path, resume_step=2)
    resumed.log(3, {"loss": -1.0})
    resumed.log(4, {"loss": math.nan})
    resumed.close()
    found = scalars(tmp_path, "loss")
    assert found[:3] == [(1, 1.0), (2, 0.5), (3, -1.0)]
    assert found[3][0] == 4
    assert math.isnan(found[3][1])
    assert scalars(tmp_path, "reward/mean") == [(1, 0.5), (2, 1.0)]
    crashed.close()


def test_a_rollback_removes_later_steps(tmp_path: Path) -> None:
    logger = MetricLogger(tmp_path)
    for step in (1, 2, 3, 4):
        logger.log(step, {"loss": float(step)})
    logger.rewind(2)
    logger.log(3, {"loss": -3.0})
    logger.close()
    expected = [(1, 1.0), (2, 2.0), (3, -3.0)]
    assert scalars(tmp_path, "loss") == expected
    assert [(line["step"], line["loss"]) for line in json_lines(tmp_path / "metrics.jsonl")] == expected


def test_events_have_their_own_file(tmp_path: Path) -> None:
    before = time.time()
    logger = MetricLogger(tmp_path, tensorboard=False)
    logger.event("resume", step=3, checkpoint="iter_0000003")
    MetricLogger(tmp_path, tensorboard=False, resume_step=1).event("done")
    first, second = json_lines(tmp_path / "events.jsonl")
    assert before <= first.pop("time") <= second.pop("time") <= time.time()
    assert (first, second) == (
        {"event": "resume", "step": 3, "checkpoint": "iter_0000003"},
        {"event": "done"},
    )
    assert not (tmp_path / "metrics.jsonl").exists()


def test_missing_wandb_is_refused_before_the_run() -> None:
    check_wandb("")
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match=r"log\.wandb_project = 'gmpo' needs wandb: pip install"):
            check_wandb("gmpo")
    else:
        check_wandb("gmpo")


def test_throughput_counts_neither_evaluation_nor_checkpoints() -> None:
    seconds = {"time/rollout": 2.0, "time/train": 1.0, "time/evaluation": 5.0, "time/checkpoint": 7.0}
    assert throughput(600, seconds) == {"throughput/tokens_per_second": 200.0}


def test_phases_and_the_rest_make_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    timer = Timer()
    now += 1
    for name, seconds in (("rollout", 4), ("train", 2), ("rollout", 8)):
        with timer(name):
            now += seconds
    with contextlib.suppress(RuntimeError), timer("broken"):
        now += 16
        raise RuntimeError
    now += 32
    assert timer.take() == {
        "time/rollout": 12,
        "time/train": 2,
        "time/broken": 16,
        "time/step": 63,
        "time/other": 33,
    }
    now += 5
    assert timer.take() == {"time/step": 5, "time/other": 5}


# --- the terminal ---


def console(terminal: bool = False) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=60, color_system=None, legacy_windows=False
    )


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


FIGURES = {
    "reward/mean": 0.51234,
    "loss": -0.00123456,
    "policy/entropy": 1.5,
    "throughput/tokens_per_second": 12345.6,
    "train/saved": 0.4149,
    "time/step": 2.25,
}


def test_without_a_terminal_each_step_is_a_plain_line() -> None:
    out = console()
    with Progress(30, done=6, console=out) as progress:
        progress.update(7, FIGURES | {"moe/ignored": 1.0})
        more = {
            "grad_norm": 0.0123,
            "rollout/truncated_fraction": 0.25,
            "policy/kl_ref": 0.00012,
            "policy/kl_old": 2.5e-5,
            "eval/math500/pass@1": 0.75,
            "eval/math500/pass@4": 0.9,
            "time/step": 4.25,
        }
        progress.update(8, {"reward/mean": math.nan} | more)
    assert written(out).splitlines() == [  # 22 steps of the mean, 3.25 s, are left
        "step 7/30  reward 0.512  entropy 1.500  tok/s 12,346  saved 41%  2.25 s  0:00:52 left",
        "step 8/30  reward nan  grad 0.0123  truncated 25%  kl 0.00012  kl old 2.5e-05  "
        "math500/pass@1 0.750  4.25 s  0:01:12 left",
        "evaluation after step 8: math500/pass@1 0.750, math500/pass@4 0.900",
    ]
    assert written(out).endswith("\n")


@pytest.mark.parametrize("terminal", [False, True])
def test_notes_are_printed_verbatim(terminal: bool) -> None:
    out = console(terminal)
    note = "gmpo, replay of [runs]/a [/runs/x] :smile: " + "long " * 20
    with Progress(3, console=out) as progress:
        progress.note(note)
    assert note + "\n" in written(out)


def test_results_are_the_pass_rates_of_an_evaluation() -> None:
    out = console(terminal=False)
    with Progress(3, console=out) as progress:
        progress.results(
            "after step 2",
            {
                "eval/aime/pass@1": 0.25,
                "eval/aime/ci_low@1": 0.125,
                "eval/aime/ci_high@1": 0.5,
                "eval/aime/mean_length": 9.0,
                "loss": 1.0,
            },
        )
    assert written(out) == "evaluation after step 2: aime/pass@1 0.250 [0.125, 0.500]\n"


def test_disabled_progress_prints_nothing() -> None:
    for terminal in (False, True):
        out = console(terminal)
        with Progress(30, enabled=False, console=out) as progress:
            progress.update(1, FIGURES)
            progress.note("x")
        assert written(out) == ""


def test_a_terminal_gets_a_bar_with_figures() -> None:
    out = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    with Progress(30, done=6, console=out) as progress:
        progress.update(7, FIGURES)
    last = written(out).split("step ")[-1]
    assert "7/30" in last
    assert "reward 0.512 entropy 1.500 tok/s 12,346 saved 41%" in last


# --- the curves ---


def write_run(folder: Path, steps: int, names: list[str], seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir()
    lines = [{"step": step} | {name: abs(rng.normal()) for name in names} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "metrics.jsonl"


EVERYTHING = [
    "reward/mean",
    "eval/math500/pass@1",
    "eval/math500/pass@4",
    "eval/unseen/success",
    "response_length/mean",
    "response_length/max",
    "rollout/truncated_fraction",
    "episode/success",
    "episode/success/pick",
    "episode/turns",
    "episode/tokens_per_turn",
    "episode/tool_calls",
    "episode/tool_errors",
    "episode/ended_done",
    "episode/ended_turns",
    "episode/environment_seconds",
    "loss",
    "grad_norm",
    "policy/entropy",
    "policy/log_ratio_min",
    "policy/log_ratio_max",
    "policy/sequence_ratio_max",
    "policy/clip_fraction_high",
    "policy/log_ratio_q001",
    "policy/log_ratio_q999",
    "policy/clip_fraction_low",
    "policy/clip_low",
    "policy/clip_high",
    "policy/masked_fraction",
    "policy/masked_sequences",
    "policy/kl_old",
    "policy/kl_ref",
    "rollout/logprob_diff_mean",
    "rollout/k3_kl",
    "moe/load_max",
    "moe/dead_experts",
    "moe/router_entropy",
    "moe/routing_drift",
    "moe/z_loss",
    "throughput/tokens_per_second",
    "time/rollout",
    "time/train",
    "time/other",
    "time/step",
]


def size_of(png: Path) -> tuple[int, int]:
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    image = imread(png)
    assert 0.01 < (image[..., 0] < 1).mean() < 0.5  # the image has content on a white background
    return image.shape[1], image.shape[0]


@pytest.mark.slow
def test_one_run_and_several_with_every_metric(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", 60, EVERYTHING)
    other = write_run(tmp_path / "b", 3, EVERYTHING, seed=1)
    titles = [panel.heading for panel in PANELS]
    assert plot_run({"gmpo": one}, tmp_path / "one.png") == titles
    assert plot_run({"gmpo": one, "grpo": other}, tmp_path / "two.png") == titles
    assert size_of(tmp_path / "one.png") == size_of(tmp_path / "two.png")


def test_panels_without_data_are_omitted(tmp_path: Path) -> None:
    few = write_run(tmp_path / "few", 2, ["reward/mean", "policy/log_ratio_max", "time/step"])
    loss = write_run(tmp_path / "loss", 2, ["loss"])
    assert plot_run({"few": few}, tmp_path / "few.png") == [
        "Reward, mean of a step",
        "Log ratio to the old policy, range over tokens",
    ]
    titles = plot_run({"few": few, "loss": loss}, tmp_path / "both.png")
    assert titles == [
        "Reward, mean of a step",
        "Policy loss",
        "Log ratio to the old policy, range over tokens",
        "Time of a step, seconds",
    ]
    assert size_of(tmp_path / "few.png")[0] < size_of(tmp_path / "both.png")[0]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Return the list of figures drawn in the test."""
    kept: list[Figure] = []

    class Kept(Figure):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            kept.append(self)

    monkeypatch.setattr(plots, "Figure", Kept)
    return kept


def test_the_curves_are_the_figures_of_the_run(figures: list[Figure], tmp_path: Path) -> None:
    names = [
        "loss",
        "policy/log_ratio_min",
        "policy/log_ratio_max",
        "time/rollout",
        "time/other",
        "time/step",
    ]
    path = write_run(tmp_path / "run", 30, names)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[4]["loss"] = None
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_run({"run": path}, tmp_path / "x.png")
    loss, band, stack = figures[0].axes[:3]
    raw, smooth = (np.asarray(line.get_ydata()) for line in loss.get_lines())
    assert raw.tolist() == [line["loss"] for line in lines if line["loss"] is not None]
    assert np.asarray(loss.get_lines()[0].get_xdata()).tolist() == [*range(1, 5), *range(6, 31)]
    half = 2
    assert smooth == pytest.approx([raw[max(0, i - half) : i + half + 1].mean() for i in range(len(raw))])
    low, high = (np.asarray(line.get_ydata()) for line in band.get_lines()[:2])
    assert low.tolist() == [line["policy/log_ratio_min"] for line in lines]
    assert high.tolist() == [line["policy/log_ratio_max"] for line in lines]
    tops = [c.get_paths()[0].vertices[:, 1].max() for c in stack.collections]
    assert tops[-1] == pytest.approx(max(line["time/rollout"] + line["time/other"] for line in lines))
    # time/step, the total, is not a part of the stack
    assert [text.get_text() for text in stack.get_legend().get_texts()] == ["other", "rollout"]  # as stacked
    for ax, unit in ((loss, "loss"), (band, "log ratio"), (stack, "seconds")):
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", unit)
    figures[0].draw_without_rendering()
    assert stack.get_legend().get_window_extent().x0 >= stack.get_window_extent().x1


def test_figures_that_cannot_move_with_one_update_a_rollout_have_no_panel(tmp_path: Path) -> None:
    same = {"loss": 0.0, "policy/log_ratio_min": 0.0, "policy/log_ratio_max": 0.0, "policy/kl_old": 0.0}
    same |= {"policy/sequence_ratio_min": 1.0, "policy/sequence_ratio_max": 1.0, "policy/clip_high": 0.4}
    same |= {"policy/log_ratio_q001": 0.0, "policy/log_ratio_q999": 0.0, "policy/clip_fraction_low": 0.0}
    paths = {}
    for name, moved in {"still": {}, "moves": {"policy/log_ratio_max": 0.1, "policy/kl_old": 1e-4}}.items():
        (tmp_path / name).mkdir()
        paths[name] = tmp_path / name / "metrics.jsonl"
        lines = [{"step": 1, "reward/mean": 0.5} | same, {"step": 2, "reward/mean": 0.5} | same | moved]
        lines[1]["loss"] = 3e-8  # rounding
        paths[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = plot_run({"still": paths["still"]}, tmp_path / "x.png")
    assert drawn == ["Reward, mean of a step"]
    assert plot_run(paths, tmp_path / "x.png") == [
        *drawn,
        "Log ratio to the old policy, range over tokens",
        "KL, nats a token",
    ]


def test_zeros_on_a_logarithmic_axis_and_steps_without_a_value(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    file = tmp_path / "metrics.jsonl"
    same = {"rollout/k3_kl": 0.0, "rollout/logprob_diff_mean": 1e-7}
    lines = [{"step": 1, "loss": None} | same, {"step": 2, "time/rollout": 1.0} | same]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_run({"run": file}, tmp_path / "x.png") == [
        "Rollout against trainer, nats a token",
        "Time of a step, seconds",
    ]
    assert [str(warning.message) for warning in recwarn] == []


def test_the_last_line_of_a_repeated_step_counts(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0, "note": "x"}\n{"step": 1, "loss": 3.0}\n'
    )
    steps, values = read_metrics(file)["loss"]
    assert dict(zip(steps.tolist(), values.tolist(), strict=True)) == {1: 3.0, 2: 2.0}
    assert "note" not in read_metrics(file)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, r"metrics\.jsonl does not exist: give the folder of a run that has logged a step"),
        ("", r"no figures to plot in .*metrics\.jsonl: has the run logged a step\?"),
        ('{"step": 1, "other": 2.0, "loss": null}\n', "no figures to plot in"),
        (
            '{"step": 1}\n{"loss": 1.0}\n',
            r"line 2 of .*metrics\.jsonl is not a JSON object with a step: remove the line",
        ),
        ('{"step": 1}\n[1]\n', r"line 2 of .* is not a JSON object with a step"),
        ('{"step": 1}\n{"step": null}\n', r"line 2 of .* is not a JSON object with a step"),
        ('{"step": 1, "lo\n', r"line 1 of .* is not a JSON object with a step"),
        ('{"step": 1, "lo', r"no figures to plot in"),  # a crash while the first line was written
    ],
)
def test_errors_of_plotting_name_the_file(contents: str | None, message: str, tmp_path: Path) -> None:
    if contents is not None:
        (tmp_path / "metrics.jsonl").write_text(contents)
    with pytest.raises(InputError, match=message) as error:
        plot_run({"run": tmp_path / "metrics.jsonl"}, tmp_path / "x.png")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.png").exists()
