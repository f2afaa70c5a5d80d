"""Folders of games as prompts, the games of TextWorld and ALFWorld, and their generators."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.config import DataConfig, RolloutConfig
from megatron_gmpo.data.rows import Row, read_rows
from megatron_gmpo.errors import InputError
from megatron_gmpo.rollout.environments import Environment, Observation
from megatron_gmpo.rollout.environments.pool import EnvironmentPool
from megatron_gmpo.testing.alfworld_games import make_alfworld_games
from megatron_gmpo.testing.textworld_games import Quest, commands_of, make_textworld_games

needs_games = pytest.mark.skipif(
    importlib.util.find_spec("alfworld") is None,
    reason="TextWorld and ALFWorld are not installed: run make games",
)


def rows(folder: Path) -> list[Row]:
    return list(read_rows(DataConfig(path=str(folder)), "data"))


def write_game(folder: Path, **fields: Any) -> Path:
    """Write what ``data.games`` reads of a game of ALFWorld 0.4.2."""
    folder.mkdir(parents=True)
    grammar = '{"task": [{"rhs": "Your task is to: put some mug on desk."}]}'
    path = folder / "game.tw-pddl"
    path.write_text(json.dumps({"grammar": grammar, "solvable": True} | fields))
    return path


def test_a_folder_of_games_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    second = write_game(tmp_path / "pick_and_place_simple-Mug-None-Desk-301" / "trial_2")
    first = write_game(tmp_path / "pick_and_place_simple-Mug-None-Desk-301" / "trial_1")
    write_game(tmp_path / "pick_and_place_simple-Mug-None-Desk-301" / "trial_3", solvable=False)
    write_game(tmp_path / "pick_and_place_with_movable_recep-Mug-Plate-Desk-301" / "trial_4")
    write_game(tmp_path / "pick_and_place_simple-AppleSliced-None-Desk-301" / "trial_5")
    (tmp_path / "quest.z8").write_bytes(b"")
    (tmp_path / "quest.json").write_text(json.dumps({"objective": "Open the box!"}))
    assert [(row.problem, row.answer) for row in rows(tmp_path)] == [
        ("Your task is to: put some mug on desk.", str(first)),
        ("Your task is to: put some mug on desk.", str(second)),
        ("Open the box!", str(tmp_path / "quest.z8")),
    ]


def test_a_game_without_a_goal_is_refused(tmp_path: Path) -> None:
    path = write_game(tmp_path / "a" / "b", grammar="")
    with pytest.raises(InputError, match=f"cannot be loaded \\({path} names no task\\)"):
        rows(tmp_path)
    (tmp_path / "z.z8").write_bytes(b"")
    write_game(tmp_path / "c" / "d")
    path.unlink()
    with pytest.raises(InputError, match=r"cannot be loaded \(.*z\.json"):
        rows(tmp_path)


def test_a_folder_without_games_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"without games: name its files in data\.files"):
        rows(tmp_path)


def test_games_are_not_written_to_a_folder_with_games(tmp_path: Path) -> None:
    path = write_game(tmp_path / "train" / "a" / "b")
    before = path.read_text()
    with pytest.raises(InputError, match="has 1 games already: remove them, or choose another"):
        make_alfworld_games(tmp_path, num_train=1, num_unseen=1)
    with pytest.raises(InputError, match="has 1 games already: remove them, or choose another"):
        make_textworld_games(tmp_path, Quest(), num_train=1, num_unseen=1)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]
    assert path.read_text() == before


def play(make: Callable[[], Environment], row: Row, commands: list[str]) -> list[Observation]:
    """Return the observations of an episode."""
    game: Any = make()
    seen = [game.reset(Prompt(row.id, row.answer))]
    for command in commands:
        assert not seen[-1].done
        seen.append(game.step(command))
    game.close()
    return seen


def text(observation: Observation) -> str:
    (message,) = observation.messages
    assert message["role"] == "user"
    return message["content"]


@needs_games
@pytest.mark.parametrize(
    ("turn", "command"),
    [
        ("go east", "go east"),
        ("I think so.\n go  east \n\n", "go east"),
        ("<think>go west</think> I <action>go\neast</action> now", "east"),
        ("<action>go west</action><action>go east</action>", "go east"),
        ("<action>go west</action></think>go east", "go east"),
        ("", "look"),
        ("x" * 1_000_000, "x" * 200),
    ],
)
def test_the_command_of_a_turn(turn: str, command: str) -> None:
    from megatron_gmpo.rollout.environments.games import command_in

    assert command_in(turn) == command


@needs_games
@pytest.mark.slow
@pytest.mark.parametrize("name", ["alfworld", "textworld"])
def test_the_processes_of_environments_import_the_games(name: str) -> None:
    args = {"admissible_commands": False}
    EnvironmentPool(RolloutConfig(environment=name, environment_args=args), seed=0).close()
    with pytest.raises(InputError, match=r"environment_args = .* do not fit"):
        EnvironmentPool(RolloutConfig(environment=name, environment_args={"rooms": 3}), seed=0)


@needs_games
@pytest.mark.slow
def test_textworld(tmp_path: Path) -> None:
    from megatron_gmpo.rollout.environments.games import TextWorld

    kind = Quest(rooms=2, objects=4, quest_length=2)
    for folder in ("a", "b"):
        make_textworld_games(tmp_path / folder, kind, num_train=1, num_unseen=1, seed=3, workers=2)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"train", "unseen"}
    (train,), (unseen,) = rows(tmp_path / "a" / "train"), rows(tmp_path / "a" / "unseen")
    expert = commands_of(Path(train.answer))
    assert len(expert) == 2
    assert expert != commands_of(Path(unseen.answer))
    assert expert == commands_of(Path(train.answer.replace("/a/", "/b/")))  # of the seed alone

    start, lost, *_, end = play(TextWorld, train, ["fly", *expert])
    assert all(f"Available commands: {expert[0]}" in text(o) or expert[0] in text(o) for o in (start, lost))
    assert (start.reward, lost.reward, lost.done) == (0.0, 0.0, False)
    assert (end.reward, end.done, end.info) == (1.0, True, {"name": "textworld", "success": True})
    assert "$$" not in text(start)
    assert "RESTART" not in text(end)

    # TextWorld's own policy gains 1 with each of the expert's commands
    seen = play(lambda: TextWorld(admissible_commands=False, intermediate_reward=0.25), train, expert)
    assert [observation.reward for observation in seen] == [0.0, 0.25, 1.25]
    assert "Available" not in text(seen[0])


@needs_games
@pytest.mark.slow
def test_alfworld(tmp_path: Path) -> None:
    from megatron_gmpo.rollout.environments.games import ALFWorld
    from megatron_gmpo.testing.alfworld_scenes import PLANS, TASKS

    make_alfworld_games(tmp_path, num_train=6, num_unseen=1, seed=1, workers=2)
    kinds = set()
    for split in ("train", "unseen"):
        for row in rows(tmp_path / split):
            kind, *_, plan = Path(row.answer).parts[-3].split("-")
            assert int(plan) in PLANS[split]
            kinds |= {kind}
            expert = json.loads(Path(row.answer).read_text())["walkthrough"]
            start, nothing, *_, end = play(ALFWorld, row, ["dance", *expert])
            assert text(start).startswith("You are in the middle of a room.")
            assert row.problem in text(start)
            assert expert[0] in text(start).partition("Available commands: ")[2].split(", ")
            assert text(nothing).startswith("Nothing happens.")
            assert (nothing.reward, nothing.done) == (0.0, False)
            assert (end.reward, end.done, end.info) == (1.0, True, {"name": kind, "success": True})
    assert kinds == set(TASKS)
    assert not set(PLANS["train"]) & set(PLANS["unseen"])


@needs_games
@pytest.mark.slow
def test_every_floor_plan_has_tasks_and_every_task_floor_plans() -> None:
    from megatron_gmpo.testing.alfworld_scenes import PLANS, TASKS, FloorPlan

    for plans in PLANS.values():
        found = {plan: {kind for kind in TASKS if FloorPlan(plan).tasks(kind)} for plan in plans}
        assert all(found.values())
        assert set().union(*found.values()) == set(TASKS)
