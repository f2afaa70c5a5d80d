"""benchmarks/data_plane.py runs, and its last line has the figures that docs/performance.md quotes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.data_plane import R3, RANKS, SAMPLES, Case, lengths_of, sampled

from ..support.commands import run_module


def test_the_samples_have_the_tokens_that_the_figures_are_divided_by() -> None:
    case = Case(nodes=2, groups=3, length=200, rounds=1, routing=R3)
    made = list(sampled(case, np.random.default_rng(0)))
    assert [len(tokens) for tokens, _, _ in made] == list(lengths_of(case))
    assert RANKS * sum(lengths_of(case)) == case.tokens == 2 * 3 * SAMPLES * 200
    for tokens, _, experts in made:
        assert experts.shape == (len(tokens) - 1, 48, 8)
        assert (np.diff(np.sort(experts, axis=-1), axis=-1) > 0).all()  # no token has an expert twice
        assert experts.max() < 128


@pytest.mark.slow
def test_the_last_line_is_json() -> None:
    arguments = ["--tokens", "32000", "--tokens_r3", "6400", "--length", "200", "--rounds", "1"]
    result = run_module("benchmarks.data_plane", *arguments, "--extrapolate")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for name in ("deepseek_r1_distill_qwen_7b", "qwen3_30b_a3b", "qwen3_235b_a22b", "8,192 x 10,000 tokens"):
        assert any(line.startswith(name) for line in lines)
    found = json.loads(lines[-1])
    # a column has 9 bytes a token, and with the experts of 48 layers x 8 it has 393
    assert found["bytes_per_token"] > 9
    assert found["bytes_per_token_r3"] > 392
    assert {"us_per_token", "us_per_token_r3", "growth"} <= found.keys()
