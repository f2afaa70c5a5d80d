"""The stream of prompts resumes exactly, and refuses another data set."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.data.stream import PromptStream, StreamState
from megatron_gmpo.errors import InputError


def prompts_of(n: int) -> list[Prompt]:
    return [Prompt(f"p/{i}", answer="") for i in range(n)]


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


def test_stream_yields_every_prompt_once_per_epoch_in_a_new_order() -> None:
    stream = PromptStream(prompts_of(10), seed=3, shuffle=True)
    drawn = ids(stream.next(7) + stream.next(7) + stream.next(16))
    epochs = [drawn[:10], drawn[10:20], drawn[20:]]
    assert all(sorted(epoch) == sorted(ids(prompts_of(10))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert ids(PromptStream(prompts_of(10), seed=3, shuffle=True).next(30)) == drawn
    assert ids(PromptStream(prompts_of(10), seed=4, shuffle=True).next(30)) != drawn
    assert ids(PromptStream(prompts_of(4), seed=3, shuffle=False).next(9)) == [f"p/{i % 4}" for i in range(9)]


@pytest.mark.parametrize("taken", [0, 3, 10, 14, 25])
@pytest.mark.parametrize("shuffle", [True, False])
def test_stream_resumes_exactly(taken: int, shuffle: bool) -> None:
    stream = PromptStream(prompts_of(10), seed=5, shuffle=shuffle)
    stream.next(taken)
    state = StreamState.model_validate(json.loads(json.dumps(stream.state_dict())))
    resumed = PromptStream(prompts_of(10), seed=99, shuffle=shuffle)
    resumed.load_state_dict(state)
    assert ids(resumed.next(33)) == ids(stream.next(33))
    assert resumed.state_dict() == stream.state_dict()


@settings(max_examples=60)
@given(
    # the size of each draw, whether it is settled at once, and how many pending draws are settled after it
    runs=st.lists(
        st.lists(st.tuples(st.integers(1, 7), st.booleans(), st.integers(0, 2)), max_size=8),
        min_size=2,
        max_size=4,
    ),
    size=st.integers(1, 9),
)
def test_no_prompt_is_skipped_or_drawn_twice_over_resumes(
    runs: list[list[tuple[int, bool, int]]], size: int
) -> None:
    """Each run ends after some draws, of which the pending ones are drawn again by the next run.

    The truth is the endless order itself: what all runs have settled, and what is pending at the end.
    """
    endless = ids(PromptStream(prompts_of(size), seed=5, shuffle=True).next(300))
    stream = PromptStream(prompts_of(size), seed=5, shuffle=True)
    settled: list[str] = []
    for draws in runs:
        pending: list[tuple[tuple[int, int], list[str]]] = []
        for count, at_once, done in draws:
            start = stream.place
            drawn = ids(stream.next(count))
            if at_once:
                settled += drawn
            else:
                pending.append(((start, stream.place), drawn))
            for _, earlier in pending[:done]:
                settled += earlier
            del pending[:done]
        state = json.loads(json.dumps(stream.state_dict([places for places, _ in pending])))
        stream = PromptStream(prompts_of(size), seed=0, shuffle=True)
        stream.load_state_dict(StreamState.model_validate(state))
        again = PromptStream(prompts_of(size), seed=0, shuffle=True)
        again.load_state_dict(StreamState.model_validate(state))
        for _, drawn in pending:
            assert ids(again.next(len(drawn))) == drawn
    settled += [name for _, drawn in pending for name in drawn]
    assert sorted(settled) == sorted(endless[: len(settled)])
    assert ids(again.next(10)) == endless[len(settled) :][:10]


SUMS = [Prompt(f"p/{i}", answer=str(i), input_ids=[i, i + 1, 300_000]) for i in range(10)]


def changed(**edits: Any) -> list[Prompt]:
    """Return the sums with the fourth one edited."""
    return [replace(prompt, **edits) if prompt.id == "p/3" else prompt for prompt in SUMS]


def swapped(prompts: list[Prompt], field: str) -> list[Prompt]:
    """Exchange a field of the first two prompts."""
    first, second = (getattr(prompt, field) for prompt in prompts[:2])
    return [replace(prompts[0], **{field: second}), replace(prompts[1], **{field: first}), *prompts[2:]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (SUMS[:-1], "data has 9 prompts, the checkpoint's data had 10"),
        ([*SUMS, SUMS[0]], "data has 11 prompts, the checkpoint's data had 10"),
        (SUMS[::-1], "data has the checkpoint's prompts and answers in another order"),
        ([SUMS[1], SUMS[0], *SUMS[2:]], "data has the checkpoint's prompts and answers in another order"),
        (changed(answer="4"), "data has the checkpoint's prompts with other answers"),
        (changed(answer="03"), "data has the checkpoint's prompts with other answers"),
        (changed(answer="3 "), "data has the checkpoint's prompts with other answers"),
        (swapped(SUMS, "answer"), "data has the checkpoint's prompts with other answers"),
        (changed(input_ids=[3, 4, 300_001]), "data has the checkpoint's answers, but other prompts"),
        (changed(input_ids=[3, 4, 300_000, 0]), "data has the checkpoint's answers, but other prompts"),
        (swapped(SUMS, "input_ids"), "data has the checkpoint's answers, but other prompts"),
        (changed(input_ids=[1], answer="1"), "data has other prompts and other answers than the"),
    ],
)
def test_a_changed_data_set_is_refused_or_accepted(prompts: list[Prompt], message: str) -> None:
    stream = PromptStream(SUMS, seed=5, shuffle=True)
    stream.next(13)
    state = StreamState.model_validate(json.loads(json.dumps(stream.state_dict())))
    resumed = PromptStream(prompts, seed=5, shuffle=True)
    with pytest.raises(InputError, match=f"^{message}.*: .*data.allow_changed = true$"):
        resumed.load_state_dict(state)
    assert resumed.load_state_dict(state, allow_changed=True).startswith(message)
    # the position stays if it can; otherwise the next epoch begins
    position = (1, 3) if len(prompts) == len(SUMS) else (2, 0)
    assert (resumed.epoch, resumed.position) == position
    again = PromptStream(prompts, seed=5, shuffle=True)
    assert again.load_state_dict(StreamState.model_validate(resumed.state_dict())) == ""


def test_ids_are_not_part_of_the_data() -> None:
    # so that a file can move
    moved = [replace(prompt, id=f"q/{i}") for i, prompt in enumerate(SUMS)]
    state = StreamState.model_validate(PromptStream(SUMS, seed=5, shuffle=True).state_dict())
    assert PromptStream(moved, seed=5, shuffle=True).load_state_dict(state) == ""


def test_another_order_of_the_stream_is_refused() -> None:
    state = StreamState.model_validate(PromptStream(SUMS, seed=5, shuffle=True).state_dict())
    with pytest.raises(
        InputError, match=r"data\.shuffle = false, the checkpoint was written with the opposite"
    ):
        PromptStream(SUMS, seed=5, shuffle=False).load_state_dict(state)


def test_a_state_without_a_fingerprint_is_accepted() -> None:
    state = StreamState(seed=5, epoch=1, position=3, num_prompts=10)
    stream = PromptStream(SUMS, seed=0, shuffle=True)
    assert stream.load_state_dict(state) == ""
    assert (stream.seed, stream.epoch, stream.position) == (5, 1, 3)
