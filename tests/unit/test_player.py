"""The player of a config: what it refuses, and the limits of its episodes."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_gmpo.config import Config
from megatron_gmpo.errors import InputError
from megatron_gmpo.rollout.player import Player, make_player
from megatron_gmpo.testing.tiny_tokenizers import text_tokenizer


def player_of(positions: int = 2048, **sections: Any) -> Player | None:
    rollout = {"environment": "tests.support.games:Echo", "max_new_tokens": 100} | sections.pop("rollout", {})
    return make_player(Config.model_validate({"rollout": rollout, **sections}), text_tokenizer(), positions)


def test_without_an_environment_there_is_none() -> None:
    assert player_of(rollout={"environment": ""}) is None


@pytest.mark.parametrize(
    ("positions", "of_data", "of_benchmark", "expected"),
    [(2048, 200, 300, 300), (2048, 300, 200, 300), (600, 200, 300, 200), (450, 200, 200, 50)],
)
def test_a_prompt_and_its_episode_fit_into_the_positions(
    positions: int, of_data: int, of_benchmark: int, expected: int
) -> None:
    """An episode has 4 x 100 tokens. The longest prompt of any set is played, if the positions allow it."""
    heldout = {"path": "x", "max_prompt_tokens": of_benchmark}
    player = player_of(positions, data={"max_prompt_tokens": of_data}, eval={"sets": {"heldout": heldout}})
    assert player
    assert (player.limits.max_episode_tokens, player.limits.max_prompt_tokens) == (400, expected)


@pytest.mark.parametrize("field", ["use_chat_template", "chat_template_kwargs"])
def test_a_benchmark_has_the_chat_template_of_the_training_data(field: str) -> None:
    value = {"use_chat_template": True, "chat_template_kwargs": {"enable_thinking": False}}[field]
    with pytest.raises(
        InputError, match=rf"eval\.sets\.heldout\.{field} = .*: episodes have one .*data\.{field}"
    ):
        player_of(eval={"sets": {"heldout": {"path": "x", field: value}}})
