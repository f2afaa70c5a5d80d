"""Play an episode: turns of the policy alternate with observations of an environment."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from ..batch.images import ImageRef, PromptImage
from ..batch.samples import Episode, EpisodeEnd, FinishReason, Prompt, Sample, version_spans_of
from .ending import Ending
from .environments import EnvironmentFault, Observation
from .environments.pool import EnvironmentPool, Session
from .episode_images import with_names
from .images import RunImages, StoredImage
from .response import Context, Response
from .turns import TurnTemplate

Generate = Callable[[Context, int], Awaitable[Response]]
"""Sample a turn from the (C,) int32 tokens so far and the maximum number of new tokens."""

_FINISH_REASONS: dict[EpisodeEnd, FinishReason] = {
    "done": "stop",
    "turns": "length",
    "tokens": "length",
    "error": "abort",
}


@dataclass(frozen=True)
class EpisodeLimits:
    """Limits of an episode.

    Attributes:
        max_turns: number of turns.
        max_new_tokens: sampled tokens of one turn.
        max_episode_tokens: tokens after the prompt, of turns and observations together.
        max_prompt_tokens: tokens before the first turn.
    """

    max_turns: int
    max_new_tokens: int
    max_episode_tokens: int
    max_prompt_tokens: int


async def play(
    prompt: Prompt,
    number: int,
    draw: int,
    *,
    pool: EnvironmentPool,
    template: TurnTemplate,
    limits: EpisodeLimits,
    ending: Ending,
    generate: Generate,
    images: RunImages | None = None,
) -> Sample:
    """Play one episode and return its sample, with ``Sample.episode`` set.

    The environment answers every turn, also one that a limit of tokens has cut. An observation after which no
    token could be sampled ends the episode. If the environment fails, the sample has the turns before.

    Args:
        prompt: the task.
        number: number of the sample within its group.
        draw: place of the prompt in the stream, so that a prompt that comes again is played anew.
        pool: makes the environment.
        template: gives the tokens between turns.
        limits: end the episode.
        ending: gives the text of a turn, which is the environment's action.
        generate: samples a turn; its errors end the episode without a sample.
        images: the images of the run; None for a model without vision.
    """
    start = _Trajectory(prompt.input_ids, list(prompt.images))
    course = _Course(prompt, template, limits, ending, generate, images, start)
    session, error = None, ""
    try:
        session = await pool.open(prompt, number, draw)
        ended = await course.run(session)
    except EnvironmentFault as fault:
        ended, error = "error", str(fault)
    finally:
        if session:
            await session.close()
    return course.trajectory.sample(
        text="\n".join(turn[0]["content"] for turn in course.log.turns),
        finish_reason=_FINISH_REASONS[ended],
        episode=course.log.episode(ended, error, session),
    )


@dataclass
class _Log:
    """What policy and environment have said.

    Attributes:
        start: messages of the reset.
        turns: messages of each turn: the policy's, then the observation.
    """

    start: list[dict[str, Any]] = field(default_factory=list)
    turns: list[list[dict[str, Any]]] = field(default_factory=list)
    reward: float = 0.0
    name: str = ""
    success: bool | None = None

    def act(self, text: str) -> None:
        self.turns.append([{"role": "assistant", "content": text}])

    def observe(self, observation: Observation) -> Observation:
        (self.turns[-1] if self.turns else self.start).extend(observation.messages)
        if not isfinite(reward := self.reward + observation.reward):
            raise EnvironmentFault(f"the rewards of the steps add up to {reward}, which is not finite")
        self.reward = reward
        self.name = observation.info.get("name", self.name)
        self.success = observation.info.get("success", self.success)
        return observation

    def episode(self, ended: EpisodeEnd, error: str, session: Session | None) -> Episode:
        return Episode(
            ended=ended,
            name=self.name,
            reward=self.reward,
            success=self.success,
            tool_calls=session.tool_calls if session else 0,
            tool_errors=session.tool_errors if session else 0,
            seconds=session.seconds if session else 0.0,
            messages=[*self.start, *chain.from_iterable(self.turns)],
            error=error,
        )


class _Part(NamedTuple):
    """The columns of a turn or an observation."""

    tokens: np.ndarray
    sampled: bool
    logprobs: np.ndarray
    versions: np.ndarray


@dataclass
class _Trajectory:
    """The columns of a sample, which grow by turns and observations.

    Attributes:
        start: P tokens before the first turn.
        images: the images of the tokens.
    """

    start: Sequence[int] | np.ndarray
    images: list[PromptImage]
    _parts: list[_Part] = field(default_factory=list)
    _experts: list[np.ndarray] = field(default_factory=list)

    @property
    def tokens(self) -> np.ndarray:
        """Return the (P + length,) int32 tokens so far, in an array of their own."""
        parts = [part.tokens for part in self._parts]
        return np.concatenate([np.asarray(self.start, np.int32), *parts], dtype=np.int32)

    @property
    def length(self) -> int:
        """Return the number of tokens after the start."""
        return sum(len(part.tokens) for part in self._parts)

    @property
    def context(self) -> Context:
        """Return the context of the next turn.

        Each token keeps the experts of its first record, so a turn requests only those of later tokens.
        """
        return Context(self.tokens, self.images, recorded=sum(map(len, self._experts)))

    def add_turn(self, turn: Response) -> None:
        """Append a turn that was sampled after ``context``."""
        self._parts.append(_Part(turn.tokens, True, turn.logprobs, turn.versions))
        if turn.routed_experts is not None:
            self._experts.append(turn.routed_experts)

    def add_observation(self, tokens: np.ndarray) -> None:
        """Append tokens that were not sampled. They have the version of the token before them."""
        versions = np.repeat(self._parts[-1].versions[-1:], len(tokens))
        self._parts.append(_Part(tokens, False, np.zeros(len(tokens), np.float32), versions))

    def sample(self, **others: Any) -> Sample:
        """Return the sample; ``others`` are the fields that are no columns."""
        start = len(self.start)
        versions = np.concatenate([np.empty(0, np.int32), *(part.versions for part in self._parts)])
        masks = [np.full(len(part.tokens), part.sampled) for part in self._parts]
        return Sample(
            tokens=self.tokens,
            response_mask=np.concatenate([np.zeros(start, np.bool_), *masks]),
            rollout_logprobs=np.concatenate(
                [np.zeros(start, np.float32), *(p.logprobs for p in self._parts)]
            ),
            policy_version=int(versions.min()) if len(versions) else -1,
            version_spans=version_spans_of(versions, start) if len(versions) else None,
            routed_experts=np.concatenate(self._experts) if self._experts else None,
            images=tuple(image.ref for image in self.images),
            **others,
        )


@dataclass
class _Course:
    """An episode as it is played."""

    prompt: Prompt
    template: TurnTemplate
    limits: EpisodeLimits
    ending: Ending
    generate: Generate
    images: RunImages | None
    trajectory: _Trajectory
    log: _Log = field(default_factory=_Log)

    async def run(self, session: Session) -> EpisodeEnd:
        """Play all turns and return why the episode ended.

        Raises:
            EnvironmentFault: the environment failed, or its messages do not fit prompt or chat template.
        """
        observation, images = await self._observed(session.reset())
        if observation.done:
            raise EnvironmentFault("reset returned an episode that is done")
        start = [*(self.prompt.messages or ()), *observation.messages]
        first = self.template.first(self.prompt, observation.messages)
        self.trajectory.start = self._with_images(first, images, self.prompt.image_refs)
        self.trajectory.images += images
        if (length := len(self.trajectory.start)) > self.limits.max_prompt_tokens:
            raise EnvironmentFault(
                f"prompt {self.prompt.id} and reset's messages have {length} tokens: raise max_prompt_tokens "
                f"= {self.limits.max_prompt_tokens}, or shorten them"
            )
        while True:
            room = self.limits.max_episode_tokens - self.trajectory.length
            turn = await self.generate(self.trajectory.context, min(self.limits.max_new_tokens, room))
            self.trajectory.add_turn(turn)
            previous = self.log.turns[-1] if self.log.turns else []
            self.log.act(self.ending.text(turn.tokens))
            observation, images = await self._observed(session.step(self.ending.action(turn.tokens)))
            if observation.done:
                cut = turn.finish_reason == "length" and observation.info.get("answered", False)
                return "tokens" if cut else "done"
            if len(self.log.turns) == self.limits.max_turns:
                return "turns"
            if not observation.messages:
                raise EnvironmentFault("step returned no messages although the episode is not done")
            if self.images and self.images.image_token in turn.tokens:
                raise EnvironmentFault("the policy sampled the image token, which stands for an image later")
            following = self.template.following(
                start, previous, turn.tokens, observation.messages, self.ending.end_ids
            )
            following = self._with_images(following, images)
            if self.trajectory.length + len(following) >= self.limits.max_episode_tokens:
                return "tokens"
            self.trajectory.add_observation(following)
            self.trajectory.images += images

    async def _observed(self, call: Awaitable[Observation]) -> tuple[Observation, list[StoredImage]]:
        """Return an observation with the names of its images, and these."""
        observation = await call
        messages, images = await with_names(observation.messages, self.images)
        return self.log.observe(replace(observation, messages=messages)), images

    def _with_images(
        self, tokens: np.ndarray, images: list[StoredImage], before: Sequence[ImageRef] = ()
    ) -> np.ndarray:
        """Return the tokens of an observation with all tokens of its images.

        Args:
            before: images whose tokens are the first image tokens, and complete.
        """
        if not self.images or not images:
            return tokens
        complete = int(self.images.tokens_of(before).sum())
        try:
            return self.images.with_repeats(tokens, [image.ref for image in images], complete)
        except ValueError as error:
            raise EnvironmentFault(
                f"the chat template does not show the images of the messages: {error}"
            ) from None
