"""The independent reference: transformers in float64, the paper's formula, torch's AdamW. Shares no code with the project."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM


def load_float64(path: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    return model.train()


def sequence_logprobs(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """(L,) log probability of each token given those before it; 0 for the first."""
    logits = model(tokens[None]).logits[0]
    logprobs = torch.log_softmax(logits, -1)[:-1].gather(1, tokens[1:, None])[:, 0]
    return torch.cat([logprobs.new_zeros(1), logprobs])


def gmpo_loss(model: Any, batch: Any, clip_low: float, clip_high: float) -> torch.Tensor:
    """- 1/N sum_i A_i exp(1/n_i sum_t clip(log pi/pi_old)), sequence by sequence, as the paper's equation (4) reads."""
    total, sequences, start = 0.0, 0, 0
    for i, length in enumerate(batch.lengths.tolist()):
        span = slice(start, start + length)
        start += length
        mask = batch.response_mask[span]
        if not mask.any():
            continue
        sequences += 1
        advantage = batch.advantages[i].double()
        ratio_log = (sequence_logprobs(model, batch.tokens[span]) - batch.old_logprobs[span].double())[mask]
        if advantage > 0:
            ratio_log = torch.minimum(ratio_log, torch.tensor(clip_high, dtype=torch.float64))
        else:
            ratio_log = torch.maximum(ratio_log, torch.tensor(-clip_low, dtype=torch.float64))
        total = total - advantage * torch.exp(ratio_log.mean())
    return total / sequences


def train(path: str, batch: Any, steps: int, *, lr: float, clip_grad: float, clip_low: float, clip_high: float) -> dict[str, Any]:
    """Losses, gradient norms and weights (Hugging Face parameter names of the loaded module) of ``steps`` AdamW steps."""
    model = load_float64(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses, norms = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = gmpo_loss(model, batch, clip_low, clip_high)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
        optimizer.step()
        losses.append(float(loss))
        norms.append(float(norm))
    return {"losses": losses, "norms": norms, "model": model}
