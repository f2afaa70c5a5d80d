"""SmolLM2 from a GGUF file: a tiny file that gguf's writer makes, and the real one of ``make smollm2``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_gmpo.testing.smollm2 import GGUF

from ..support.commands import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / GGUF).is_file(), reason="no .venv-smollm2: run make smollm2"),
]
PACKAGES = ROOT / GGUF.parts[0]
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ Ġ", "Ġ 1", "1 2", "Â ²"]
"""Merges of the tiny file. Two would join digits if these were not isolated first."""
TEXTS = [
    "Ada has 12 apples and 2 more.",
    "  12 the  in\n\n the 3.14 it's we'll",
    "x²³ ½ naïve 東京 🍎 1٢३",
    "tab\there   end  ",
]


@pytest.fixture(scope="module")
def gguf() -> Any:
    """Return the package gguf, which only the folder of ``make smollm2`` has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PACKAGES)
        yield pytest.importorskip("gguf")


def converted(gguf: Path, out: Path) -> Path:
    """Return the folder that ``make_smollm2`` writes in a process that can import the package gguf."""
    code = "from pathlib import Path; from megatron_gmpo.testing.smollm2 import make_smollm2\n"
    code += f"make_smollm2(Path({str(out)!r}), Path({str(gguf)!r}))"
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{PACKAGES}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return out


def encoded(text: str, tokens: Sequence[str], merges: Sequence[str]) -> list[int]:
    """Encode as llama.cpp does for the kind ``smollm`` (llama-vocab.cpp): two splits, then merges by rank."""
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    numbers = {token: number for number, token in enumerate(tokens)}
    letters, ids = bytes_to_unicode(), []
    for part in filter(None, regex.split(r"(\p{N})", text)):
        for piece in regex.findall(gpt2, part):
            word = [letters[byte] for byte in piece.encode()]
            while pairs := [(ranks[pair], i) for i, pair in enumerate(pairwise(word)) if pair in ranks]:
                _, i = min(pairs)
                word[i : i + 2] = [word[i] + word[i + 1]]
            ids += [numbers[letter] for letter in word]
    return ids


def check_tokenizer(folder: Path, tokens: Sequence[str], merges: Sequence[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == list(tokens)
    assert len(tokenizer) == len(tokens)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == encoded(text, tokens, merges)
        assert tokenizer.decode(ids) == text
    names = [tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token]
    assert names == ["<|im_end|>", "<|im_start|>", "<|im_end|>"]
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    said = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert shown == said
    ids = tokenizer(shown)["input_ids"]
    assert [ids.count(tokens.index(name)) for name in SPECIALS[1:]] == [3, 2]  # each is one token


def write_gguf(gguf: Any, path: Path, model: LlamaForCausalLM, tokens: list[str], pre: str) -> None:
    """Write a model as llama.cpp's convert_hf_to_gguf.py does; the values of ffn_down have 4 bits."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])  # control, normal
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if count := heads.get(name.split(".")[-2]):
            # rotary halves become pairs: convert_hf_to_gguf.py, LlamaModel.permute
            values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        kind = gguf.GGMLQuantizationType.Q4_1 if "down_proj" in name else None
        if kind:
            values = gguf.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny() -> tuple[LlamaForCausalLM, list[str]]:
    tokens = [*SPECIALS, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config), tokens


def test_a_tiny_file(gguf: Any, tiny: tuple[LlamaForCausalLM, list[str]], tmp_path: Path) -> None:
    model, tokens = tiny
    write_gguf(gguf, tmp_path / "tiny.gguf", model, tokens, "smollm")
    folder = converted(tmp_path / "tiny.gguf", tmp_path / "model")
    check_tokenizer(folder, tokens, MERGES)
    back, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert back.config.tie_word_embeddings
    assert not hasattr(back.config, "quantization_config")
    for name, tensor in back.state_dict().items():
        expected = model.state_dict()[name]
        if "down_proj" in name:  # 16 levels between the extremes of 32 values; offset and step are fp16
            blocks = expected.reshape(-1, 32)
            step = (blocks.amax(1) - blocks.amin(1)) / 15
            error = (tensor - expected).reshape(-1, 32).abs().amax(1)
            assert (error <= 0.5 * step + 2e-3 * blocks.abs().amax(1)).all()
        else:
            assert torch.equal(tensor, expected), name


def test_the_tokenizer_of_another_model_is_refused(
    gguf: Any, tiny: tuple[LlamaForCausalLM, list[str]], tmp_path: Path
) -> None:
    write_gguf(gguf, tmp_path / "tiny.gguf", *tiny, "qwen2")
    with pytest.raises(AssertionError, match="does not have SmolLM2's tokenizer"):
        converted(tmp_path / "tiny.gguf", tmp_path / "model")


def test_the_real_file(gguf: Any, tmp_path: Path) -> None:
    fields = gguf.GGUFReader(ROOT / GGUF).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    folder = converted(ROOT / GGUF, tmp_path / "model")
    check_tokenizer(folder, tokens, merges)
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert sum(tensor.numel() for tensor in model.parameters()) == 134_515_008  # as the hub states
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    said = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0, prompt["input_ids"].shape[1] :])
