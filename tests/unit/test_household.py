"""The household game: rules, feedback, the expert, the words, and the split into seen and unseen tasks."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.errors import InputError
from megatron_gmpo.rollout.environments import Observation
from megatron_gmpo.rollout.environments.household import Household, Task, expert
from megatron_gmpo.testing.household import expert_episode, household_tokenizer, make_household

HOUSE = {
    "kitchen": {"counter": ["mug"], "fridge": ["apple"]},
    "bedroom": {"bed": [], "chest": ["key"]},
}
quick = settings(deadline=None, max_examples=30)
TASKS = st.integers(0, 2**32).map(lambda seed: Task.draw(random.Random(seed)))


def started(task: Task) -> Household:
    game = Household()
    game.reset(Prompt("tasks/0", task.answer))
    return game


def text(observation: Observation) -> str:
    return " ".join(message["content"] for message in observation.messages)


def played(task: Task) -> list[tuple[str, Observation]]:
    """Return the expert's commands and their answers."""
    game, episode = started(task), []
    while not (episode and episode[-1][1].done):
        command = expert(game)
        assert command in game.commands()
        episode.append((command, game.step(command)))
    return episode


@quick
@given(TASKS)
def test_the_expert_finishes_every_task_in_at_most_ten_turns(task: Task) -> None:
    episode = played(task)
    assert len(episode) <= 10
    assert [answer.info["success"] for _, answer in episode] == [answer.done for _, answer in episode]
    rewards = [answer.reward for _, answer in episode]
    assert sum(rewards) == pytest.approx(1)
    assert sum(map(bool, rewards)) == {"take": 1, "put": 2, "clean": 3}[task.kind]


@quick
@given(TASKS, st.randoms())
def test_the_expert_finishes_what_a_wanderer_has_left(task: Task, generator: random.Random) -> None:
    game = started(task)
    done = any(game.step(generator.choice(game.commands())).done for _ in range(generator.randrange(30)))
    for _ in range(15):
        if done:
            break
        done = game.step(expert(game)).done
    assert done


@quick
@given(TASKS, st.randoms())
def test_the_expert_searches_as_if_it_did_not_know_the_place(task: Task, generator: random.Random) -> None:
    house = {room: {place: [] for place in places} for room, places in task.house.items()}
    room = generator.choice(list(house))
    house[room][generator.choice(list(house[room]))].append(task.thing)  # the only thing, somewhere else
    searches = []
    for start in (task.house, house):
        commands = [command for command, _ in played(replace(task, house=start))]
        searches.append(commands[: commands.index(f"take {task.thing}")])
    short, long = sorted(searches, key=len)
    assert long[: len(short)] == short


def test_an_episode_in_words() -> None:
    game = started(Task("clean", "key", "fridge", HOUSE))
    dialogue = {
        "go to bedroom": "The bed is empty. The chest is closed.",
        "open chest": "The chest has a key.",
        "Take  KEY": "You have the key.",
        "go to kitchen": "The counter has a mug. The fridge is closed. There is a sink.",
        "clean key": "The key is clean.",
        "open fridge": "The fridge has an apple.",
        "put key in fridge": "The key is in the fridge.",
    }
    assert [text(game.step(command)) for command in dialogue] == list(dialogue.values())


def test_a_task_is_rewarded_step_by_step_and_once() -> None:
    game = started(Task("clean", "mug", "bed", HOUSE))
    rewards = {
        "go to kitchen": 0,
        "take mug": 1 / 3,
        "put mug on counter": 0,
        "take  mug": 0,  # for the second time
        "go to bedroom": 0,
        "put mug on bed": 0,  # not clean yet
        "take mug ": 0,
        "go to  kitchen": 0,
        "clean mug": 1 / 3,
        "go to bedroom ": 0,
        "put mug  on bed": 1 / 3,
    }
    assert [game.step(command).reward for command in rewards] == pytest.approx(list(rewards.values()))


@pytest.mark.parametrize(
    "action", ["", "mug", "take apple", "open bed", "go to office", "_look bed", "put mug on bed", "🍎\n" * 9]
)
def test_an_action_that_is_not_possible_is_answered_by_those_that_are(action: str) -> None:
    game = started(Task("take", "apple", "", HOUSE))
    game.step("go to kitchen")
    observation = game.step(action)
    assert text(observation) == "You can only go to bedroom, open fridge, take mug."
    assert (observation.reward, observation.done) == (0, False)
    game.step("open fridge")
    assert game.step("take apple").done, "the action has changed the house"


@quick
@given(TASKS, st.randoms())
def test_every_possible_command_is_answered(task: Task, generator: random.Random) -> None:
    game, total = started(task), 0.0
    for _ in range(30):
        observation = game.step(generator.choice(game.commands()))
        total += observation.reward
        assert text(observation)
        assert "only" not in text(observation)
        if observation.done:
            break
    assert observation.info["success"] == (total == pytest.approx(1))


@pytest.mark.parametrize("answer", ["42", "{}", "[]", "mug", Task("put", "key", "desk", HOUSE).answer])
def test_an_answer_without_a_task_is_refused(answer: str) -> None:
    with pytest.raises(
        InputError, match="answer of gsm8k/7 is no household task: make them with megatron-gmpo"
    ):
        Household().reset(Prompt("gsm8k/7", answer))


def test_no_unseen_task_has_a_pair_of_the_training_tasks_or_the_expert_episodes(tmp_path: Path) -> None:
    counts, loss = make_household(tmp_path, num_train=300, num_unseen=50, num_experts=40, warm_up_steps=None)
    assert (list(counts.values()), loss) == ([300, 50, 40], None)
    rows = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in counts}
    train, unseen, experts = (
        [Task.read(Prompt("", row["answer"])) for row in rows[name]]
        for name in ("train", "unseen", "experts")
    )
    assert len({task.answer for task in train + unseen}) == 350
    assert {task.pair for task in train + experts} & {task.pair for task in unseen} == set()
    assert {task.kind for task in train} == {task.kind for task in unseen} == {"take", "put", "clean"}
    # the pair in the words of the episode: the thing that is taken, and where it is put or was first seen
    for row, task in zip(rows["experts"], experts, strict=True):
        shown = " ".join(message["content"] for message in row["messages"])
        goal = r"Put the (?:clean )?(\w+) (?:in|on) the (\w+)\." if task.place else r"Take the (\w+)\."
        named = re.match(goal, shown)
        assert named
        seen = re.search(rf"The (\w+) has [^.]*\b{named[1]}\b", shown)
        assert task.pair == (named[1], named[2] if task.place else seen and seen[1])


def test_every_word_of_the_game_is_one_token_and_the_masks_are_the_experts_turns() -> None:
    tokenizer = household_tokenizer()
    for seed in range(20):
        generator = random.Random(seed)
        messages = expert_episode(Task.draw(generator), generator, wander=0.5)
        for content in (message["content"] for message in messages):
            assert len(tokenizer(content)["input_ids"]) == len(re.findall(r"\w+|[.,]", content))
        encoded = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, return_tensors="np"
        )
        trained = encoded["input_ids"][0][encoded["assistant_masks"][0].astype(bool)]
        turns = [message["content"] for message in messages if message["role"] == "assistant"]
        assert tokenizer.decode(trained) == "".join(turn + "<|end|>" for turn in turns)
