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
from transformers import AutoModelForCausalLM, AutoTokenizer

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
            their ends are trained, which the chat template must mark by ``{% generation %}``.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=torch.float32,
        trust_remote_code=False,
        attn_implementation="sdpa",
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    example = cache(lambda row: _example(tokenizer, rows[row]))
    for _ in track(range(steps), "supervised warm-up"):
        batch = [
            example(row) for row in torch.randint(len(rows), (batch_size,), generator=generator).tolist()
        ]
        input_ids, labels = [list(column) for column in zip(*batch, strict=True)]
        loss = model(
            input_ids=pad_sequence(input_ids, batch_first=True, padding_value=tokenizer.pad_token_id),
            labels=pad_sequence(labels, batch_first=True, padding_value=NO_LOSS),
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(model_dir)
    return loss.item()


def _example(tokenizer: Any, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the (L,) token ids of a row and their labels, which are ``NO_LOSS`` for what is not trained."""
    if "messages" in row:
        encoded = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        ids = encoded["input_ids"][0]
        return ids, ids.where(encoded["assistant_masks"][0].bool(), NO_LOSS)
    prompt = tokenizer(row["problem"])["input_ids"]
    answer = [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(prompt + answer), torch.tensor([NO_LOSS] * len(prompt) + answer)
