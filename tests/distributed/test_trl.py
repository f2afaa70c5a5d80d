"""TRL's GMPOTrainer and the policy train the same samples alike: losses, gradients and weights of a step.

docs/coming_from.md lists the settings under which they agree; ``ARGUMENTS`` and ``config`` have them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_gmpo.batch.assembly import whole_batch
from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.config import Config
from megatron_gmpo.losses.advantages import group_advantages
from megatron_gmpo.testing import Family
from megatron_gmpo.testing.tiny_tokenizers import text_tokenizer

from ..support import fuzz_steps, reference
from ..support.groups import index_of
from ..support.ranks import RankPool

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PROMPTS, SAMPLES, UPDATES = 4, 4, 4
LR, EPS, TEMPERATURE = 5e-3, 1e-4, 0.8
CLIP_LOW, CLIP_HIGH = 0.1, 0.2
ARGUMENTS: dict[str, Any] = {
    # a rollout of 16 samples: 4 optimizer steps of 2 microbatches of 2
    "num_generations": SAMPLES,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 2 * UPDATES,
    "max_steps": UPDATES,
    "epsilon": CLIP_LOW,
    "epsilon_high": CLIP_HIGH,
    "temperature": TEMPERATURE,
    "learning_rate": LR,
    "lr_scheduler_type": "constant",
    "adam_epsilon": EPS,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def make_groups() -> list[SampleGroup]:
    """Return 4 prompts with 4 samples each, of 1 to 24 tokens; the rewards of the last prompt are equal."""
    draw = np.random.default_rng(0)

    def sample(prompt: list[int], reward: float) -> Sample:
        tokens = np.concatenate([prompt, draw.integers(3, 259, draw.integers(1, 25))])
        mask = np.arange(len(tokens)) >= len(prompt)
        return Sample(tokens, mask, np.zeros(len(tokens)), "", "stop", 0, reward)

    rewards = [[1, 0, 0, 1], [0.5, -2, 3, 0.25], [0, 0, 0, 1], [1, 1, 1, 1]]
    prompts = [draw.integers(3, 259, length).tolist() for length in (3, 9, 1, 5)]
    return [
        SampleGroup(Prompt(str(number), ""), [sample(prompt, reward) for reward in rewards[number]])
        for number, prompt in enumerate(prompts)
    ]


def trl_advantages(rewards: Tensor) -> Tensor:
    """Return (r - mean) / (std + 1e-4), as TRL does."""
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    """Return the model's tensors by their names in a Hugging Face folder."""
    model.save_pretrained(folder)
    return reference.saved_tensors(folder)


def by_trl(path: Path, groups: list[SampleGroup], out: Path, **arguments: float) -> dict[str, Any]:
    """Train one rollout with the real trainer, whose ``rollout_func`` returns the given samples.

    Returns:
        The loss and clipped gradients of every optimizer step, the weights after the last one, the
        advantages, the samples in the order in which TRL trains on them, as (prompt, sample) numbers, and the
        largest share of tokens that each side of the clip changed.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    numbers = {
        tuple(sample.tokens[sample.response_mask].tolist()): (group, number)
        for group, one in enumerate(groups)
        for number, sample in enumerate(one.samples)
    }
    seen: dict[str, Any] = {"losses": [], "gradients": [], "order": [], "advantages": []}

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        group_numbers = [int(prompt) for prompt in prompts]
        samples = [groups[group].samples[at % SAMPLES] for at, group in enumerate(group_numbers)]
        return {
            "prompt_ids": [sample.tokens[~sample.response_mask].tolist() for sample in samples],
            "completion_ids": [sample.tokens[sample.response_mask].tolist() for sample in samples],
            "logprobs": None,
        }

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        places = [numbers[tuple(ids)] for ids in completion_ids]
        return [groups[group].samples[number].reward for group, number in places]

    class Recorded(GMPOTrainer):
        def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
            loss = super()._compute_loss(model, inputs)
            seen["losses"].append(float(loss.detach()))
            seen["advantages"] += inputs["advantages"].tolist()
            for ids, mask in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True):
                seen["order"].append(numbers[tuple(ids[mask.bool()].tolist())])
            return loss

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            weights = [parameter.data for parameter in model.parameters()]
            for parameter in model.parameters():
                parameter.data = parameter.grad
            seen["gradients"].append(saved(model, out / f"gradients{len(seen['gradients'])}"))
            for parameter, data in zip(model.parameters(), weights, strict=True):
                parameter.data = data

    trainer = Recorded(
        str(path),
        reward,
        args=GMPOConfig(str(out), **ARGUMENTS, **arguments),
        train_dataset=Dataset.from_dict({"prompt": [str(number) for number in range(PROMPTS)]}),
        rollout_func=rollout,
        callbacks=[Gradients()],
    )
    trainer.train()
    seen["losses"] = [sum(seen["losses"][i : i + 2]) for i in range(0, 2 * UPDATES, 2)]
    seen["weights"] = saved(trainer.model, out / "trained")
    for name in ("low", "high"):
        figure = f"clip_ratio/{name}_mean"
        seen[name] = max(entry.get(figure, 0) for entry in trainer.state.log_history)
    return seen


def config(path: Path, beta: float, clip_grad: float) -> Config:
    tree = {
        "model": {"path": str(path), "dtype": "fp32"},
        "device": "cpu",
        "rollout": {"temperature": TEMPERATURE},
        "optimizer": {
            "lr": LR,
            "adam_eps": EPS,
            "clip_grad": clip_grad,
            "use_distributed_optimizer": False,
        },
        "algorithm": {"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH, "kl_coef": beta},
        "train": {"minibatches_per_step": UPDATES, "max_tokens_per_microbatch": 64},
    }
    return Config.model_validate(tree)


@pytest.mark.parametrize(
    ("family", "beta", "clip_grad"), [("qwen3", 0.0, 0.3), ("qwen3", 0.1, 0.0), ("qwen3_moe", 0.0, 0.0)]
)
def test_a_step_equals_that_of_trl(
    ranks: RankPool,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    family: Family,
    beta: float,
    clip_grad: float,
) -> None:
    shape = {"hidden_size": 32, "ffn_hidden_size": 32, "head_dim": 16, "num_experts": 4}
    path = tiny_model(family, tokenizer=text_tokenizer(), **shape)
    groups = make_groups()
    trl = by_trl(path, groups, tmp_path, beta=beta, max_grad_norm=clip_grad)
    order = torch.tensor([group * SAMPLES + number for group, number in trl["order"]])
    assert sorted(order.tolist()) == list(range(PROMPTS * SAMPLES))
    batch = whole_batch(groups)
    batch.advantages = group_advantages(index_of(groups), f"{__name__}:trl_advantages")
    batch = batch.take(order)
    assert_close(batch.advantages, torch.tensor(trl["advantages"]), atol=1e-6, rtol=1e-6)
    (ours,) = ranks.run(1, fuzz_steps.one_step, config(path, beta, clip_grad), batch)
    assert trl["low"] > 0
    assert trl["high"] > 0
    assert ours.losses == pytest.approx(trl["losses"], rel=1e-5, abs=1e-6)
    for found, expected in zip(ours.gradients, trl["gradients"], strict=True):
        assert found.keys() == expected.keys()
        assert fuzz_steps.distance(found, expected) < 1e-5
    assert fuzz_steps.distance(ours.weights, trl["weights"]) < 1e-5
