"""The geometry example and its demo: whole runs on drawn problems."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_gmpo.testing.geometry import make_geometry

from ..support.commands import json_lines, options
from ..support.demos import demo_result

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_the_last_line_of_the_demo_is_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "geometry"
    make_geometry(made, num_train=20, num_heldout=5, num_solved=64, warm_up_steps=2)
    chosen = {
        "model__path": made / "model",
        "data__path": made / "train.parquet",
        "eval__sets__heldout__path": made / "heldout.parquet",
        "eval__sets__blank__path": made / "blank.parquet",
        "rollout__prompts_per_step": 8,
        "log__transcripts_per_step": 8,
        "train__num_steps": 1,
    }
    result = demo_result("geometry", made, options(**chosen), tmp_path, monkeypatch, capfd)
    rates = ["accuracy_before", "accuracy_before_interval", "accuracy_after", "accuracy_after_interval"]
    assert list(result) == [*rates, "accuracy_blank", "seconds", "run_dir"]
    run_dir = Path(result["run_dir"])
    before, after = json_lines(run_dir / "metrics.jsonl")
    assert result["accuracy_before"] == before["eval/heldout/pass@1"]
    assert result["accuracy_after"] == after["eval/heldout/pass@1"]
    assert result["accuracy_blank"] == after["eval/blank/pass@1"]
    assert after["rollout/logprob_diff_max"] < 1e-4
    groups = json_lines(run_dir / "transcripts.jsonl")
    assert len(groups) == 8
    for group in groups:
        (image,) = group["images"]
        assert (run_dir / "images" / image).is_file()
