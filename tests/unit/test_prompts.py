"""Prompts are loaded from every file format, and the stream of prompts resumes."""

from __future__ import annotations

import json
import logging
import os
import string
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.config import DataConfig
from megatron_gmpo.data.prompts import load_prompts
from megatron_gmpo.errors import InputError

ROWS = [
    {"problem": "2+2=", "answer": "052"},
    {"problem": "1+1=", "answer": "NA"},
    {"problem": "10+10+10=", "answer": "\\frac{1}{2}"},
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def character_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character."""
    vocab = {token: i for i, token in enumerate(["<unk>", *string.printable])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", chat_template=chat_template)


def text_of(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(prompt.input_ids))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    return write(tmp_path, ROWS)


def write(folder: Path, rows: list[dict], name: str = "sums.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder", "dict_folder"])
def test_every_format_gives_the_same_prompts(tmp_path: Path, kind: str) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    path = tmp_path / (f"sums.{kind}" if "folder" not in kind else "sums")
    if kind in ("jsonl", "json"):
        rows.to_json(path, lines=kind == "jsonl")
    elif kind == "csv":
        rows.to_csv(path)
    elif kind == "parquet":
        rows.to_parquet(path)
    elif kind == "folder":
        rows.save_to_disk(path)
    else:
        datasets.DatasetDict(test=rows).save_to_disk(path)
    tokenizer = character_tokenizer()
    prompts = load_prompts(
        DataConfig(path=str(path), split="test" if kind == "dict_folder" else "train"), tokenizer
    )
    assert [(p.id, p.text, p.answer, p.messages) for p in prompts] == [
        (f"sums/{i}", row["problem"], row["answer"], None) for i, row in enumerate(ROWS)
    ]
    assert [text_of(tokenizer, p) for p in prompts] == [row["problem"] for row in ROWS]


@pytest.mark.parametrize(("answer", "text"), [(72, "72"), (0.5, "0.5"), (True, "True"), (-3, "-3")])
def test_answers_become_text(tmp_path: Path, answer: object, text: str) -> None:
    path = write(tmp_path, [{"question": "q", "truth": answer}])
    (prompt,) = load_prompts(
        DataConfig(path=path, prompt_column="question", answer_column="truth"), character_tokenizer()
    )
    assert prompt.answer == text


def test_template_and_chat_template(jsonl: str) -> None:
    tokenizer = character_tokenizer(CHAT_TEMPLATE)
    template = "{prompt} Answer in \\boxed{{}}."
    chat = load_prompts(DataConfig(path=jsonl, template=template, system_prompt="Be brief."), tokenizer)[0]
    assert chat.text is None
    assert chat.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2= Answer in \\boxed{}."},
    ]
    assert text_of(tokenizer, chat) == "<system>Be brief.<user>2+2= Answer in \\boxed{}.<assistant>"
    plain = load_prompts(DataConfig(path=jsonl, template=template, use_chat_template=False), tokenizer)[0]
    assert plain.messages is None
    assert text_of(tokenizer, plain) == plain.text == "2+2= Answer in \\boxed{}."


def test_message_columns(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "2+2="},
    ]
    path = write(tmp_path, [{"problem": messages, "answer": 4}])
    tokenizer = character_tokenizer(CHAT_TEMPLATE)
    (prompt,) = load_prompts(DataConfig(path=path, system_prompt="S"), tokenizer)
    assert prompt.messages == [{"role": "system", "content": "S"}, *messages]
    assert text_of(tokenizer, prompt) == "<system>S<user>hi<assistant>ho<user>2+2=<assistant>"


def test_length_filter_comes_before_max_prompts_and_keeps_row_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, [{"problem": "x" * n, "answer": "1"} for n in (9, 3, 8, 4, 5)])
    with caplog.at_level(logging.INFO, logger="megatron_gmpo.data.prompts"):
        prompts = load_prompts(
            DataConfig(path=path, max_prompt_tokens=5, max_prompts=2), character_tokenizer()
        )
    assert [p.id for p in prompts] == ["sums/1", "sums/3"]
    assert "2 prompts" in caplog.text
    assert "dropped 2 prompts longer than 5 tokens" in caplog.text


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"path": ""}, ["data.path is empty", ".jsonl"]),
        ({"path": "nowhere.jsonl"}, ["data.path = 'nowhere.jsonl' does not exist", ".jsonl"]),
        ({"path": __file__}, ["data.path", "unknown format"]),
        ({"prompt_column": "question"}, ["data.prompt_column = 'question'", "['problem', 'answer']"]),
        ({"answer_column": "truth"}, ["data.answer_column = 'truth'", "['problem', 'answer']"]),
        ({"split": "test"}, ["data.split = 'test'", "['train']"]),
        ({"max_prompt_tokens": 3}, ["data.max_prompt_tokens = 3", "at least 4"]),
        ({"use_chat_template": True}, ["data.use_chat_template = true", "no chat template"]),
        ({"system_prompt": "S"}, ["data.system_prompt = 'S'", "data.template"]),
        ({"template": "Solve it."}, ["data.template = 'Solve it.'", "{prompt}"]),
        ({"template": "{prompt} {level}"}, ["data.template", "'level'"]),
        ({"template": "{prompt} in \\boxed{}"}, ["data.template", "{{"]),
        ({"template": "{prompt} {"}, ["data.template", "not a format string"]),
    ],
)
def test_input_errors_name_field_value_and_remedy(jsonl: str, options: dict, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_prompts(DataConfig(**{"path": jsonl} | options), character_tokenizer())
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        (
            [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": None}],
            "row 1: column 'answer' is None",
        ),
        ([{"problem": "a", "answer": "1"}, {"problem": "", "answer": "1"}], "row 1: column 'problem'"),
        ([{"problem": [{"role": "tool", "content": "x"}], "answer": "1"}], "no tools here"),
        ([{"problem": [{"role": "system", "content": "x"}], "answer": "1"}], "a system message already"),
        ([{"problem": [{"text": "x"}], "answer": "1"}], "role and content"),
        (
            [{"problem": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "answer": "1"}],
            "role and content",
        ),
        ([{"problem": [{"role": "user", "content": None}], "answer": "1"}], "role and content"),
        ([{"problem": "a", "answer": {"x": 2}}], "row 0: column 'answer' is {'x': 2}"),
    ],
)
def test_bad_rows(tmp_path: Path, rows: list[dict], part: str) -> None:
    system = "S" if "system" in part else ""
    cfg = DataConfig(path=write(tmp_path, rows), system_prompt=system)
    with pytest.raises(InputError) as caught:
        load_prompts(cfg, character_tokenizer(CHAT_TEMPLATE), section="eval.sets.sums")
    assert part in str(caught.value)
    assert str(caught.value).startswith("eval.sets.sums")
    assert "\n" not in str(caught.value)


def test_messages_need_a_chat_template_and_take_no_template(tmp_path: Path) -> None:
    path = write(tmp_path, [{"problem": [{"role": "user", "content": "x"}], "answer": "1"}])
    with pytest.raises(InputError, match="only a chat template takes messages"):
        load_prompts(DataConfig(path=path), character_tokenizer())
    with pytest.raises(InputError, match="leave template out"):
        load_prompts(DataConfig(path=path, template="{prompt}"), character_tokenizer(CHAT_TEMPLATE))


@pytest.mark.parametrize("kind", ["folder", "jsonl", "csv", "parquet"])
def test_empty_data_set(tmp_path: Path, kind: str) -> None:
    rows = datasets.Dataset.from_dict({"problem": [], "answer": []})
    path = tmp_path / f"empty.{kind}"
    if kind == "folder":
        rows.save_to_disk(path)
    elif kind == "jsonl":
        path.touch()
    elif kind == "csv":
        rows.to_csv(path)
    else:
        rows.to_parquet(path)
    with pytest.raises(InputError, match=r"data.path = .*(has no rows|corresponds to no data)"):
        load_prompts(DataConfig(path=str(path)), character_tokenizer())


def test_unreachable_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"data.path = 'nobody/nothing' cannot be loaded .*: give a \.jsonl"):
        load_prompts(DataConfig(path="nobody/nothing"), character_tokenizer())


def test_real_sets() -> None:
    folder = os.environ.get("MEGATRON_GMPO_DATA")
    if not folder:
        pytest.skip("MEGATRON_GMPO_DATA names no folder with math500.parquet and gsm8k_train.parquet")
    template = "{prompt}\nPut the answer in \\boxed{{}}."
    for name, rows in (("math500", 500), ("gsm8k_train", 8792)):
        cfg = DataConfig(path=f"{folder}/{name}.parquet", template=template, max_prompt_tokens=4096)
        prompts = load_prompts(cfg, character_tokenizer(CHAT_TEMPLATE))
        assert len(prompts) == rows
        assert len({prompt.id for prompt in prompts}) == rows
        assert all(prompt.answer and prompt.input_ids for prompt in prompts)
