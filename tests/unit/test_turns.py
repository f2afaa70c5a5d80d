"""Tokens between turns: a conversation joined turn by turn equals the chat template's own rendering.

The templates are the published ones of the models, as trl keeps them (trl/chat_templates). Their special
tokens are added to a tokenizer of bytes, which encodes any text.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.utils import get_json_schema

from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.config import DataConfig
from megatron_gmpo.data.encoding import PromptEncoder
from megatron_gmpo.data.rows import Row
from megatron_gmpo.errors import InputError
from megatron_gmpo.rollout.environments import EnvironmentFault
from megatron_gmpo.rollout.turns import TurnTemplate
from megatron_gmpo.testing.tiny_tokenizers import text_tokenizer

_TRL = importlib.util.find_spec("trl")
assert _TRL is not None
TEMPLATES = Path(str(_TRL.origin)).parent / "chat_templates"
END = {
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "glm4moe": "<|user|>",
    "gemma": "<end_of_turn>",
    "gptoss": "<|return|>",
}
"""The token with which each model ends a turn."""
NO_THINKING = {"enable_thinking": False}
Message = dict[str, Any]


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: one of them.
        b: the other.
    """
    return a + b


ADD = get_json_schema(add)


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with the template and the special tokens of a model."""
    source = (TEMPLATES / f"{name}.jinja").read_text()
    tokenizer = text_tokenizer()
    tokenizer.chat_template = source
    found = re.findall(r"<[|｜][^<>\s']+[|｜]>|</?(?:think|tool_call|tool_response)>", source)
    tokenizer.add_tokens(sorted({"<begin>", END[name], *found}))
    tokenizer.bos_token, tokenizer.eos_token = "<begin>", END[name]
    return tokenizer


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def user(*contents: str) -> list[Message]:
    return [{"role": "user", "content": content} for content in contents]


def results(*contents: str) -> list[Message]:
    return [{"role": "tool", "content": content} for content in contents]


def turn(content: str) -> Message:
    return {"role": "assistant", "content": content}


def prompt_of(tokenizer: PreTrainedTokenizerFast, cfg: DataConfig, tools: Sequence[Any] = ()) -> Prompt:
    row = Row(id="task/0", where="row 0", problem=user("Add 2 and 3."), answer="5", labels={})
    return PromptEncoder(cfg, tokenizer, "data", tools).encode([row])[0]


def joined(
    tokenizer: PreTrainedTokenizerFast,
    template: TurnTemplate,
    prompt: Prompt,
    conversation: Sequence[tuple[str, list[Message]]],
    end: str,
) -> list[int]:
    """Return the tokens of the turns, each of which ends with ``end``, and of what follows each."""
    start, previous = prompt.messages or [], []
    tokens = template.first(prompt, []).tolist()
    for text, observation in conversation:
        sampled = ids(tokenizer, text + end)
        following = template.following(start, previous, np.array(sampled), observation, {sampled[-1]})
        assert following.dtype == np.int32
        tokens += sampled + following.tolist()
        previous = [turn(text), *observation]
    return tokens


def rendered(
    tokenizer: PreTrainedTokenizerFast,
    prompt: Prompt,
    messages: Sequence[Message],
    tools: Sequence[Any] = (),
    **variables: Any,
) -> list[int]:
    """Return the tokens of transformers' own rendering of a conversation."""
    text = tokenizer.apply_chat_template(
        [*(prompt.messages or []), *messages],
        tools=list(tools) or None,
        tokenize=False,
        add_generation_prompt=True,
        **variables,
    )
    return ids(tokenizer, text)


PLAIN = [
    ("I look.", user("A room.\nA door.")),
    ("I open it.", user("It is open.")),
    ("Out.", user("Free.")),
    ("Bye.", user("Bye.")),
]
THINKING = [(f"<think>\nI am {i}.\n</think>\n\n{text}", seen) for i, (text, seen) in enumerate(PLAIN)]
CALLS = [
    ('<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>', results("5")),
    ('Once more.\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>', results("no 'a'\né", "7")),
    ("Five.", results("Say more.")),
    ("Five is the sum.", results("A last time.")),
]
THINKING_CALLS = [(f"<think>\nI am {i}.\n</think>\n\n{text}", seen) for i, (text, seen) in enumerate(CALLS)]


@pytest.mark.parametrize(
    ("name", "conversation", "tools", "variables"),
    [
        ("qwen2_5", PLAIN, [], {}),
        ("qwen2_5", THINKING, [], {}),
        ("qwen2_5", CALLS, [ADD], {}),
        ("qwen3", CALLS, [ADD], {}),
        ("qwen3", THINKING_CALLS, [ADD], {}),
        ("qwen3_instruct_2507", PLAIN, [], {}),
        ("qwen3_instruct_2507", CALLS, [ADD], {}),
        ("llama3", PLAIN, [], {}),
        ("llama3_1", PLAIN, [], {}),
        ("llama3_1", CALLS, [ADD], {}),
        ("llama3_2", THINKING, [], {"date_string": "26 Jul 2024"}),
        ("llama3_2", CALLS, [ADD], {"date_string": "26 Jul 2024"}),
        ("llama3_2", CALLS, [ADD], {"date_string": "26 Jul 2024", "tools_in_user_message": False}),
    ],
)
def test_turn_by_turn_equals_the_whole(
    name: str, conversation: list[tuple[str, list[Message]]], tools: list[Any], variables: dict[str, Any]
) -> None:
    tokenizer = tokenizer_of(name)
    cfg = DataConfig(path="task", chat_template_kwargs=variables)
    template = TurnTemplate(tokenizer, cfg, tools=tools)
    prompt = prompt_of(tokenizer, cfg, tools)
    messages = [message for text, observation in conversation for message in (turn(text), *observation)]
    expected = rendered(tokenizer, prompt, messages, tools, **variables)
    assert joined(tokenizer, template, prompt, conversation, END[name]) == expected


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507", "llama3", "llama3_1"])
def test_a_cut_turn_is_closed(name: str) -> None:
    """The template's closing tokens follow a turn that ended without them."""
    tokenizer = tokenizer_of(name)
    cfg = DataConfig(path="task")
    prompt, template = prompt_of(tokenizer, cfg), TurnTemplate(tokenizer, cfg)
    whole = joined(tokenizer, template, prompt, PLAIN, END[name])
    assert joined(tokenizer, template, prompt, PLAIN, "") == whole


def test_another_end_token_stays_in_the_place_of_the_templates() -> None:
    tokenizer = tokenizer_of("qwen2_5")
    template = TurnTemplate(tokenizer, DataConfig(path="task"))
    [other, end] = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    ending = [
        template.following([], [], np.array([65, i]), user("A room."), {other, end}).tolist()
        for i in (end, other)
    ]
    assert (
        ending[0]
        == ending[1]
        == ids(tokenizer, "\n<|im_start|>user\nA room.<|im_end|>\n<|im_start|>assistant\n")
    )


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("qwen2_5", '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'),
        ("qwen3", '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'),
        ("llama3_1", '{"name": "add", "parameters": {"a": 2, "b": 3}}'),
    ],
)
def test_a_call_as_text_equals_a_call_as_a_field(name: str, call: str) -> None:
    """Templates also write calls from the field ``tool_calls``; a turn's text is what they write."""
    tokenizer = tokenizer_of(name)
    cfg = DataConfig(path="task")
    prompt = prompt_of(tokenizer, cfg, [ADD])
    conversation = [(call, results("5")), (call, results("5"))]
    arguments = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
    made = {"role": "assistant", "content": "", "tool_calls": [arguments]}
    expected = rendered(tokenizer, prompt, [made, *results("5")] * 2, [ADD])
    template = TurnTemplate(tokenizer, cfg, tools=[ADD])
    assert joined(tokenizer, template, prompt, conversation, END[name]) == expected


@pytest.mark.parametrize(
    ("name", "conversation", "described", "variables", "dropped"),
    [
        ("qwen3", THINKING, False, {}, r"<think>\n.*?</think>\n\n"),
        ("qwen3", PLAIN, False, NO_THINKING, r"<think>\n\n</think>\n\n(?!$)"),
        ("qwen3", CALLS, False, NO_THINKING, r"<think>\n\n</think>\n\n(?!$)"),
        ("deepseek_r1_distill", THINKING, False, {}, r"<think>\n(?!$).*?</think>"),
        ("deepseekv3", THINKING, False, {}, r"<think>\n(?!$).*?</think>"),
        ("deepseekv3", THINKING_CALLS, True, {}, r"<think>\n(?!$).*?</think>"),
        ("glm4moe", THINKING, False, {}, r"<think>.*?</think>\n\n|\n<think></think>\n"),
    ],
)
def test_kept_thinking_is_all_that_differs(
    name: str, conversation: list[Any], described: bool, variables: dict[str, Any], dropped: str
) -> None:
    """With ``keep_thinking`` the turns keep what the template drops; all the rest equals its rendering."""
    tokenizer = tokenizer_of(name)
    tools = [ADD] if conversation[0][1][0]["role"] == "tool" else []
    system = "Call add with two numbers." if described else ""
    cfg = DataConfig(path="task", chat_template_kwargs=variables, system_prompt=system)
    with pytest.raises(InputError, match=r"set rollout\.keep_thinking = true"):
        TurnTemplate(tokenizer, cfg, tools=tools)
    template = TurnTemplate(tokenizer, cfg, tools=tools, keep_thinking=True)
    prompt = prompt_of(tokenizer, cfg, tools)
    opened = tokenizer.decode(prompt.input_ids).endswith("<think>\n")
    sampled = [
        # after the result of a tool DeepSeek's template opens no thinking
        (text.removeprefix("<think>\n") if opened and not (i and tools) else text, seen)
        for i, (text, seen) in enumerate(conversation)
    ]
    text = tokenizer.decode(joined(tokenizer, template, prompt, sampled, END[name]))
    messages = [message for text, observation in conversation for message in (turn(text), *observation)]
    whole = tokenizer.decode(rendered(tokenizer, prompt, messages, tools, **variables))
    assert text != whole
    assert re.sub(dropped, "", text, flags=re.DOTALL) == re.sub(dropped, "", whole, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("name", "tools", "variables", "words"),
    [
        ("qwen3", [], {}, ["writes 'Turn 0.", "has '<think>", "set rollout.keep_thinking = true"]),
        ("qwen3", [], NO_THINKING, ["writes 'Turn 0.", "has '<think>", "set rollout.keep_thinking = true"]),
        ("qwen3", [ADD], NO_THINKING, ["writes 'Turn 0.", "set rollout.keep_thinking = true"]),
        ("deepseek_r1_distill", [], {}, ["has '<think>", "set rollout.keep_thinking = true"]),
        ("deepseekv3", [ADD], {}, ["has '<think>", "set rollout.keep_thinking = true"]),
        ("llama3", [ADD], {}, ["does not describe tools", "describe 'add'", "data.system_prompt"]),
        ("gemma", [ADD], {}, ["refuses messages of the role 'tool'", "correct the template"]),
        ("gptoss", [], {}, ["writes '<|channel|>final", "correct the template"]),
        ("gptoss", [ADD], {}, ["refuses messages of the role 'tool'", "correct the template"]),
    ],
)
def test_refused_templates(name: str, tools: list[Any], variables: dict[str, Any], words: list[str]) -> None:
    cfg = DataConfig(path="task", chat_template_kwargs=variables)
    with pytest.raises(InputError) as error:
        TurnTemplate(tokenizer_of(name), cfg, tools=tools)
    assert all(word in str(error.value) for word in ["chat template of model.path", *words])
    assert "\n" not in str(error.value)


def test_a_template_that_drops_more_than_thinking_is_refused() -> None:
    tokenizer = text_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages[-2:] %}<|im_start|>{{ message.role }} {{ message.content }}<|im_end|>"
        "{% endfor %}<|im_start|>assistant "
    )
    with pytest.raises(InputError, match="correct the template"):
        TurnTemplate(tokenizer, DataConfig(path="task"), keep_thinking=True)


def test_without_a_chat_template() -> None:
    tokenizer = text_tokenizer()
    with pytest.raises(InputError, match=r"need a chat template.*leave data\.use_chat_template out"):
        TurnTemplate(tokenizer, DataConfig(path="task", use_chat_template=False))


SPECIAL = [
    "<|im_end|>",
    "<|im_start|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "</think>",
    "</tool_response>",
    "\n",
]


@cache
def _appends(name: str) -> tuple[TurnTemplate, Prompt]:
    cfg = DataConfig(path="task")
    return TurnTemplate(tokenizer_of(name), cfg), prompt_of(tokenizer_of(name), cfg)


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1"])
@given(pieces=st.lists(st.sampled_from([*SPECIAL, "a", " user\n", "\u00e9", "}"]), max_size=6))
@settings(max_examples=10, deadline=None)
def test_an_observation_never_closes_its_turn(name: str, pieces: list[str]) -> None:
    """The text of special tokens in an observation, or in a reset's message, stays text."""
    tokenizer = tokenizer_of(name)
    template, prompt = _appends(name)
    markup = set(tokenizer.added_tokens_decoder)
    content = f"x{''.join(pieces)}x"
    for make in (user, results):
        for tokens, plain in (
            [template.following([], [], np.array([65]), make(text), {0}) for text in (content, "x")],
            [template.first(prompt, make(text)) for text in (content, "x")],
        ):
            forged, harmless = ([i for i in side.tolist() if i in markup] for side in (tokens, plain))
            assert forged == harmless
            shown = content.replace("\n", "\\n") if name == "llama3_1" and make is results else content
            assert shown in tokenizer.decode(tokens)


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "deepseekv3"])
def test_messages_of_the_reset_follow_the_prompt(name: str) -> None:
    tokenizer = tokenizer_of(name)
    cfg = DataConfig(path="task", system_prompt="Be brief.")
    template, prompt = TurnTemplate(tokenizer, cfg, keep_thinking=True), prompt_of(tokenizer, cfg)
    assert template.first(prompt, []).tolist() == prompt.input_ids
    opened = user("A room.", "A door.")
    assert template.first(prompt, opened).tolist() == rendered(tokenizer, prompt, opened)


def test_a_prompt_whose_end_joins_the_opening_of_a_turn() -> None:
    """Two newlines are one token: one of the prompt's last message, one of what opens the next."""
    tokenizer = text_tokenizer()
    tokenizer.add_tokens(["\n\n"])
    message = r"{{ '\n' + message.role + ': ' + message.content + '\n' }}"
    opening = r"{% if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}"
    tokenizer.chat_template = "{% for message in messages %}" + message + "{% endfor %}" + opening
    cfg = DataConfig(path="task")
    template, prompt = TurnTemplate(tokenizer, cfg), prompt_of(tokenizer, cfg)
    assert template.first(prompt, []).tolist() == rendered(tokenizer, prompt, [])
    with pytest.raises(EnvironmentFault, match="opens a turn depend on the prompt's text"):
        template.first(prompt, user("A room."))


def test_messages_that_the_template_does_not_append() -> None:
    tokenizer = tokenizer_of("deepseekv3")
    cfg = DataConfig(path="task")
    template, prompt = TurnTemplate(tokenizer, cfg, keep_thinking=True), prompt_of(tokenizer, cfg)
    system = [{"role": "system", "content": "Be brief."}]
    with pytest.raises(EnvironmentFault, match="does not append reset's messages"):
        template.first(prompt, system)  # DeepSeek's template moves system messages to the start
    with pytest.raises(EnvironmentFault, match="role 'system'"):
        template.following(prompt.messages or [], [], np.array([65]), system, {0})
    lone = "the chat template refuses {}'s messages"
    with pytest.raises(EnvironmentFault, match=lone.format("step")):
        template.following(prompt.messages or [], [], np.array([65]), user("\ud800"), {0})
    with pytest.raises(EnvironmentFault, match=lone.format("reset")):
        template.first(prompt, user("\ud800"))
