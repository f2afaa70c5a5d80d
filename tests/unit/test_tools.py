"""Tools: calls in the text of a turn, their results, their descriptions, and the shipped functions."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.config import RolloutConfig
from megatron_gmpo.errors import InputError
from megatron_gmpo.rollout.environments import EnvironmentFault, Observation
from megatron_gmpo.rollout.environments.calculator import calculator
from megatron_gmpo.rollout.environments.pool import MAX_ANSWER_BYTES, EnvironmentPool
from megatron_gmpo.rollout.environments.tool_calls import Call, parse_calls
from megatron_gmpo.rollout.environments.tools import ToolEnvironment, named_tools, tool_schemas

from ..support.forks import ROOT

_TRL = importlib.util.find_spec("trl")
assert _TRL is not None
TEMPLATES = Path(str(_TRL.origin)).parent / "chat_templates"
TOOLS = "tests.support.tools"
SHIPPED = "megatron_gmpo.rollout.environments"

# --- calls in a text ----------------------------------------------------------------------------------------

CALLS = [
    Call("search", {"query": 'a "quoted"\nword; {x} </tool> ``` ü', "limit": 3}),
    Call("now", {}),
    Call("plot", {"points": [[0, 1.5], [1, None]], "style": {"name": "a", "parameters": {"grid": True}}}),
]


def written(name: str, calls: list[Call]) -> str:
    """Return the turn that a model's chat template writes for calls, without its end token."""
    arguments = json.dumps if name.startswith("deepseek") else dict
    fields = [
        {"type": "function", "function": {"name": call.name, "arguments": arguments(call.arguments)}}
        for call in calls
    ]
    task = {"role": "user", "content": "?"}
    turn = {"role": "assistant", "content": "", "tool_calls": fields}
    template = (TEMPLATES / f"{name}.jinja").read_text()
    [start] = render_jinja_template([[task]], chat_template=template, add_generation_prompt=True)[0]
    [whole] = render_jinja_template([[task, turn]], chat_template=template)[0]
    start = start.removesuffix("<think>\n")  # DeepSeek's writes no thinking before a call
    assert whole.startswith(start)
    return re.sub(r"<[|｜][^|｜]*(end|eot)[^|｜]*[|｜]>\s*$", "", whole[len(start) :])


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3_1", "llama3_2", "deepseekv3"]
)
def test_calls_as_chat_templates_write_them(name: str, several: bool) -> None:
    if several and name.startswith("llama"):
        return  # these templates write one call a turn
    for calls in [CALLS] if several else [[call] for call in CALLS]:
        assert parse_calls(written(name, calls)) == calls


ADD = Call("add", {"a": 2})
FORMS: dict[str, list[Call]] = {
    # Qwen and Hermes
    '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>': [ADD],
    'I add.\n<tool_call>\n{"arguments": {"a": 2}, "name": "add"}\n</tool_call> Then I wait.': [ADD],
    '<tool_call>{"name": "add", "arguments": {"a": 2}}': [ADD],
    '<think>x <tool_call>{"name": "no"}</tool_call></think><tool_call>{"name": "add"}</tool_call>': [
        Call("add")
    ],
    # Llama 3
    '<|python_tag|>{"name": "add", "parameters": {"a": 2}}': [ADD],
    'Sure. <|python_tag|>{"name": "add", "parameters": {"a": 2}}; {"name": "f", "parameters": {}}': [
        ADD,
        Call("f"),
    ],
    ' {"type": "function", "name": "add", "parameters": {"a": 2}}\n{"name": "f", "parameters": {}} ': [
        ADD,
        Call("f"),
    ],
    # DeepSeek V3.1
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 2}<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>": [ADD, Call("f")],
    # no calls
    "": [],
    "The answer is 4.": [],
    '{"answer": 4}': [],
    'The form is {"name": "add", "parameters": {}}.': [],
    "<think>I call <tool_call></think> 4": [],
}
ERRORS: dict[str, str] = {
    "<tool_call>add(2)</tool_call>": r"^The call is not valid JSON: Expecting value",
    '<tool_call>{"name": "add", "arguments": {"a": 2}</tool_call>': r"^The call is not valid JSON: Expecting",
    "<tool_call></tool_call>": r"^The call is not valid JSON: Expecting value",
    '<tool_call>["add", 2]</tool_call>': r'^The call is not a JSON object with the text "name"\.$',
    '<tool_call>{"name": 3}</tool_call>': r'^The call is not a JSON object with the text "name"\.$',
    '<tool_call>{"name": "add", "arguments": [2]}</tool_call>': r"^The arguments are not a JSON object\.$",
    "<tool_call>" + "[" * 100_000: r"^The call is not valid JSON: it is nested too deeply\.$",
    '<|python_tag|>brave_search.call(query="x")': r"^The call is not valid JSON: Expecting value",
    "<|python_tag|>": r"^The call is not valid JSON: Expecting value",
    '{"name": "add", "parameters": {"a": 2}': r"^The call is not valid JSON: Expecting",
    "<｜tool▁call▁begin｜>add{}<｜tool▁call▁end｜>": r"^The call has no <｜tool▁sep｜> after its name\.$",
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{a: 2}\n```": r"^The call is not valid JSON",
}


@pytest.mark.parametrize("text", FORMS)
def test_other_forms_of_calls(text: str) -> None:
    assert parse_calls(text) == FORMS[text]


@pytest.mark.parametrize("text", ERRORS, ids=lambda text: text[:40])
def test_malformed_calls(text: str) -> None:
    [call] = parse_calls(text)
    assert re.search(ERRORS[text], call.error), call.error


MARKS = [
    "<tool_call>",
    "</tool_call>",
    "<|python_tag|>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "</think>",
]


@given(
    st.lists(st.sampled_from([*MARKS, "{", "}", '"name"', ":", '"f"', ",", '"arguments"', "```", "\n", ";"]))
)
def test_no_text_raises(pieces: list[str]) -> None:
    for call in parse_calls("".join(pieces)):
        assert isinstance(call.arguments, dict)
        assert call.name or call.error or '""' in pieces


# --- results ------------------------------------------------------------------------------------------------


def called(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def answered(action: str, tools: tuple[str, ...], **arguments: Any) -> Observation:
    functions = named_tools([f"{TOOLS}:{tool}" for tool in tools], arguments)
    return asyncio.run(ToolEnvironment(functions).step(action))


RESULTS: dict[str, tuple[str, bool]] = {
    called("add", a=2, b=3): ("5", False),
    called("later", seconds=0): (r"0 s later in \d+", False),
    called("long", size=32_000): ("é{32000}", False),
    called("add", a=2): (r"Error: add: missing a required argument: 'b'\.", True),
    called("add", a=2, b=3, c=4): (r"Error: add: got an unexpected keyword argument 'c'\.", True),
    called("add", a=2, b="3"): (r"Error: TypeError: unsupported operand type.*", True),
    called("subtract", a=2): (r"Error: no tool 'subtract'\. The tools are add, later, fails, .*\.", True),
    called("fails"): (r"Error: OSError: no network", True),
    called("long", size=32_001): (
        r"Error: the result has 32,001 characters; the turn has room for 32,000\.",
        True,
    ),
    called("no_text"): (r"Error: UnicodeEncodeError: .*", True),
    # half of a character, which the model can write in JSON
    called("\ud83d"): (r"Error: no tool '\\ud83d'\. The tools are .*", True),
    called("add", a=2, b=3, **{"\ud83d": 4}): (r"Error: add: got an unexpected keyword.*'\\ud83d'\.", True),
    "<tool_call>add(2, 3)</tool_call>": (r"Error: The call is not valid JSON: .*\.", True),
}


@pytest.mark.parametrize("action", RESULTS)
def test_results(action: str) -> None:
    expected, failed = RESULTS[action]
    observation = answered(action, ("add", "later", "fails", "long", "no_text"))
    [message] = observation.messages
    assert message["role"] == "tool"
    assert re.fullmatch(expected, message["content"])
    message["name"].encode()
    info = {"tool_calls": 1, "tool_errors": int(failed), "answered": False}
    assert observation == Observation([message], info=info)


def test_several_calls_and_none() -> None:
    observation = answered(
        called("add", a=1, b=2) + called("fails") + called("add", a=3, b=4), ("add", "fails")
    )
    assert [(message["name"], message["content"]) for message in observation.messages] == [
        ("add", "3"),
        ("fails", "Error: OSError: no network"),
        ("add", "7"),
    ]
    assert observation.info == {"tool_calls": 3, "tool_errors": 1, "answered": False}
    assert answered("The sum is 7.", ("add",)) == Observation(
        [], done=True, info={"tool_calls": 0, "tool_errors": 0, "answered": True}
    )


@pytest.mark.parametrize(
    ("calls", "errors", "last"),
    [
        ([called("long", size=20_000)] * 2, 1, "20,000 characters; the turn has room for 12,000."),
        ([called("long", size=32_000), *[called("x" * 400)] * 100], 64, "the other 37 were not made."),
        ([called("add", a=1, b=2)] * 64, 0, "3"),
        ([called("add", a=1, b=2)] * 65, 1, "Error: A turn may have 64 calls; the other 1 were not made."),
    ],
)
def test_no_turn_of_the_model_is_a_fault(calls: list[str], errors: int, last: str) -> None:
    """A fault leaves the group out: a turn with too many or too long results must not be one."""
    observation = answered("".join(calls), ("add", "long"))
    assert observation.messages[-1]["content"].endswith(last)
    assert observation.info["tool_errors"] == errors
    assert len(json.dumps(vars(observation))) < MAX_ANSWER_BYTES


def test_arguments_that_the_model_does_not_give() -> None:
    table = {"cat": "chat"}
    result = answered(called("lookup", word="cat"), ("lookup",), table=table)
    assert result.messages[0]["content"] == '{"cat": "chat"}'
    result = answered(called("lookup", word="cat", table={"cat": "x"}), ("lookup",), table=table)
    assert result.messages[0]["content"] == "Error: lookup: got an unexpected keyword argument 'table'."


@pytest.mark.slow
def test_tools_in_their_process() -> None:
    """A call over the time limit, and one that ends the process, are faults of the episode."""
    tools = tuple(f"{TOOLS}:{name}" for name in ("add", "later", "leaves"))
    pool = EnvironmentPool(RolloutConfig(tools=tools, environment_timeout_s=1), seed=0)

    async def play(*actions: str) -> list[Observation]:
        session = await pool.open(Prompt("p", "", text="?"), 0, 0)
        try:
            return [await session.reset(), *[await session.step(action) for action in actions]]
        finally:
            counted.append((session.tool_calls, session.tool_errors))
            await session.close()

    counted: list[tuple[int, int]] = []
    try:
        found = asyncio.run(play(called("add", a=1, b=2), called("add", a=1), "3"))
        assert [observation.done for observation in found] == [False, False, False, True]
        with pytest.raises(EnvironmentFault, match=r"^step did not return within 1 s$"):
            asyncio.run(play(called("later", seconds=60)))
        with pytest.raises(EnvironmentFault, match=r"^the process ended in step \(exit code 1\)$"):
            asyncio.run(play(called("leaves")))
        assert counted == [(2, 1), (0, 0), (0, 0)]
    finally:
        pool.close()


# --- descriptions -------------------------------------------------------------------------------------------


def test_descriptions() -> None:
    tools = (f"{TOOLS}:add", f"{TOOLS}:lookup")
    assert tool_schemas(RolloutConfig(tools=tools, environment_args={"table": {}})) == [
        {
            "type": "function",
            "function": {
                "name": "add",
                "description": "Add two whole numbers.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "a": {"type": "integer", "description": "The first number."},
                        "b": {"type": "integer", "description": "The second number."},
                    },
                    "required": ["a", "b"],
                },
                "return": {"type": "integer"},
            },
        },
        {
            "type": "function",
            "function": {
                "name": "lookup",
                "description": "Look a word up.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "word": {"type": "string", "description": "The word."},
                        "default": {"type": "string", "description": "The result for other words."},
                    },
                    "required": ["word"],
                },
                "return": {"type": "object", "additionalProperties": {"type": "string"}},
            },
        },
    ]
    assert tool_schemas(RolloutConfig(environment="m:C", environment_args={"table": {}})) == []


def test_the_tool_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, source = re.findall(r"```python\n(.*?)```", (ROOT / "docs/agents.md").read_text(), re.DOTALL)
    (tmp_path / "letters.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "facts.txt").touch()
    monkeypatch.chdir(tmp_path)
    tools = ("letters:count_letters", f"{SHIPPED}.search:search")
    cfg = RolloutConfig(tools=tools, environment_args={"file": "facts.txt"})
    assert [each["function"]["name"] for each in tool_schemas(cfg)] == ["count_letters", "search"]
    environment = ToolEnvironment(named_tools(cfg.tools, cfg.environment_args))
    observation = asyncio.run(environment.step(called("count_letters", text="Strawberry", letter="R")))
    assert observation.messages[0]["content"] == "3"


def test_arguments_that_the_model_does_not_give_have_their_types(tmp_path: Path) -> None:
    """A file that does not exist, a folder and a number, for the annotation ``FilePath``."""
    for file in (str(tmp_path / "absent.txt"), str(tmp_path), 3):
        with pytest.raises(InputError, match=r"^rollout\.environment_args\.file = .*: "):
            tool_schemas(RolloutConfig(tools=(f"{SHIPPED}.search:search",), environment_args={"file": file}))


REFUSED: dict[tuple[str, ...], str] = {
    ("calculator",): "rollout.tools = 'calculator' is unknown: give module:function",
    (f"{TOOLS}:subtract",): "rollout.tools = 'tests.support.tools:subtract' cannot be imported",
    (f"{TOOLS}:annotations",): "is a _Feature: give a function",
    (f"{TOOLS}:no_hints",): "Argument a is missing a type hint in function no_hints): give it type hints",
    (f"{TOOLS}:no_docstring",): "cannot be described (Cannot generate JSON schema for no_docstring",
    (
        f"{TOOLS}:add",
        f"{SHIPPED}.calculator:calculator",
        "operator:add",
    ): "has the name 'add': every tool needs",
}


@pytest.mark.parametrize("tools", REFUSED)
def test_functions_that_are_no_tools(tools: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=re.escape(REFUSED[tools])):
        tool_schemas(RolloutConfig(tools=tools))


def test_an_argument_that_no_tool_has() -> None:
    cfg = RolloutConfig(tools=(f"{TOOLS}:add",), environment_args={"file": "x"})
    with pytest.raises(
        InputError, match=r"^rollout.environment_args.file is no parameter of rollout.tools = "
    ):
        tool_schemas(cfg)


# --- shipped tools ------------------------------------------------------------------------------------------

VALUES = {
    "1 + 2 * 3": "7",
    "(1 + 2) * -3": "-9",
    "0.1 + 0.2": "0.3",
    "1 / 3": "0.333333333333",
    "-(2.5 - 3)": "0.5",
    "1e3 * 2": "2000",
    " 7 ": "7",
    "99999999999 * 99999999999": "9999999999800000000001",
}
NO_VALUES = [
    "2 ** 9",
    "__import__('os')",
    "a + 1",
    "1 +",
    "True",
    "1 / 0",
    "[1]",
    "+1",
    "'a' * 3",
    "1" * 201,
    "9 < 3",
]


@pytest.mark.parametrize("expression", VALUES)
def test_the_calculator(expression: str) -> None:
    assert calculator(expression) == VALUES[expression]


@pytest.mark.parametrize("expression", NO_VALUES)
def test_what_the_calculator_refuses(expression: str) -> None:
    functions = named_tools([f"{SHIPPED}.calculator:calculator"], {})
    observation = asyncio.run(ToolEnvironment(functions).step(called("calculator", expression=expression)))
    assert observation.info["tool_errors"] == 1


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(1, 99)), max_size=8), st.integers(0, 99))
def test_the_calculator_against_fractions(terms: list[tuple[str, int]], first: int) -> None:
    """Python evaluates the same expression with Fractions in the places of the numbers."""
    expression = str(first) + "".join(f" {sign} {number}" for sign, number in terms)
    exact: Fraction = eval(re.sub(r"\d+", r"Fraction(\g<0>)", expression))
    assert calculator(expression) == (str(exact) if exact.denominator == 1 else f"{float(exact):.12g}")


def test_the_search(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    passages = [
        "The harbour of Aldwick\nwas built in 1870.",
        "The lighthouse was built in 1902. The lighthouse stands north of the harbour.",
        "Boats leave the harbour in summer.",
        "The mill was built in 1790.",
        "Über den Fluß führt eine Brücke.",
    ]
    file.write_text("\n\n".join(passages[:3]) + "\n  \n\n" + "\n\n".join(passages[3:]) + "\n")
    functions = named_tools([f"{SHIPPED}.search:search"], {"file": str(file)})

    def found(query: str) -> list[str]:
        observation = asyncio.run(ToolEnvironment(functions).step(called("search", query=query)))
        return observation.messages[0]["content"].split("\n\n")

    assert found("lighthouse harbour")[0] == passages[1]
    assert found("Aldwick")[0] == passages[0]
    assert len(found("the harbour")) == 3
    assert found("BRÜCKE") == [passages[4]]
    assert found("castle") == found("") == ["No passage found."]
    [described] = tool_schemas(
        RolloutConfig(tools=(f"{SHIPPED}.search:search",), environment_args={"file": str(file)})
    )
    assert list(described["function"]["parameters"]["properties"]) == ["query"]
