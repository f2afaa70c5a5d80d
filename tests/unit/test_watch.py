"""The watch command on a run folder, with the files that the logger and the supervision write."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from megatron_gmpo.commands import watch
from megatron_gmpo.errors import InputError
from megatron_gmpo.metrics.logger import MetricLogger
from megatron_gmpo.view import snapshot

NOW = 1_000_000.0


def shown(run_dir: Path, now: float = NOW, width: int = 160) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(watch.render(watch.read(run_dir), now))
    return capture.get()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Return a run folder after four of ten steps and one restart.

    One rank is alive; the other is silent.
    """
    logger = MetricLogger(tmp_path, tensorboard=False)
    for step in range(1, 5):
        figures = {
            "reward/mean": step / 10,
            "throughput/tokens_per_second": 1234.0,
            "rollout/logprob_diff_mean": 0.0123,
        }
        logger.log(step, figures | {"time/step": 10.0 if step > 1 else 90.0, "eval/math500/pass@1": 0.25})
    logger.event("checkpoint", step=4, path="somewhere")
    (tmp_path / "config.toml").write_text("[train]\nnum_steps = 10\n")
    (tmp_path / "restarts.jsonl").write_text('{"attempt": 1, "code": 85}\n{"attempt": 2}\n')
    (tmp_path / "heartbeats").mkdir()
    for rank, age in ((0, 3), (1, 200)):
        beat = {
            "rank": rank,
            "node": f"node{rank}",
            "pid": 7,
            "step": 5,
            "phase": "rollout",
            "since": NOW - 300,
            "time": NOW - age,
        }
        (tmp_path / "heartbeats" / f"rank_{rank:05}.json").write_text(json.dumps(beat))
    return tmp_path


def test_a_running_job(run_dir: Path) -> None:
    text = shown(run_dir)
    for words in (
        "step 4/10",
        "eta 1 min 00 s",
        "running",
        "1 restart",
        "0.400",
        "1,234",
        "0.012",
        "math500/pass@1",
        "0.250",
        "path=somewhere",
    ):
        assert words in text
    rank0, rank1 = (line for line in text.splitlines() if "rollout" in line and "node" in line)
    assert "3 s ago" in rank0
    assert "3 min 20 s ago" in rank1
    assert not watch.read(run_dir).finished


def test_nothing_is_cut_in_a_narrow_terminal(run_dir: Path) -> None:
    folder = run_dir / "studies-of-clips" / "an-arm-with-a-long-name" / "seed_1"
    folder.mkdir(parents=True)
    (run_dir / "heartbeats").rename(folder / "heartbeats")
    beat = folder / "heartbeats" / "rank_00000.json"
    node = "node0." + "very-long-domain." * 4
    beat.write_text(beat.read_text().replace("node0", node))
    logger = MetricLogger(folder, tensorboard=False)
    saved = f"{folder}/checkpoints/iter_0000004"
    logger.event("checkpoint", step=4, path=saved)
    reason = f"step 5: loss is nan; the last checkpoint is {saved}"
    (folder / "outcome.json").write_text(json.dumps({"code": 1, "reason": reason}))
    text = shown(folder, width=60)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 60
    whole = "".join(text.split())
    for words in (str(folder), f"path={saved}", f"exit 1: {reason}"):
        assert words.replace(" ", "") in whole


def test_a_pipe_gets_whole_lines(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = "/" + "a-folder-with-a-long-name/" * 9
    MetricLogger(run_dir, tensorboard=False, resume_step=4).event("checkpoint", step=4, path=saved)
    watch.main([str(run_dir), "--once"])
    assert f"path={saved}" in capsys.readouterr().out


def test_a_job_that_has_gone_silent(run_dir: Path) -> None:
    assert "silent for 10 min 03 s" in shown(run_dir, NOW + 600)


def test_a_crash(run_dir: Path) -> None:
    (run_dir / "errors").mkdir()
    (run_dir / "errors" / "rank_00001.txt").write_text(
        "Traceback (most recent call last):\n  File ...\nValueError: [bold] went wrong\n"
    )
    (run_dir / "stacks").mkdir()
    for folder in ("errors", "stacks"):  # ranks without an error have empty files
        (run_dir / folder / "rank_00000.txt").touch()
    (run_dir / "outcome.json").write_text(json.dumps({"code": 1, "reason": "rank 1 crashed", "step": 5}))
    text = shown(run_dir)
    assert "exit 1: rank 1 crashed" in text
    assert "rank_00001: ValueError: [bold] went wrong" in text
    assert "rank_00000" not in text
    assert "eta" not in text
    assert not watch.read(run_dir).finished  # the job may start another attempt
    (run_dir / "restarts.jsonl").unlink()
    assert watch.read(run_dir).finished


def test_text_of_others_cannot_control_the_terminal(run_dir: Path) -> None:
    """ESC ] 0 ; x BEL sets a terminal's title, ESC [ 2 J clears it, U+202E reverses the rest of the line."""
    evil = "\x1b]0;x\x07\x1b[2J\x9b2J\r\u202e[red]x"
    (run_dir / "outcome.json").write_text(json.dumps({"code": evil, "reason": evil}))
    beat = {"rank": evil, "node": evil, "step": evil, "phase": evil, "since": NOW, "time": NOW}
    (run_dir / "heartbeats" / "rank_00000.json").write_text(json.dumps(beat | {"rank": 0}))
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": NOW, "event": evil, evil: evil}) + "\n")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, f"eval/{evil}/pass@1": 0.5}) + "\n")
    (run_dir / "errors").mkdir()
    (run_dir / "errors" / "rank_00001.txt").write_text(f"Traceback\nValueError: {evil}\n")
    text = shown(run_dir)
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert text.count("\\x1b]0;x") >= 5


def test_a_job_to_be_started_again_is_not_finished(run_dir: Path) -> None:
    (run_dir / "outcome.json").write_text(json.dumps({"code": 85, "reason": "time limit"}))
    assert "exit 85: time limit" in shown(run_dir)
    assert not watch.read(run_dir).finished


def test_half_written_files_are_left_out(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "reward/me')
    (run_dir / "heartbeats" / "rank_00002.json").write_text('{"rank": 2, ')
    (run_dir / "outcome.json").write_text("")
    (run_dir / "config.toml").write_text("[train\n")
    assert "step 4/?" in shown(run_dir)
    assert "node1" in shown(run_dir)


def test_only_the_end_of_long_files_is_read(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "TAIL_BYTES", 300)  # so that a short file is a long one
    assert [line["step"] for line in watch.read(run_dir).steps] == [4]
    assert "step 4/10" in shown(run_dir)


def test_a_folder_without_files(tmp_path: Path) -> None:
    assert "step 0/?" in shown(tmp_path)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        watch.read(tmp_path / "nowhere")


def test_a_finished_job_ends_the_live_view(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "outcome.json").write_text(json.dumps({"code": 0, "reason": "done", "time": time.time()}))
    watch.main([str(run_dir)])
    assert "exit 0: done" in capsys.readouterr().out
