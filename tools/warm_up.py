"""Supervised warm-up with plain transformers, so that the samples of GMPO's first steps hold some right answers.

python -m tools.warm_up --model runs/tiny --data runs/arithmetic/train.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro
from rich.progress import track
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

NO_LOSS = -100  # the label transformers leaves out of its cross entropy


def warm_up(
    model_dir: Path,
    problems: Sequence[dict[str, str]],
    *,
    steps: int = 200,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
) -> float:
    """Trains the model of a folder on ``problem + answer + end token``, saves it there and returns the last batch's loss.

    The loss is the mean cross entropy, in nats, of the tokens of the answer and the end token. AdamW at a constant ``lr``:
    annealing it leaves a model that reinforcement learning improves far less. Problems are drawn with replacement.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, experts_implementation="grouped_mm"
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


def main(
    model: Path, data: Path, steps: int = 200, batch_size: int = 64, lr: float = 2e-3, seed: int = 0
) -> None:
    """Train the model of a Hugging Face folder on the answers of a .jsonl file, in place.

    Args:
        model: Folder of the model.
        data: File with one object a line and the keys problem and answer.
        steps: Optimizer steps.
        batch_size: Problems a step.
        lr: Learning rate of AdamW.
        seed: Seed of the order of the problems.
    """
    problems = [json.loads(line) for line in data.read_text().splitlines()]
    loss = warm_up(model, problems, steps=steps, batch_size=batch_size, lr=lr, seed=seed)
    print(f"{model}: loss {loss:.3f} nats a token after {steps} steps")


if __name__ == "__main__":
    logging.disable_progress_bar()
    tyro.cli(main, use_underscores=True)
