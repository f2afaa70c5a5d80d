"""Episodes: the sample has what the policy was given and what it sampled, to the token, and why it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from math import isfinite
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gmpo.batch.samples import Prompt, Sample
from megatron_gmpo.config import DataConfig
from megatron_gmpo.errors import ServerError
from megatron_gmpo.rollout.ending import Ending
from megatron_gmpo.rollout.environments import EnvironmentFault, Observation
from megatron_gmpo.rollout.episode import EpisodeLimits, play
from megatron_gmpo.rollout.response import Context, Response
from megatron_gmpo.rollout.turns import TurnTemplate
from megatron_gmpo.testing.tiny_tokenizers import text_tokenizer

TOKENIZER = text_tokenizer()
END = TOKENIZER.eos_token_id
ENDING = Ending(TOKENIZER, {END})
LIMITS = EpisodeLimits(max_turns=4, max_new_tokens=8, max_episode_tokens=500, max_prompt_tokens=200)
OPENING, CLOSING = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n"


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


PROMPT = Prompt(
    id="rooms/7",
    answer="",
    messages=[{"role": "user", "content": "Leave."}],
    input_ids=ids(OPENING.format("Leave.") + CLOSING),
)


@cache
def template() -> TurnTemplate:
    return TurnTemplate(TOKENIZER, DataConfig(path="rooms"))


@dataclass
class Script:
    """A pool of one session that says what it is told, and raises where it is told an error."""

    reset_with: Observation | Exception
    steps: Sequence[Observation | Exception]
    tool_calls: int = 3
    tool_errors: int = 1
    seconds: float = 0.5
    actions: list[str] = field(default_factory=list)
    opened: tuple[Any, ...] = ()
    closed: int = 0

    async def open(self, *place: Any) -> Script:
        self.opened = place
        return self

    async def reset(self) -> Observation:
        return _said(self.reset_with)

    async def step(self, action: str) -> Observation:
        self.actions.append(action)
        return _said(self.steps[len(self.actions) - 1])

    async def close(self) -> None:
        self.closed += 1


def _said(word: Observation | Exception) -> Observation:
    if isinstance(word, Exception):
        raise word
    return word


@dataclass
class Policy:
    """Samples the turns it is told, cut at the limit, and keeps what it was given.

    The routed experts of a turn name the turn in every row. A turn records no row a second time.
    """

    turns: Sequence[list[int]]
    given: list[np.ndarray] = field(default_factory=list)
    answered: list[Response] = field(default_factory=list)

    async def generate(self, context: Context, limit: int) -> Response:
        assert isinstance(context.tokens, np.ndarray)
        assert context.tokens.dtype == np.int32
        number = len(self.given)
        tokens = np.array(self.turns[number][:limit], np.int32)
        self.given.append(context.tokens.copy())
        response = Response(
            tokens,
            logprobs=-1 - np.arange(len(tokens), dtype=np.float32) - 10 * number,
            versions=np.full(len(tokens), 5 + number, np.int32),
            finish_reason="stop" if tokens[-1] == END else "length",
            routed_experts=np.full(
                (len(context) + len(tokens) - 1 - context.recorded, 2, 1), number, np.uint8
            ),
        )
        self.answered.append(response)
        return response


def played(script: Script, policy: Policy, limits: EpisodeLimits = LIMITS, prompt: Prompt = PROMPT) -> Sample:
    pool: Any = script
    return asyncio.run(
        play(
            prompt,
            2,
            31,
            pool=pool,
            template=template(),
            limits=limits,
            ending=ENDING,
            generate=policy.generate,
        )
    )


def turn(text: str, end: bool = True) -> list[int]:
    return ids(text) + [END] * end


def said(*contents: str, **others: Any) -> Observation:
    return Observation([{"role": "user", "content": content} for content in contents], **others)


def between(observation: Observation, ended: bool) -> list[int]:
    """Return the tokens of an observation in ChatML."""
    contents = [OPENING.format(message["content"]) for message in observation.messages]
    return ids("<|im_end|>" * (not ended) + "\n" + "".join(contents) + CLOSING)


def test_columns_of_an_episode() -> None:
    script = Script(
        Observation(),
        [
            said("A door.", reward=0.5, info={"name": "two_rooms", "success": False}),
            said("Open.", "A room.", reward=0.25),
            said("Free.", reward=1.0, done=True, info={"success": True}),
        ],
    )
    turns = [turn("look"), turn("abcdefghij", end=False), turn("go")]
    policy = Policy(turns)
    sample = played(script, policy)

    cut = turns[1][:8]  # at max_new_tokens
    first, second = between(script.steps[0], True), between(script.steps[1], False)
    after = [*turns[0], *first, *cut, *second, *turns[2]]
    start = len(PROMPT.input_ids)
    assert sample.tokens.tolist() == PROMPT.input_ids + after
    runs = [start, 5, len(first), 8, len(second), 3]
    assert sample.response_mask.tolist() == np.repeat([False, True] * 3, runs).tolist()
    logprobs = [
        [-1, -2, -3, -4, -5],
        [0] * len(first),
        range(-11, -19, -1),
        [0] * len(second),
        [-21, -22, -23],
    ]
    assert sample.rollout_logprobs.tolist() == [0] * start + [x for part in logprobs for x in part]
    assert (sample.response_length, sample.num_turns) == (16, 3)
    bounds = np.cumsum([start, 5 + len(first), 8 + len(second)])
    assert sample.version_spans is not None
    assert sample.version_spans.tolist() == [[at, 5 + i] for i, at in enumerate(bounds.tolist())]
    assert (sample.policy_version, sample.version_sum) == (5, 5 * 5 + 8 * 6 + 3 * 7)
    # a row belongs to an input token: the last token of a turn is an input of the next turn
    rows = [0] * (start + 4) + [1] * (1 + len(first) + 7) + [2] * (1 + len(second) + 2)
    assert sample.routed_experts is not None
    assert sample.routed_experts[:, 0, 0].tolist() == rows
    assert sample.routed_experts.shape == (len(sample.tokens) - 1, 2, 1)

    assert script.opened == (PROMPT, 2, 31)
    assert script.actions == ["look", "abcdefgh", "go"]
    assert script.closed == 1
    assert sample.text == "look\nabcdefgh\ngo"
    assert sample.finish_reason == "stop"
    episode = sample.episode
    assert episode is not None
    assert (episode.ended, episode.name, episode.reward, episode.success) == ("done", "two_rooms", 1.75, True)
    assert (episode.tool_calls, episode.tool_errors, episode.seconds, episode.error) == (3, 1, 0.5, "")
    assert [message["content"] for message in episode.messages] == [
        "look", "A door.", "abcdefgh", "Open.", "A room.", "go", "Free.",
    ]  # fmt: skip


GO, WAIT = turn("go"), said("A room.")
LENGTH = len(GO) + len(between(WAIT, True))


@pytest.mark.parametrize(
    ("steps", "limits", "ended", "turns"),
    [
        ([said("Free.", done=True)], {}, "done", 1),
        ([WAIT] * 4, {}, "turns", 4),
        ([WAIT] * 3 + [said(done=True)], {}, "done", 4),
        ([WAIT] * 9, {"max_turns": 1}, "turns", 1),
        # room for one more token after the second observation, and for none
        ([WAIT] * 9, {"max_episode_tokens": 2 * LENGTH + 1}, "tokens", 3),
        ([WAIT] * 9, {"max_episode_tokens": 2 * LENGTH}, "tokens", 2),
        # the first turn is cut: its observation does not fit
        ([WAIT] * 9, {"max_episode_tokens": 2}, "tokens", 1),
        ([said(done=True)], {"max_episode_tokens": 2}, "done", 1),
        ([said(done=True, info={"answered": True})], {}, "done", 1),
        ([said(done=True, info={"answered": True})], {"max_episode_tokens": 2}, "tokens", 1),
        ([said("x" * 1000)], {}, "tokens", 1),
    ],
)
def test_why_an_episode_ends(
    steps: list[Observation], limits: dict[str, int], ended: str, turns: int
) -> None:
    script = Script(Observation(), steps)
    bounds = EpisodeLimits(**{**vars(LIMITS), **limits})
    sample = played(script, Policy([GO] * 9), bounds)
    assert sample.episode is not None
    assert (sample.episode.ended, sample.num_turns, len(script.actions)) == (ended, turns, turns)
    assert sample.finish_reason == ("stop" if ended == "done" else "length")
    assert len(sample.tokens) - len(PROMPT.input_ids) <= bounds.max_episode_tokens
    assert bool(sample.response_mask[-1])
    # the observation that has no tokens is told all the same
    assert len(sample.episode.messages) == turns + sum(len(step.messages) for step in steps[:turns])


FAULT = EnvironmentFault("ValueError: no such room")


@pytest.mark.parametrize(
    ("reset", "steps", "turns", "words"),
    [
        (FAULT, [], 0, ["no such room"]),
        (Observation(done=True), [], 0, ["reset returned an episode that is done"]),
        (said("x" * 200), [], 0, ["rooms/7", "max_prompt_tokens = 200"]),
        (Observation(), [FAULT], 1, ["no such room"]),
        (Observation(), [WAIT, WAIT, FAULT], 3, ["no such room"]),
        (Observation(), [Observation()], 1, ["no messages"]),
        (Observation(), [said("x", reward=1e308)] * 2, 2, ["add up to inf, which is not finite"]),
        (Observation(), [Observation([{"role": "narrator", "content": "x"}])], 1, ["role 'narrator'"]),
    ],
)
def test_a_failed_environment(
    reset: Observation | Exception, steps: list[Any], turns: int, words: list[str]
) -> None:
    """The sample has the turns before the failure, and says what failed."""
    script = Script(reset, steps)
    sample = played(script, Policy([GO] * 9))
    assert sample.episode is not None
    assert (sample.episode.ended, sample.finish_reason, sample.num_turns) == ("error", "abort", turns)
    assert all(word in sample.episode.error for word in words)
    assert isfinite(sample.episode.reward)
    assert (sample.policy_version, sample.response_length) == ((5, 3 * turns) if turns else (-1, 0))
    assert script.closed == 1


def test_an_error_of_the_engine_is_no_episode() -> None:
    async def generate(*_: Any) -> Response:
        raise ServerError("no server is left")

    script, policy = Script(Observation(), []), Policy([])
    policy.generate = generate
    with pytest.raises(ServerError):
        played(script, policy)
    assert script.closed == 1


def test_a_pool_without_a_process() -> None:
    class Pool(Script):
        async def open(self, *_: Any) -> Script:
            raise FAULT

    sample = played(Pool(Observation(), []), Policy([]))
    assert sample.episode is not None
    assert (sample.episode.error, sample.episode.seconds) == ("ValueError: no such room", 0.0)
    assert sample.tokens.tolist() == PROMPT.input_ids


def test_messages_of_the_reset_are_part_of_the_prompt() -> None:
    script = Script(said("A room.", reward=0.25), [said(done=True, reward=1.0)])
    sample = played(script, Policy([GO]))
    start = ids(OPENING.format("Leave.") + OPENING.format("A room.") + CLOSING)
    assert sample.tokens.tolist() == start + GO
    assert sample.episode is not None
    assert sample.episode.reward == 1.25
    assert [m["content"] for m in sample.episode.messages] == ["A room.", "go"]


tokens = st.lists(st.integers(0, len(TOKENIZER) - 1), min_size=1, max_size=12)
contents = st.lists(st.text(st.sampled_from("ab \n<|im_end|>"), max_size=9), min_size=1, max_size=2)


@given(
    turns=st.lists(tokens, min_size=5, max_size=5),
    steps=st.lists(contents, min_size=5, max_size=5),
    max_turns=st.integers(1, 5),
    max_new_tokens=st.integers(1, 12),
    max_episode_tokens=st.integers(12, 400),
)
@settings(max_examples=30, deadline=None)
def test_tokens_are_those_that_the_policy_saw(
    turns: list[list[int]], steps: list[list[str]], **limits: int
) -> None:
    """Whatever is sampled, also ids that no text encodes to, stays as it is in all later contexts."""
    script = Script(Observation(), [said(*texts) for texts in steps])
    policy = Policy(turns)
    sample = played(script, policy, EpisodeLimits(**limits, max_prompt_tokens=200))
    assert sample.num_turns == len(policy.given) == len(policy.answered) <= limits["max_turns"]
    assert len(sample.tokens) - len(PROMPT.input_ids) <= limits["max_episode_tokens"]
    sampled = np.zeros(len(sample.tokens), np.bool_)
    whole = [*policy.given[1:], sample.tokens]
    for context, answer, later in zip(policy.given, policy.answered, whole, strict=True):
        bounds = slice(len(context), len(context) + len(answer.tokens))
        assert np.array_equal(sample.tokens[: bounds.start], context)
        assert np.array_equal(later[bounds], answer.tokens)
        assert np.array_equal(sample.rollout_logprobs[bounds], answer.logprobs)
        assert np.array_equal(sample.token_versions[bounds], answer.versions)
        sampled[bounds] = True
    assert np.array_equal(sample.response_mask, sampled)
    assert not sample.rollout_logprobs[~sampled].any()
    assert np.array_equal(policy.given[0], PROMPT.input_ids)
