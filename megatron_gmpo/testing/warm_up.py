"""Warm up a model by supervised learning, so that some samples of GMPO's first steps are right."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from .tiny_tokenizers import IMAGE

NO_LOSS = -100
"""Label that transformers excludes from the cross entropy."""


def warm_up(
    model_dir: Path,
    rows: Sequence[dict[str, Any]],
    *,
    steps: int = 200,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
) -> float:
    """Train the model of a folder in place on rows drawn with replacement; return the last loss.

    The loss is the mean cross entropy, in nats, over the tokens that a policy samples. The optimizer is AdamW
    at a constant ``lr``: a model whose learning rate was annealed improves far less in reinforcement
    learning.

    Args:
        rows: examples. A row with ``problem`` and ``answer`` is the text of both and an end token; the answer
            and its end are trained. A row with ``messages`` is a dialogue; the assistant's messages and
            their ends are trained, which the chat template must mark by ``{% generation %}``. The column
            ``images`` has the pictures of a dialogue, in the order of its image parts.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    with_images = hasattr(AutoConfig.from_pretrained(model_dir, trust_remote_code=False), "vision_config")
    processor = (
        AutoImageProcessor.from_pretrained(model_dir, backend="pil", trust_remote_code=False)
        if with_images
        else None
    )
    auto = AutoModelForImageTextToText if with_images else AutoModelForCausalLM
    model = auto.from_pretrained(
        model_dir,
        dtype=torch.float32,
        trust_remote_code=False,
        attn_implementation="sdpa",
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    example = cache(lambda row: _example(tokenizer, processor, rows[row]))
    for _ in track(range(steps), "supervised warm-up"):
        batch = [
            example(row) for row in torch.randint(len(rows), (batch_size,), generator=generator).tolist()
        ]
        loss = model(**_joined(batch, tokenizer)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(model_dir)
    return loss.item()


def _example(tokenizer: Any, processor: Any, row: dict[str, Any]) -> dict[str, Tensor]:
    """Return the (L,) token ids of a row, their labels, and the pixels of its images.

    The label of a token that is not trained is ``NO_LOSS``.
    """
    if "messages" not in row:
        prompt = tokenizer(row["problem"])["input_ids"]
        answer = [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([NO_LOSS] * len(prompt) + answer)
        return {"input_ids": torch.tensor(prompt + answer), "labels": labels}
    encoded = tokenizer.apply_chat_template(
        row["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    ids = encoded["input_ids"][0]
    labels = ids.where(encoded["assistant_masks"][0].bool(), NO_LOSS)
    if not row.get("images"):
        return {"input_ids": ids, "labels": labels}
    pixels = processor(row["images"], return_tensors="pt")
    copies = torch.ones_like(ids)
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    copies[ids == image] = pixels["image_grid_thw"].prod(1) // processor.merge_size**2
    return {
        "input_ids": ids.repeat_interleave(copies),
        "labels": labels.repeat_interleave(copies),
        "pixel_values": pixels["pixel_values"],
        "image_grid_thw": pixels["image_grid_thw"],
    }


def _joined(examples: Sequence[dict[str, Tensor]], tokenizer: Any) -> dict[str, Tensor]:
    """Return the model's arguments for a batch: padded sequences, and the images one after another."""
    padding = {"input_ids": tokenizer.pad_token_id, "labels": NO_LOSS}
    batch = {
        name: pad_sequence([example[name] for example in examples], True, value)
        for name, value in padding.items()
    }
    if "pixel_values" in examples[0]:
        for name in ("pixel_values", "image_grid_thw"):
            batch[name] = torch.cat([example[name] for example in examples])
        image = tokenizer.convert_tokens_to_ids(IMAGE)
        batch["mm_token_type_ids"] = (batch["input_ids"] == image).int()
    return batch
