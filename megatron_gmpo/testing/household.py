"""Tasks of the household game, episodes of its expert, and a tiny Qwen3 that finishes some of the tasks."""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from ..batch.samples import Prompt
from ..rollout.environments.household import PLACES, THINGS, Household, Pair, Task, expert
from .tiny_models import make_tiny_model
from .tiny_tokenizers import dialogue_tokenizer
from .warm_up import warm_up

UNSEEN_SHARE = 0.2
"""Share of the pairs of thing and place that no task of the training data has."""
TURNS = 10
"""Turns in which the expert can finish every task, if it does not wander."""
WANDER = 0.2
"""Share of random commands in the expert episodes.

A model that imitates them knows the commands and their effects, often runs out of turns, and has the entropy
from which reinforcement learning finds the shorter ways."""

_PAIRS = list(product(THINGS, (place for places in PLACES.values() for place in places)))


def make_household(
    out: Path,
    *,
    num_train: int = 2000,
    num_unseen: int = 200,
    num_experts: int = 1000,
    warm_up_steps: int | None = 200,
    seed: int = 0,
) -> tuple[dict[Path, int], float | None]:
    """Write train.jsonl, unseen.jsonl and experts.jsonl, then the folder model, then warm_up.json.

    Tasks have the columns problem and answer, expert episodes messages and answer. No task of train.jsonl or
    experts.jsonl has a pair of thing and place (see ``Task.pair``) of a task of unseen.jsonl.

    Args:
        num_experts: number of expert episodes.
        warm_up_steps: number of batches of expert episodes on which the model is trained. None makes no
            model.

    Returns:
        The number of rows in each file, and the loss of the warm-up.
    """
    generator = random.Random(seed)
    unseen = generator.sample(_PAIRS, int(UNSEEN_SHARE * len(_PAIRS)))
    seen = set(_PAIRS) - set(unseen)
    experts = [
        {"messages": expert_episode(task, generator, WANDER), "answer": task.answer}
        for task in draw_tasks(num_experts, seen, generator)
    ]
    files = {
        "train": [_row(task) for task in draw_tasks(num_train, seen, generator)],
        "unseen": [_row(task) for task in draw_tasks(num_unseen, unseen, generator)],
        "experts": experts,
    }
    counts = {out / f"{name}.jsonl": len(rows) for name, rows in files.items()}
    out.mkdir(parents=True, exist_ok=True)
    for path, rows in zip(counts, files.values(), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if warm_up_steps is None:
        return counts, None
    make_tiny_model(
        out / "model",
        family="qwen3",
        tokenizer=household_tokenizer(),
        num_layers=3,
        ffn_hidden_size=128,
        head_dim=16,
        seed=seed,
    )
    loss = warm_up(out / "model", experts, steps=warm_up_steps, batch_size=32, seed=seed)
    (out / "warm_up.json").write_text(json.dumps({"loss": loss}))
    return counts, loss


def draw_tasks(number: int, pairs: Collection[Pair], generator: random.Random) -> list[Task]:
    """Return ``number`` different tasks whose ``pair`` is one of ``pairs``."""
    found: dict[str, Task] = {}
    while len(found) < number:
        task = Task.draw(generator)
        if task.pair in pairs:
            found[task.answer] = task
    return list(found.values())


def expert_episode(
    task: Task, generator: random.Random | None = None, wander: float = 0.0
) -> list[dict[str, Any]]:
    """Return the messages of an episode that the expert plays, of at most ``TURNS`` turns.

    Args:
        wander: probability of a random possible command, drawn from ``generator``, in place of the expert's.
    """
    game = Household()
    messages = [{"role": "user", "content": task.problem}]
    game.reset(Prompt("", task.answer))
    for _ in range(TURNS):
        if generator and generator.random() < wander:
            command = generator.choice(game.commands())
        else:
            command = expert(game)
        observation = game.step(command)
        messages += [{"role": "assistant", "content": command}, *observation.messages]
        if observation.done:
            break
    return messages


def household_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer in which every word of the game is one token."""
    generator = random.Random(0)
    episodes = [expert_episode(task, generator, wander=0.5) for task in draw_tasks(300, _PAIRS, generator)]
    texts = [message["content"] for episode in episodes for message in episode]
    answer = "You can only go to office, open box, take mug, put mug in box, clean mug."
    return dialogue_tokenizer([*texts, answer])


def _row(task: Task) -> dict[str, str]:
    return {"problem": task.problem, "answer": task.answer}
