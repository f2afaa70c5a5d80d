"""A sample's columns are arrays of the documented types; values that do not fit are refused."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gmpo.batch.samples import Sample, narrow_experts, version_spans_of


def sample_of(**changes: Any) -> Sample:
    fields: dict[str, Any] = {
        "tokens": [5, 6, 7, 8],
        "response_mask": [False, False, True, True],
        "rollout_logprobs": [0.0, 0.0, -0.5, -0.25],
        "text": "x",
        "finish_reason": "stop",
        "policy_version": 3,
    }
    return Sample(**fields | changes)


def test_lists_and_wider_arrays_become_the_stated_types() -> None:
    wide = {
        "tokens": np.array([5, 6, 7, 8]),
        "response_mask": np.array([0, 0, 1, 1], bool),
        "rollout_logprobs": np.array([[0.0, 0.0, -0.5, -0.25], [1.0] * 4]).T[:, 0],  # not contiguous
    }
    for sample in (sample_of(), sample_of(**wide)):
        for name, dtype in {
            "tokens": "int32",
            "response_mask": "bool",
            "rollout_logprobs": "float32",
        }.items():
            column = getattr(sample, name)
            assert column.dtype == dtype
            assert column.flags.c_contiguous
            assert column.tolist() == wide[name].tolist()
        assert sample.response_length == 2
        assert type(sample.response_length) is int
    assert sample_of(tokens=[], response_mask=[], rollout_logprobs=[]).tokens.dtype == np.int32


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": [5.0, 6.0, 7.0, 8.0]},
        {"tokens": [[5, 6, 7, 8]]},
        {"response_mask": [0, 0, 1, 1]},
        {"response_mask": [True]},
        {"rollout_logprobs": [0.0, 0.0, -0.5]},
        {"rollout_logprobs": np.zeros((4, 1))},
        {"version_spans": [[0, 3, 1]]},
        {"version_spans": [2.5, 1.5]},
        {"routed_experts": np.zeros((3, 2), np.int16)},
        {"routed_experts": np.zeros((3, 2, 2))},
    ],
    ids=str,
)
def test_a_column_that_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change)).replace("routed_experts", "expert.*dtype")):
        sample_of(**change)


@pytest.mark.parametrize(
    ("highest", "lowest", "dtype"), [(255, 0, "uint8"), (256, 0, "int16"), (7, -1, "int16")]
)
def test_experts_are_as_narrow_as_they_fit(highest: int, lowest: int, dtype: str) -> None:
    for given_as in (np.int16, np.int32, np.int64):
        experts = np.array([[[highest, lowest]], [[3, 4]], [[0, 1]]], given_as)
        found = sample_of(routed_experts=experts).routed_experts
        assert found is not None
        assert found.dtype == dtype
        assert np.array_equal(found, experts)
        assert narrow_experts(found) is found


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=30), st.integers(1, 5))
def test_spans_give_back_the_version_of_each_token(versions: list[int], prompt: int) -> None:
    spans = version_spans_of(versions, start=prompt)
    sample = Sample.from_response(
        list(range(prompt)),
        versions,
        np.zeros(len(versions)),
        text="",
        finish_reason="stop",
        policy_version=min(versions),
        version_spans=spans,
    )
    assert sample.token_versions.tolist() == [-1] * prompt + versions
    assert sample.token_versions.dtype == spans.dtype == np.int32
    assert len(spans) == 1 + sum(a != b for a, b in pairwise(versions))
    assert replace(sample, version_spans=None).token_versions.tolist() == (
        [-1] * prompt + [min(versions)] * len(versions)
    )


def test_a_response_is_appended_to_its_prompt() -> None:
    sample = Sample.from_response(
        [5, 6], np.array([7, 8]), [-0.5, -0.25], text="x", finish_reason="stop", policy_version=3
    )
    assert sample == sample_of()


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": [5, 6, 7, 9]},
        {"rollout_logprobs": [0.0, 0.0, -0.5, -0.26]},
        {"text": "y"},
        {"reward": 1.0},
        {"version_spans": [[2, 3]]},
        {"routed_experts": np.zeros((3, 1, 2), np.int16)},
    ],
    ids=str,
)
def test_samples_that_differ_are_not_equal(change: dict[str, Any]) -> None:
    assert sample_of(**change) == sample_of(**change)
    assert sample_of(**change) != sample_of()


def test_a_pickle_has_no_object_per_token() -> None:
    """A token takes 9 bytes: 4 of tokens, 1 of the mask, 4 of log probabilities."""
    sizes = []
    for length in (1000, 3000):
        sample = Sample.from_response(
            [1],
            range(length - 1),
            np.zeros(length - 1),
            text="",
            finish_reason="stop",
            policy_version=0,
            version_spans=version_spans_of([0] * (length - 1), start=1),
        )
        sizes.append(len(pickle.dumps(sample)))
        assert pickle.loads(pickle.dumps(sample)) == sample
    assert sizes[1] - sizes[0] == 2000 * 9


@pytest.mark.parametrize(
    ("mask", "turns"),
    [([], 0), ([0, 0, 0], 0), ([0, 1, 1], 1), ([1, 0, 1, 1], 2), ([0, 1, 0, 0, 1, 0, 1], 3), ([0, 1, 0], 1)],
)
def test_turns_are_runs_of_sampled_tokens(mask: list[int], turns: int) -> None:
    width = len(mask)
    sample = sample_of(tokens=[1] * width, response_mask=np.array(mask, bool), rollout_logprobs=[0.0] * width)
    assert sample.num_turns == turns
    assert type(sample.num_turns) is int
