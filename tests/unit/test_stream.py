"""The stream of prompts resumes exactly, and refuses another data set."""

from __future__ import annotations

import json

import pytest

from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.data.stream import PromptStream
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
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = PromptStream(prompts_of(10), seed=99, shuffle=shuffle)
    resumed.load_state_dict(state)
    assert ids(resumed.next(33)) == ids(stream.next(33))
    assert resumed.state_dict() == stream.state_dict()


def test_stream_refuses_the_state_of_another_data_set() -> None:
    state = PromptStream(prompts_of(10), seed=5, shuffle=True).state_dict()
    with pytest.raises(InputError, match="data has 9 prompts, the checkpoint's data had 10"):
        PromptStream(prompts_of(9), seed=5, shuffle=True).load_state_dict(state)
