"""Writes a tiny random model as a Hugging Face folder: config, safetensors in the hub's layout, tokenizer.

python -m tools.make_tiny_model --out runs/tiny --family qwen3_moe --tokenizer arithmetic
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from megatron_gmpo.config import exit_with_one_line
from megatron_gmpo.errors import InputError

Family = Literal["qwen3_moe", "qwen3", "qwen2_moe", "qwen2", "mixtral", "llama", "deepseek_v3", "glm4_moe"]

PAD, EOS = "<pad>", "<eos>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    """For sums: pad, eos, the ten digits and ``+-= ``; 16 tokens in all."""
    return character_tokenizer("0123456789+-= ")


def countdown_tokenizer() -> PreTrainedTokenizerFast:
    """For the Countdown numbers task: pad, eos, the ten digits and ``+-*/(),=:``; 21 tokens in all."""
    return character_tokenizer("0123456789+-*/(),=:")


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token a character. Any that is not among ``characters`` is an error when encoding."""
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def text_tokenizer(
    corpus: Path | None = None, column: str = "problem", vocab_size: int = 1024
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's special tokens and the ChatML template, so that it encodes and round-trips any text.

    Args:
        corpus: .parquet or .jsonl file whose ``column`` the merges are learned on; None leaves the 256 bytes.
        vocab_size: tokens when there is a corpus, the 3 special ones included.

    Raises:
        InputError: the corpus does not exist, has another suffix or lacks the column.
    """
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = vocab_size if corpus else len(specials) + len(alphabet)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(_column(corpus, column) if corpus else [], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def _column(path: Path, column: str) -> list[str]:
    from datasets import load_dataset

    readers = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
    if path.suffix not in readers:
        raise InputError(f"tokenizer_corpus = {path}: give a .parquet or .jsonl file")
    if not path.exists():
        raise InputError(f"tokenizer_corpus = {path} does not exist: give a .parquet or .jsonl file")
    table = load_dataset(readers[path.suffix], data_files=str(path), split="train")
    if column not in table.column_names:
        raise InputError(
            f"tokenizer_corpus_column = {column!r} is not in {path}: choose from {', '.join(table.column_names)}"
        )
    return table[column][:]


def make_tiny_model(
    out: Path,
    *,
    family: Family = "qwen3_moe",
    tokenizer: PreTrainedTokenizerFast | None = None,
    num_layers: int = 4,
    hidden_size: int = 64,
    ffn_hidden_size: int = 64,
    head_dim: int = 32,
    num_experts: int = 8,
    tie_word_embeddings: bool = False,
    initializer_range: float = 0.05,
    randomize_norms: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    """Writes the folder ``out`` and returns the model it holds: 4 attention heads, 2 key-value heads, top-2 of the experts.

    Args:
        tokenizer: saved beside the model and the source of its vocabulary size; None means ``arithmetic_tokenizer()``.
        ffn_hidden_size: width of the MLP, of each expert in a MoE.
        head_dim: width of a head in the Qwen3 families and GLM, where DeepSeek's has half as many rotary channels more; the others split
            ``hidden_size`` over the heads.
        num_experts: experts a layer of a MoE.
        initializer_range: standard deviation of the weights; at this width the usual 0.02 makes near-uniform logits, near-equal
            router scores and slow learning.
        randomize_norms: draw norm weights and biases too, which are ones and zeros otherwise, so that a comparison of logits
            catches their mistakes.
        seed: seeds the weights; torch's global generator is left as it was.
    """
    tokenizer = tokenizer or arithmetic_tokenizer()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": ffn_hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "initializer_range": initializer_range,
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family in ("qwen3", "qwen3_moe"):
        shape["head_dim"] = head_dim
    if family == "qwen3_moe":
        shape |= {
            "num_experts": num_experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": ffn_hidden_size,
            "norm_topk_prob": True,
        }
    if family in ("deepseek_v3", "glm4_moe"):
        shape |= {
            "n_routed_experts": num_experts,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "moe_intermediate_size": ffn_hidden_size,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 0,
        }
    if family == "deepseek_v3":
        shape |= {
            "num_key_value_heads": 4,
            "q_lora_rank": hidden_size * 3 // 4,
            "kv_lora_rank": hidden_size // 2,
            "qk_nope_head_dim": head_dim,
            "qk_rope_head_dim": head_dim // 2,
            "v_head_dim": head_dim,
        }
    if family == "glm4_moe":
        shape |= {"head_dim": head_dim, "attention_bias": True, "use_qk_norm": True}
    if family == "qwen2_moe":
        shape |= {
            "num_experts": num_experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": ffn_hidden_size,
            "shared_expert_intermediate_size": 2 * ffn_hidden_size,
        }
    if family == "mixtral":
        shape |= {"num_local_experts": num_experts, "num_experts_per_tok": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape), dtype=torch.float32)
        with torch.no_grad():
            # transformers zeroes the padding token's embedding; should it be sampled, the norm's gradient there is 1 / sqrt(eps)
            model.get_input_embeddings().weight[tokenizer.pad_token_id].normal_(std=initializer_range)
        if randomize_norms:
            with torch.no_grad():
                for tensor in model.state_dict().values():
                    if tensor.ndim == 1:
                        tensor.add_(0.1 * torch.randn_like(tensor))
    for parameter in model.parameters():  # buffers, as a router's bias, stay fp32
        parameter.data = parameter.data.to(dtype)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model


def main(
    out: Path,
    family: Family = "qwen3_moe",
    tokenizer: Literal["arithmetic", "countdown", "text"] = "arithmetic",
    tokenizer_corpus: Path | None = None,
    tokenizer_corpus_column: str = "problem",
    num_layers: int = 4,
    hidden_size: int = 64,
    ffn_hidden_size: int = 64,
    num_experts: int = 8,
    tie_word_embeddings: bool = False,
    randomize_norms: bool = False,
    dtype: Literal["fp32", "bf16"] = "fp32",
    seed: int = 0,
) -> None:
    """Write a tiny random model as a Hugging Face folder.

    Args:
        out: Folder to write.
        family: Architecture, by its Hugging Face model_type.
        tokenizer: One token a character of arithmetic or of the Countdown task, or byte-level BPE with a chat template for any text.
        tokenizer_corpus: .parquet or .jsonl file the text tokenizer's merges are learned on; without it a token is a byte.
        tokenizer_corpus_column: Column of that file.
        num_layers: Transformer layers.
        hidden_size: Width of the residual stream.
        ffn_hidden_size: Width of the MLP, of each expert in a MoE.
        num_experts: Experts a layer of a MoE; two are active.
        tie_word_embeddings: Share the input and output embeddings.
        randomize_norms: Draw norm weights and biases too.
        dtype: Precision of the saved weights.
        seed: Seed of the weights.
    """
    tokenizers = {
        "arithmetic": arithmetic_tokenizer,
        "countdown": countdown_tokenizer,
        "text": lambda: text_tokenizer(tokenizer_corpus, tokenizer_corpus_column),
    }
    model = make_tiny_model(
        out,
        family=family,
        tokenizer=tokenizers[tokenizer](),
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_experts=num_experts,
        tie_word_embeddings=tie_word_embeddings,
        randomize_norms=randomize_norms,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype],
        seed=seed,
    )
    print(f"{out}: {family}, {model.num_parameters():,} parameters, vocabulary {model.config.vocab_size}")


if __name__ == "__main__":
    logging.disable_progress_bar()
    try:
        tyro.cli(main, use_underscores=True)
    except InputError as error:
        exit_with_one_line(error)
