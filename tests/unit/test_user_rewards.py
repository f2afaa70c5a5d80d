"""Whatever a user's reward does, the run ends with one line that names the function and the prompt."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.config import RewardConfig
from megatron_gmpo.errors import Exit, InputError, RunError
from megatron_gmpo.rewards import resolve_reward
from megatron_gmpo.rollout.collect import score

PROMPT = Prompt("set/7", answer="")

# body of the function -> what the line says; a value is the input's mistake, an exception a crash
BAD_VALUES = {
    "return None": "returned None",
    "return 10**400": "returned 10000",
    "return 10**5000": "returned a int",  # Python refuses to print so many digits
    "return -(10**400)": "returned -1000",
    "return float('nan')": "returned nan",
    "return float('inf')": "returned inf",
    "return 'good'": "returned 'good'",
    "return [1.0, 2.0]": "returned [1.0, 2.0]",
    "return {'score': 1.0}": "returned {'score': 1.0}",
    "return 1j": "returned 1j",
    "return torch.ones(2)": "returned tensor([1., 1.])",
    "return Odd()": "returned <Odd instance",
    "async def f(): return 1.0\n    found = f(); found.close(); return found": "returned <coroutine ob",
    "return Lines()": "returned two lines",
    "return 'x' * 10**6": "returned 'xxxx",
}
RAISES = {
    "return 1 / 0": "raised ZeroDivisionError: division by zero",
    "return [][3]": "raised IndexError: list index out of range",
    "raise ValueError('two\\nlines')": "raised ValueError: two lines",
    "sys.exit()": "raised SystemExit:",
    "sys.exit(0)": "raised SystemExit: 0",
    "sys.exit('over')": "raised SystemExit: over",
    "raise KeyboardInterrupt": "raised KeyboardInterrupt:",
    "raise GeneratorExit": "raised GeneratorExit:",
    "return reward(prompt, response)": "raised RecursionError: maximum recursion depth exceeded",
    "assert prompt.answer": "raised AssertionError:",
}
GOOD = {"return 1": 1.0, "return True": 1.0, "return torch.tensor(0.5)": 0.5, "return '0.25'": 0.25}
HEADER = """import os, sys, torch

class Odd:
    def __float__(self): return 1 / 0
    def __repr__(self): return 1 / 0

class Lines:
    def __repr__(self): return "two\\nlines"

def reward(prompt, response):
    """


def defined_by(body: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "own_reward.py").write_text(HEADER + body + "\n")
    monkeypatch.syspath_prepend(folder)
    sys.modules.pop("own_reward", None)
    return resolve_reward(RewardConfig(name="own_reward:reward"))


@pytest.mark.parametrize("body", [*BAD_VALUES, *RAISES])
def test_one_line_names_function_and_prompt(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = defined_by(body, tmp_path, monkeypatch)
    with pytest.raises(RunError) as caught:
        reward(PROMPT, "x")
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 400
    assert line.startswith(f"reward.name = 'own_reward:reward' {(BAD_VALUES | RAISES)[body]}")
    assert " for set/7" in line
    if body in BAD_VALUES:
        assert caught.value.exit == Exit.BAD_INPUT
        assert line.endswith("for set/7: return a finite number")
    else:
        assert caught.value.exit == Exit.FAILED
        assert f"({tmp_path / 'own_reward.py'}:11)" in line
        assert caught.value.__cause__ is not None  # its traceback goes to the run folder


@pytest.mark.parametrize("body", GOOD)
def test_what_is_a_number_is_accepted(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert defined_by(body, tmp_path, monkeypatch)(PROMPT, "x") == GOOD[body]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream_is_blamed_on_the_function(
    stream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "stream").open("w") as file:
        monkeypatch.setattr(sys, stream, file)
        reward = defined_by(f"sys.{stream}.close(); return 1.0", tmp_path, monkeypatch)
        line = f"reward.name = 'own_reward:reward' closed {stream} for set/7: leave it open"
        with pytest.raises(InputError, match=f"^{line}$"):
            reward(PROMPT, "x")
        assert reward is not None
        monkeypatch.setattr(sys, stream, None)  # a process started without the stream
        assert defined_by("return 1.0", tmp_path, monkeypatch)(PROMPT, "x") == 1.0


@pytest.mark.parametrize("body", ["return 1 / 0", "sys.exit(0)", "return 10**400"])
def test_scoring_raises_the_error_of_the_function(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = defined_by(body, tmp_path, monkeypatch)
    sample = Sample.from_response([1], [2], [0.0], text="x", finish_reason="stop", policy_version=0)
    with pytest.raises(RunError, match="for set/7"):
        score({0: SampleGroup(PROMPT, [sample])}, reward)


@pytest.mark.parametrize("body", ["1 / 0", "sys.exit(3)", "raise RuntimeError('two\\nlines')"])
def test_a_module_that_fails_when_it_is_imported_is_refused(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_module.py").write_text(f"import sys\n{body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        InputError, match=r"reward.name = 'failing_module:f' cannot be imported \(\w+: "
    ) as error:
        resolve_reward(RewardConfig(name="failing_module:f"))
    assert "\n" not in str(error.value)
