"""Tiny models, their tokenizers, the problems of the demo, and the supervised warm-up."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_gmpo.errors import InputError
from megatron_gmpo.testing import Family, arithmetic, word_problems
from megatron_gmpo.testing.tiny_models import make_tiny_model
from megatron_gmpo.testing.tiny_tokenizers import arithmetic_tokenizer, dialogue_tokenizer, text_tokenizer
from megatron_gmpo.testing.warm_up import warm_up

FAMILIES = get_args(Family)
TEXT = text_tokenizer()
TOKENS = torch.tensor([[2, 9, 12, 6, 7, 14]])


def tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_the_returned_model(family: Family, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path, family=family, randomize_norms=True).eval()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.model_type == family
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_moe_tensors_have_the_names_and_shapes_of_the_hub(tiny_model: Callable[..., Path]) -> None:
    found = tensors(tiny_model("qwen3_moe"))
    expected = {"model.embed_tokens.weight": (16, 64), "model.norm.weight": (64,), "lm_head.weight": (16, 64)}
    for layer in range(4):
        here = f"model.layers.{layer}."
        expected |= {
            here + name: (64,) for name in ("input_layernorm.weight", "post_attention_layernorm.weight")
        }
        expected |= {here + f"self_attn.{name}_norm.weight": (32,) for name in "qk"}
        expected |= {
            here + f"self_attn.{name}_proj.weight": (rows, 64)
            for name, rows in (("q", 128), ("k", 64), ("v", 64))
        }
        expected |= {here + "self_attn.o_proj.weight": (64, 128), here + "mlp.gate.weight": (8, 64)}
        expected |= {
            here + f"mlp.experts.{expert}.{name}_proj.weight": (64, 64)
            for expert in range(8)
            for name in ("gate", "up", "down")
        }
    assert found == expected


def test_options_shape_the_model(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(
        "qwen3_moe", num_layers=2, num_experts=4, tie_word_embeddings=True, dtype=torch.bfloat16
    )
    assert "lm_head.weight" not in tensors(folder)
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in tensors(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.dtype, model.config.num_hidden_layers, model.config.num_experts) == (torch.bfloat16, 2, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_randomized_norms_leave_no_vector_constant(family: Family, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path, family=family, randomize_norms=True)
    vectors = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 1}
    assert len(vectors) >= 9
    assert [name for name, vector in vectors.items() if vector.std() < 0.02] == []
    plain = make_tiny_model(tmp_path, family=family)
    assert all(parameter.std() == 0 for parameter in plain.parameters() if parameter.ndim == 1)


def test_the_seed_decides_the_weights_and_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (make_tiny_model(tmp_path, family="qwen3", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(TOKENS).logits, again(TOKENS).logits)
    assert not torch.allclose(first(TOKENS).logits, other(TOKENS).logits, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_tokenizers_encode_as_before(
    family: Family, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    loaded = AutoTokenizer.from_pretrained(tiny_model(family))
    tokens = loaded("07+45=")["input_ids"]
    assert tokens == arithmetic_tokenizer()("07+45=")["input_ids"] == [2, 9, 12, 2 + 4, 2 + 5, 14]
    assert loaded.decode(tokens) == "07+45="
    assert (
        loaded.decode([*tokens, loaded.eos_token_id, loaded.pad_token_id], skip_special_tokens=True)
        == "07+45="
    )
    make_tiny_model(tmp_path, family=family, tokenizer=TEXT)
    text = "Zoë pays  $3.50\n\nfor 7 \\frac{1}{2} 🍎"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == TEXT(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == TEXT.chat_template


def test_generation_stops_at_the_tokenizers_end(tiny_model: Callable[..., Path]) -> None:
    config = json.loads((tiny_model("qwen3") / "generation_config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (1, 0)


def test_arithmetic_tokenizer_has_a_token_a_character() -> None:
    tokenizer = arithmetic_tokenizer()
    assert len(tokenizer) == 16
    assert len(tokenizer("12 - 3 = 9")["input_ids"]) == 10
    with pytest.raises(Exception, match="UNK"):
        tokenizer("x")


@given(st.text(st.characters(codec="utf-8")))
def test_byte_tokens_round_trip_any_text(text: str) -> None:
    tokens = TEXT(text)["input_ids"]
    assert TEXT.decode(tokens) == text
    if "<|" not in text:
        assert len(tokens) == len(text.encode())


def test_chat_template_is_chatml() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6*7?"}]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n6*7?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert TEXT.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    tokens = TEXT(expected)["input_ids"]
    assert tokens.count(TEXT.convert_tokens_to_ids("<|im_start|>")) == 3
    assert tokens.count(TEXT.eos_token_id) == 2


def test_merges_learned_on_a_corpus_shorten_its_text(tmp_path: Path) -> None:
    rows = [{"question": f"Natalia sold {i} clips to her friends in April."} for i in range(50)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    learned = text_tokenizer(corpus, "question", vocab_size=300)
    text = rows[7]["question"]
    assert len(learned) == 300
    assert len(learned(text)["input_ids"]) < len(TEXT(text)["input_ids"]) / 2
    assert learned.decode(learned("Ünseen ✓")["input_ids"]) == "Ünseen ✓"
    with pytest.raises(
        InputError, match=r"tokenizer_corpus_column = 'problem' is not in .* choose from question"
    ):
        text_tokenizer(corpus)
    with pytest.raises(InputError, match=r"gone\.jsonl does not exist"):
        text_tokenizer(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match=r"give a \.parquet or \.jsonl file"):
        text_tokenizer(tmp_path / "corpus.txt")


@pytest.mark.slow
def test_command_line_writes_a_model_and_names_a_mistake(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.make_tiny_model", "--out", str(tmp_path / "m")]
    root = Path(__file__).parents[2]
    options = ["--family", "llama", "--tokenizer", "text", "--dtype", "bf16", "--tie_word_embeddings"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["model_type"], config["dtype"], config["vocab_size"]) == ("llama", "bfloat16", 259)
    wrong = ["--tokenizer", "text", "--tokenizer_corpus", "none.jsonl"]
    done = subprocess.run([*command, *wrong], capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 2
    assert (
        done.stderr == "error: tokenizer_corpus = none.jsonl does not exist: give a .parquet or .jsonl file\n"
    )


def test_addition_problems_are_right_disjoint_and_seeded(tmp_path: Path) -> None:
    train, heldout = arithmetic.addition_problems(num_heldout=200, seed=3)
    assert (len(train), len(heldout)) == (9800, 200)
    assert len({problem["problem"] for problem in train + heldout}) == 10_000
    for problem in train + heldout:
        a, b = problem["problem"].removesuffix("=").split("+")
        assert (len(a), len(b), len(problem["answer"])) == (2, 2, 3)
        assert int(a) + int(b) == int(problem["answer"])
    assert arithmetic.addition_problems(seed=3) == (train, heldout)
    assert arithmetic.addition_problems(seed=4)[1] != heldout
    arithmetic.write_addition_problems(tmp_path, num_heldout=200, seed=3)
    assert [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()] == heldout
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 9800


def test_warm_up_teaches_the_answer_its_end_and_not_the_prompt(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, num_layers=2, num_experts=4)
    names = tensors(tmp_path)
    tokenizer = arithmetic_tokenizer()
    problems = [{"problem": "07+45=", "answer": "052"}, {"problem": "1+1=", "answer": "2"}]
    loss = warm_up(tmp_path, problems, steps=60, batch_size=8)
    assert tensors(tmp_path) == names
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for problem in problems:
        prompt = torch.tensor([tokenizer(problem["problem"])["input_ids"]])
        generated = model.generate(prompt, do_sample=False, max_new_tokens=6)[0, prompt.shape[1] :]
        assert generated.tolist() == [*tokenizer(problem["answer"])["input_ids"], tokenizer.eos_token_id]
        prompt_loss = model(prompt, labels=prompt).loss
        assert prompt_loss > 2, "the prompt's own tokens were trained"
    assert 0 < loss < 0.2


@pytest.mark.slow
def test_warm_up_reads_the_pictures(tmp_path: Path) -> None:
    """Equal questions about two pictures of different sizes have different answers."""
    tokenizer = dialogue_tokenizer(["Which colour?", "black", "white"], images=True)
    make_tiny_model(tmp_path, family="qwen3_vl", tokenizer=tokenizer, num_layers=2)
    question = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
    rows = [
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": colour}],
            "images": [Image.new("L", (side, 64), colour)],
        }
        for colour, side in (("black", 64), ("white", 96))
    ]
    # without the pictures the loss is at least log(2) / 2: the colour and an end token
    assert 0 < warm_up(tmp_path, rows, steps=40, batch_size=8) < 0.1


def test_word_problems_are_solved_by_adding_their_numbers(tmp_path: Path) -> None:
    counts = word_problems.write_word_problems(tmp_path, num_train=400, num_heldout=60)
    assert list(counts.values()) == [400, 60]
    asked: list[set[str]] = []
    for path in counts:
        problems = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({problem["problem"] for problem in problems}) == counts[path]
        for problem in problems:
            assert sum(map(int, re.findall(r"\d+", problem["problem"]))) == int(problem["answer"])
        unknown = re.compile("|".join((r"\d+", *word_problems.NAMES, *word_problems.THINGS)))
        asked.append({unknown.sub("_", problem["problem"]) for problem in problems})
    train, heldout = asked
    assert len(train) == len(word_problems.STORIES)
    assert len(heldout) == len(word_problems.UNSEEN)
    assert not train & heldout
    again = word_problems.write_word_problems(tmp_path / "again", num_train=400, num_heldout=60)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in counts]
