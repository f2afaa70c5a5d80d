"""Environments in their processes: what they may do, and every fault. All with real processes."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.config import DataConfig, RolloutConfig
from megatron_gmpo.errors import InputError, RunError
from megatron_gmpo.rollout.ending import Ending
from megatron_gmpo.rollout.environments import EnvironmentFault, Observation
from megatron_gmpo.rollout.environments.pool import EnvironmentPool
from megatron_gmpo.rollout.environments.worker import maker
from megatron_gmpo.rollout.episode import EpisodeLimits, play
from megatron_gmpo.rollout.response import Context, Response
from megatron_gmpo.rollout.turns import TurnTemplate
from megatron_gmpo.testing.tiny_tokenizers import text_tokenizer

from ..support.forks import ROOT

MODULE = "tests.support.environments"
PROMPT = Prompt("set/7", answer="42", text="a room", input_ids=[1, 2])


def config(name: str = "Obedient", module: str = MODULE, **others: Any) -> RolloutConfig:
    return RolloutConfig(environment=f"{module}:{name}", **others)


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvironmentPool]:
    # blocked as in the trainer (supervision.signals)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    pool = EnvironmentPool(config(environment_args={"greeting": "Hello: "}), seed=5)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def hurried() -> Iterator[EnvironmentPool]:
    """Yield a pool with a short time limit."""
    pool = EnvironmentPool(config("Later", environment_timeout_s=1.0), seed=5)
    yield pool
    pool.close()


async def played(pool: EnvironmentPool, *actions: str, **which: Any) -> list[Observation]:
    """Return the observations of an episode."""
    session = await pool.open(which.get("prompt", PROMPT), which.get("number", 0), which.get("draw", 0))
    try:
        return [await session.reset(), *[await session.step(action) for action in actions]]
    finally:
        await session.close()


def first(pool: EnvironmentPool, **which: Any) -> dict[str, Any]:
    return asyncio.run(played(pool, **which))[0].info


FAULTS = {
    "raises": r"step raised RuntimeError: two lines \(\S+environments.py:\d+\)",
    "recursion": r"step raised RecursionError: maximum recursion depth exceeded.*",
    "exits": r"the process ended in step \(exit code 3\)",
    "exits_at_once": r"the process ended in step \(exit code 0\)",
    "crashes": r"the process ended in step \(signal SIGSEGV\)",
    "closes_everything": r"the process ended in step \(.*\)",
    "floods": r"step returned more than 262144 bytes",
    "floods_info": r"step returned more than 262144 bytes",
    "floods_the_socket": r"step returned more than 262144 bytes",
    "returns_none": r"step returned a value of type NoneType, not an Observation",
    "returns_a_dict": r"step returned a value of type dict, not an Observation",
    "returns_a_set": r"step returned what JSON cannot hold: a set is no number, text, list or dict",
    "returns_text": r"step raised ValueError: message 'Y' has no texts 'role' and 'content' .*",
    "returns_nan": r"step raised ValueError: reward = nan is not finite .*",
    "returns_a_wrong_name": r"step raised ValueError: info\['name'\] = 3 is no str .*",
    "returns_a_list_as_info": r"step raised ValueError: info = \['x'\] is no dict .*",
    "returns_a_text_as_info": r"step raised ValueError: info = 'nothing to tell' is no dict .*",
    "returns_fewer_than_no_calls": r"step raised ValueError: info\['tool_calls'\] = -1 is not from 0 to .*",
    "returns_more_calls_than_a_float_holds": r"step raised ValueError: info\['tool_errors'\] = 10+ is not.*",
    "replaces_the_info": r"step returned nonsense: ValueError",
    "returns_half_a_character": r"step raised UnicodeEncodeError: .* surrogates not allowed .*",
    "changes_an_observation": r"step returned nonsense: ValueError",
    "speaks_nonsense": r"step returned nonsense: JSONDecodeError",
    "speaks_deeply_nested_nonsense": r"step returned nonsense: RecursionError",
}
"""What the environment does -> the fault."""


@pytest.mark.parametrize("action", FAULTS)
def test_faults_end_the_episode_and_its_process(pool: EnvironmentPool, action: str) -> None:
    pid = first(pool)["pid"]
    with pytest.raises(EnvironmentFault) as caught:
        asyncio.run(played(pool, "looks around", action))
    assert re.fullmatch(FAULTS[action], str(caught.value)), caught.value
    assert first(pool)["pid"] != pid
    assert gone(pid)


def gone(*pids: int) -> bool:
    """Return whether the processes have ended after a while."""
    processes = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):  # it has ended already
            processes.append(psutil.Process(pid))
    _, alive = psutil.wait_procs(processes, timeout=30)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["hangs", "hangs_in_c", "hangs_with_a_child", "sleeps"])
def test_a_hanging_call_ends_with_its_processes(hurried: EnvironmentPool, action: str) -> None:
    async def hang() -> None:
        session = await hurried.open(PROMPT, 0, 0)
        worker = psutil.Process((await session.reset()).info["pid"])
        call = asyncio.create_task(session.step(action))
        while action == "hangs_with_a_child" and not worker.children():
            await asyncio.sleep(0.01)
        children = worker.children()
        with pytest.raises(EnvironmentFault, match=r"^step did not return within 1 s$"):
            await call
        assert gone(worker.pid, *(child.pid for child in children))
        assert session.seconds >= 1
        await session.close()

    asyncio.run(hang())


def test_a_fault_of_reset(pool: EnvironmentPool) -> None:
    with pytest.raises(EnvironmentFault, match=r"^reset raised KeyError: "):
        first(pool, prompt=Prompt("bad", ""))


def test_a_process_serves_one_episode_after_another(pool: EnvironmentPool) -> None:
    observations = asyncio.run(played(pool, "look", "go"))
    assert observations[1:] == [
        Observation([{"role": "user", "content": "1: look"}], 0.5),
        Observation([{"role": "user", "content": "2: go"}], 0.5),
    ]
    info = observations[0].info
    assert observations[0].messages == [{"role": "user", "content": "Hello: a room"}]
    prompt = Prompt("set/7", answer="42", text="a room", images=[])  # JSON has no tuples
    assert info["prompt"] == vars(prompt)  # without token ids
    assert info["heavy"] == []
    assert first(pool)["pid"] == info["pid"]
    found = asyncio.run(played(pool, "returns_numpy"))[1]
    assert found == Observation([], 0.25, True, {"score": 3, "name": "x"})


def test_live_episodes_have_processes_of_their_own(pool: EnvironmentPool) -> None:
    async def together() -> set[int]:
        sessions = [await pool.open(PROMPT, number, 0) for number in range(12)]
        found = await asyncio.gather(*(session.reset() for session in sessions))
        await asyncio.gather(*(session.close() for session in sessions))
        return {observation.info["pid"] for observation in found}

    pids = asyncio.run(together())
    assert len(pids) == 12
    assert asyncio.run(together()) == pids


@pytest.mark.slow
def test_episodes_repeat_by_seed_prompt_number_and_draw(pool: EnvironmentPool) -> None:
    def drawn(**which: Any) -> tuple[Any, ...]:
        info = first(pool, **which)
        return (info["seed"], *info["drawn"])

    other = Prompt("set/8", "")
    found = [drawn(), drawn(number=1), drawn(draw=1), drawn(prompt=other)]
    assert len({seed for seed, *_ in found}) == len({value for _, value, *_ in found}) == 4
    again = EnvironmentPool(config(), seed=5)
    pool = again
    try:
        assert [drawn(), drawn(number=1), drawn(draw=1), drawn(prompt=other)] == found
    finally:
        again.close()


def test_what_a_process_says_unasked_reaches_no_other_episode(pool: EnvironmentPool) -> None:
    async def late() -> None:
        await played(pool, "speaks_later")
        await asyncio.sleep(0.5)

    pid = first(pool)["pid"]
    asyncio.run(late())
    assert first(pool)["pid"] != pid
    assert gone(pid)


def test_a_cancelled_call_ends_the_process(pool: EnvironmentPool) -> None:
    async def cancelled() -> int:
        session = await pool.open(PROMPT, 0, 0)
        pid = (await session.reset()).info["pid"]
        call = asyncio.create_task(session.step("hangs"))
        await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await session.close()
        return pid

    assert gone(asyncio.run(cancelled()))


def test_signals_to_the_job_end_no_environment(pool: EnvironmentPool) -> None:
    """But a program that it has started ends on SIGTERM."""
    pid = first(pool)["pid"]
    assert asyncio.run(played(pool, "is_told_to_end"))[1].messages[0]["content"] == str(-signal.SIGTERM)
    assert first(pool)["pid"] == pid


@pytest.mark.slow
def test_output_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    pool = EnvironmentPool(config(), seed=5)
    asyncio.run(played(pool, "prints"))
    pool.close()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == "printed by Python\nwritten to file 1\nclosed after 1 steps\n"


@pytest.mark.slow
def test_asynchronous_environments(hurried: EnvironmentPool) -> None:
    async def between() -> int:
        session = await hurried.open(PROMPT, 0, 0)
        await session.reset()
        await asyncio.sleep(0.3)
        ticks = (await session.step("ticked")).info["ticks"]
        await session.close()
        return ticks

    assert asyncio.run(between()) > 3
    assert asyncio.run(played(hurried, "x"))[1].messages == [{"role": "user", "content": "1: x"}]


def test_a_synchronous_environment_may_run_loops_of_its_own(pool: EnvironmentPool) -> None:
    assert asyncio.run(played(pool, "runs_a_loop"))[1].messages == [{"role": "user", "content": "now"}]


def test_known_values_may_be_numpys() -> None:
    info = {"success": np.True_, "tool_calls": np.int64(2)}
    assert Observation(done=np.True_, info=info).info == {"success": True, "tool_calls": 2}  # pyright: ignore
    for wrong in ({"success": np.int64(1)}, {"tool_calls": np.True_}, {"tool_calls": np.int64(-1)}):
        with pytest.raises(ValueError, match=r"^info\["):
            Observation(info=wrong)


REFUSED = {
    ("no_such_module:Obedient", ""): "= 'no_such_module:Obedient' cannot be imported (No module named",
    ("rooms", ""): "rollout.environment = 'rooms' is unknown: ",
    (f"{MODULE}:Nobody", ""): "has no attribute 'Nobody'): give module:Class on the Python path",
    (f"{MODULE}:no_class", ""): "is not a class with the methods reset and step: give one",
    (f"{MODULE}:NoSteps", ""): "is not a class with the methods reset and step: give one",
    (
        f"{MODULE}:Obedient",
        "gre",
    ): "rollout.environment_args = {'gre': 1} do not fit tests.support.environments",
}
"""Environment and an argument -> the error line."""


@pytest.mark.parametrize(("name", "argument"), REFUSED)
def test_mistakes_are_refused(name: str, argument: str) -> None:
    with pytest.raises(InputError, match=re.escape(REFUSED[name, argument])):
        maker(name, [], {argument: 1} if argument else {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("no_such_module", "cannot be imported (No module named 'no_such_module')"),
        ("tests.support.starts_threads", "starts threads when it is imported"),
    ],
)
def test_mistakes_are_refused_before_the_first_episode(module: str, reason: str) -> None:
    with pytest.raises(InputError, match=re.escape(reason)):
        EnvironmentPool(config(module=module), seed=0)


PLAYED = {
    "waits": ("turns", ""),
    "raises": ("error", "step raised RuntimeError: two lines"),
    "exits": ("error", "the process ended in step (exit code 3)"),
    "returns_none": ("error", "step returned a value of type NoneType, not an Observation"),
    "floods": ("error", "step returned more than 262144 bytes"),
}
"""What the policy says in every turn -> why the episode ends, and the error."""


@pytest.mark.parametrize("action", PLAYED)
def test_the_episode_of_an_endless_or_faulty_environment(pool: EnvironmentPool, action: str) -> None:
    """The sample has the turns up to the limit or the fault."""
    tokenizer: Any = text_tokenizer()
    turn = np.array([*tokenizer(action)["input_ids"], tokenizer.eos_token_id], np.int32)
    task = [{"role": "user", "content": "?"}]
    rendered = tokenizer.apply_chat_template(task, add_generation_prompt=True, tokenize=False)

    async def generate(context: Context, limit: int) -> Response:
        return Response(turn, np.zeros(len(turn), np.float32), np.zeros(len(turn), np.int32), "stop")

    sample = asyncio.run(
        play(
            Prompt("p", "", text="?", messages=task, input_ids=tokenizer(rendered)["input_ids"]),
            0,
            0,
            pool=pool,
            template=TurnTemplate(tokenizer, DataConfig(path="tasks")),
            limits=EpisodeLimits(
                max_turns=3, max_new_tokens=50, max_episode_tokens=999, max_prompt_tokens=199
            ),
            ending=Ending(tokenizer, {tokenizer.eos_token_id}),
            generate=generate,
        )
    )
    ended, error = PLAYED[action]
    assert sample.episode
    assert sample.episode.ended == ended
    assert sample.episode.error.startswith(error)
    assert bool(error) is bool(sample.episode.error)
    assert sample.finish_reason == ("abort" if error else "length")
    assert sample.response_length == len(turn) * (1 if error else 3)
    assert sample.episode.reward == (0 if error else 1.5)


@pytest.mark.slow
def test_the_environment_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Play the game in docs/agents.md by halving what is left."""
    source, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "docs/agents.md").read_text(), re.DOTALL)
    (tmp_path / "guess.py").write_text(source)
    assert len([line for line in source.splitlines() if line]) <= 20
    monkeypatch.syspath_prepend(tmp_path)
    pool = EnvironmentPool(RolloutConfig(environment="guess:Guess", environment_args={"highest": 20}), seed=0)

    async def play(number: int) -> Observation:
        session = await pool.open(Prompt(f"tasks/{number}", ""), 0, 0)
        assert (await session.reset()).messages[0]["content"] == "My number is between 1 and 20."
        assert (await session.step("I do not know.")).messages[0]["content"] == "It is higher."
        low, high = 1, 20
        while not (observation := await session.step(f"Is it {(middle := (low + high) // 2)}?")).done:
            low, high = (middle + 1, high) if "higher" in str(observation.messages) else (low, middle - 1)
            assert low <= high
        await session.close()
        return observation

    try:
        for number in range(5):
            assert asyncio.run(play(number)) == Observation([], 1.0, True, {"success": True})
    finally:
        pool.close()


@pytest.mark.slow
def test_the_end_of_the_process_that_starts_workers() -> None:
    pool = EnvironmentPool(config(), seed=5)

    async def ended() -> None:
        session = await pool.open(PROMPT, 0, 0)
        worker = psutil.Process((await session.reset()).info["pid"])
        os.kill(worker.ppid(), signal.SIGKILL)
        with pytest.raises(EnvironmentFault, match=r"^the process ended in step$"):
            await session.step("hangs")
        assert gone(worker.pid)
        with pytest.raises(RunError, match=r"^the process that starts environments has ended"):
            await pool.open(PROMPT, 0, 0)

    asyncio.run(ended())
    pool.close()


@pytest.mark.slow
def test_no_process_outlives_a_killed_trainer() -> None:
    """The trainer is killed while calls hang; a fork of it keeps its sockets open."""
    trainer = subprocess.Popen(
        [sys.executable, "-m", "tests.support.holds_episodes"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout
    fork, *pids = map(int, trainer.stdout.readline().split())
    try:
        assert len(pids) == 7
        trainer.kill()
        trainer.wait()
        assert gone(*pids)
    finally:
        os.kill(fork, signal.SIGKILL)
        trainer.stdout.close()
