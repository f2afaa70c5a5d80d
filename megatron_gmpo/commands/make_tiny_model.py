"""Write a tiny random model as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..command_line import Options, parse_options
from ..config import Positive
from ..testing import AnyFamily


class TinyModel(Options):
    """Write a tiny random model as a Hugging Face folder.

    The folder has config.json, safetensors in the hub's layout, and a tokenizer.
    """

    out: Path
    """Folder to write."""
    family: AnyFamily = "qwen3_moe"
    """Architecture, by its Hugging Face model_type."""
    tokenizer: Literal["arithmetic", "countdown", "text", "vision"] = "arithmetic"
    """Tokenizer of the model. ``arithmetic`` and ``countdown`` have one token per character of their task.
    ``text`` is a byte-level BPE with a chat template and encodes any text. ``vision`` has a token for each
    byte and the image tokens that a vision-language model needs."""
    tokenizer_corpus: Path | None = None
    """.parquet or .jsonl file for the merges of the text tokenizer; by default each token is one byte."""
    tokenizer_corpus_column: str = "problem"
    """Column of that file that holds the text."""
    num_layers: Positive = 4
    """Number of transformer layers."""
    hidden_size: Positive = 64
    """Width of the residual stream."""
    ffn_hidden_size: Positive = 64
    """Width of the MLP; in a MoE, width of each expert."""
    num_experts: Positive = 8
    """Number of experts per layer of a MoE; two are active per token."""
    tie_word_embeddings: bool = False
    """Share the input and output embeddings."""
    randomize_norms: bool = False
    """Draw norm weights and biases at random too."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the saved weights."""
    seed: int = 0
    """Seed of the weights."""


def main(argv: list[str]) -> None:
    options = parse_options(TinyModel, argv, "megatron-gmpo make_tiny_model")

    import torch
    from transformers.utils import logging

    from ..testing import tiny_tokenizers
    from ..testing.tiny_models import make_tiny_model

    logging.disable_progress_bar()
    if options.tokenizer == "text":
        tokenizer = tiny_tokenizers.text_tokenizer(options.tokenizer_corpus, options.tokenizer_corpus_column)
    else:
        tokenizer = getattr(tiny_tokenizers, f"{options.tokenizer}_tokenizer")()
    shape = options.model_dump(
        exclude={"out", "tokenizer", "tokenizer_corpus", "tokenizer_corpus_column", "dtype"}
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    model = make_tiny_model(options.out, tokenizer=tokenizer, dtype=dtype, **shape)
    parameters, vocabulary = model.num_parameters(), len(tokenizer)
    print(f"{options.out}: {options.family}, {parameters:,} parameters, vocabulary {vocabulary}")
