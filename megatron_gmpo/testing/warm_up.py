"""Warm up a model by supervised learning, so that some samples of GMPO's first steps are right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

NO_LOSS = -100
"""Label that transformers excludes from the cross entropy."""


def warm_up(
    model_dir: Path,
    problems: Sequence[dict[str, str]],
    *,
    steps: int = 200,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
) -> float:
    """Train the model of a folder in place on ``problem + answer + end token``; return the last loss.

    The loss is the mean cross entropy, in nats, over the tokens of the answer and the end token. The
    optimizer is AdamW at a constant ``lr``: a model whose learning rate was annealed improves far less in
    reinforcement learning. Problems are drawn with replacement.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=torch.float32,
        trust_remote_code=False,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    for _ in track(range(steps), "supervised warm-up"):
        input_ids, labels = [], []
        for row in torch.randint(len(problems), (batch_size,), generator=generator).tolist():
            prompt = tokenizer(problems[row]["problem"])["input_ids"]
            answer = [*tokenizer(problems[row]["answer"])["input_ids"], tokenizer.eos_token_id]
            input_ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([NO_LOSS] * len(prompt) + answer))
        loss = model(
            input_ids=pad_sequence(input_ids, batch_first=True, padding_value=tokenizer.pad_token_id),
            labels=pad_sequence(labels, batch_first=True, padding_value=NO_LOSS),
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(model_dir)
    return loss.item()
