"""Games for ``rollout.environment = "alfworld"``: scenes of ``alfworld_scenes`` in ALFWorld's own format."""

from __future__ import annotations

import json
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from ..data.games import check_no_games
from ..errors import RunError

_GAME_S = 600.0
"""Seconds within which a game must be made; usual are a few."""


def make_alfworld_games(
    out: Path, *, num_train: int, num_unseen: int, seed: int = 0, workers: int = 1
) -> dict[str, int]:
    """Write num_train games on ALFRED's training floor plans and num_unseen on those of its test scenes.

    The six kinds of task take turns. Each game has the folder TASK-OBJECT-None-RECEPTACLE-PLAN/trial_NUMBER,
    as in ALFWorld, with game.tw-pddl, in which ``walkthrough`` has an expert's commands. They are played in
    ALFWorld's engine before the game is written.

    Args:
        workers: number of games that are made at the same time, one in a process.

    Returns:
        Mean number of commands of the solutions, rounded, for each split.

    Raises:
        InputError: the folder has games already.
        RunError: a game took too long, or the expert did not reach the goal.
    """
    check_no_games(out)
    lengths: dict[str, list[int]] = {"train": [], "unseen": []}
    jobs = [("train", number) for number in range(num_train)]
    jobs += [("unseen", number) for number in range(num_unseen)]
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        futures = [pool.submit(make_game, out, split, number, seed) for split, number in jobs]
        for (split, number), future in zip(jobs, futures, strict=True):
            try:
                lengths[split].append(len(future.result(timeout=_GAME_S)))
            except TimeoutError:
                raise RunError(f"game {number} of {split} was not made within {_GAME_S:.0f} s") from None
    return {split: round(sum(found) / len(found)) for split, found in lengths.items() if found}


def make_game(out: Path, split: str, number: int, seed: int) -> list[str]:
    """Write one game and return the commands of its solution."""
    from .alfworld_scenes import PLANS, TASKS, FloorPlan, expert, place, problem

    generator = random.Random(f"{seed} {split} {number}")
    kind = TASKS[number % len(TASKS)]
    plan = generator.choice([plan for plan in map(FloorPlan, PLANS[split]) if plan.tasks(kind)])
    task = generator.choice(plan.tasks(kind))
    objects = place(plan, task, generator)
    game = _game(problem(plan, task, objects), task.words(generator))
    solution = play(game, expert(plan, task, objects))
    folder = out / split / f"{kind}-{task.object}-None-{task.target}-{plan.number}" / f"trial_{number:05d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "game.tw-pddl").write_text(json.dumps(game | {"solvable": True, "walkthrough": solution}))
    return solution


def play(game: dict[str, str], commands: list[str]) -> list[str]:
    """Play commands with the names of PDDL in ALFWorld's engine, and return them with the names of the game.

    Raises:
        RunError: they do not reach the goal.
    """
    import textworld  # pyright: ignore[reportMissingImports]
    from alfworld.agents.environment import alfred_tw_env  # pyright: ignore[reportMissingImports]
    from textworld.envs.pddl import PddlEnv  # pyright: ignore[reportMissingImports]

    engine = PddlEnv(textworld.EnvInfos(admissible_commands=True))
    environment = alfred_tw_env.AlfredDemangler()(engine)
    environment.load(game)
    names = {key: info.name for key, info in environment._entity_infos.items()}
    state = environment.reset()
    # the package writes two spaces after some names
    played = [" ".join(names.get(word.lower(), word) for word in command.split()) for command in commands]
    played = [" ".join(command.split()) for command in played]
    for command in played:
        state, _, _ = environment.step(command)
    environment.close()
    if not state.won:
        raise RunError(f"the expert's commands {played} do not reach the goal: {state.feedback}")
    return played


def _game(problem: str, goal: str) -> dict[str, str]:
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH  # pyright: ignore[reportMissingImports]

    grammar = Path(ALFRED_TWL2_PATH).read_text().replace("UNKNOWN GOAL", goal)
    return {"pddl_domain": Path(ALFRED_PDDL_PATH).read_text(), "grammar": grammar, "pddl_problem": problem}
