"""Take steps with TRL's GMPOTrainer and measure them; benchmarks/step.py runs this as the peer.

TRL takes given responses through its ``rollout_func``, and their rewards as a column that the reward function
returns. Gradient checkpointing is off, although TRL's default is on, because our side does not recompute
layers either. TRL pads all sequences of a step to the longest prompt and the longest response, and splits a
minibatch into equal microbatches.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from megatron_gmpo.batch.samples import SampleGroup

Seconds = dict[str, float]


class TimedTrainer(GMPOTrainer):
    """A trainer that adds the seconds of rollouts and of old log probabilities to ``seconds``."""

    seconds: defaultdict[str, float]

    def _generate(self, prompts: list[Any]) -> Any:
        start = time.process_time()
        found = super()._generate(prompts)
        self.seconds["rollout"] += time.process_time() - start
        return found

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if not torch.is_grad_enabled():
            self.seconds["logprobs"] += time.process_time() - start
        return found


class StepTimes(TrainerCallback):
    """Record the seconds of every step by phase, and call ``after_step``, whose time does not count.

    A step has ``updates`` optimizer steps.
    """

    def __init__(
        self, updates: int, phases: defaultdict[str, float], after_step: Callable[[], object]
    ) -> None:
        self.updates, self.phases, self.steps = updates, phases, list[Seconds]()
        self.after_step = after_step

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.phases.clear()
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.updates == 0:
            now = time.process_time()
            other = sum(self.phases.values())
            self.steps.append({**self.phases, "train": now - self.start - other, "step": now - self.start})
            self.after_step()
            self.phases.clear()
            self.start = time.process_time()


def trl_steps(
    model: Path,
    out: Path,
    *,
    prompts: list[list[int]],
    samples: int,
    updates: int,
    microbatch: int | None,
    steps: int,
    max_new_tokens: int,
    reward: Callable[[list[int]], float],
    given: list[SampleGroup] | None = None,
    after_step: Callable[[], object] = lambda: None,
) -> list[Seconds]:
    """Take ``steps`` steps on all prompts and return the seconds of each by phase.

    Args:
        model: Hugging Face folder.
        out: folder for TRL's output, which stays empty.
        prompts: token ids.
        samples: responses to a prompt.
        updates: optimizer steps of a step.
        microbatch: sequences of a microbatch; None means the whole minibatch.
        reward: the reward of a sampled response, from its token ids.
        given: responses to train on instead of sampling, with their rewards.
        after_step: called after each step; its time does not count.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer.decode(prompt) for prompt in prompts]

    def rollout(asked: list[str], _: Any) -> dict[str, Any]:
        """Return the next given response to each prompt; TRL asks for each prompt ``samples`` times."""
        assert given is not None
        of_prompt = {text: iter(group.samples) for text, group in zip(texts, given, strict=True)}
        drawn = [next(of_prompt[text]) for text in asked]
        found: dict[str, Any] = defaultdict(list)
        for sample in drawn:
            length = int(sample.response_mask.argmax())
            found["prompt_ids"].append(sample.tokens[:length].tolist())
            found["completion_ids"].append(sample.tokens[length:].tolist())
            found["reward"].append(sample.reward)
        return {**found, "logprobs": None}

    def rewards(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return columns["reward"] if given else [reward(ids) for ids in completion_ids]

    minibatch = len(prompts) * samples // updates
    microbatches = minibatch // (microbatch or minibatch)
    config = GMPOConfig(
        str(out),
        per_device_train_batch_size=minibatch // microbatches,
        gradient_accumulation_steps=microbatches,
        steps_per_generation=updates * microbatches,
        num_generations=samples,
        max_completion_length=max_new_tokens,
        max_steps=steps * updates,
        gradient_checkpointing=False,
        lr_scheduler_type="constant",
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = TimedTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        rewards,
        config,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        rollout_func=rollout if given else None,
    )
    trainer.seconds = defaultdict(float)
    times = StepTimes(updates, trainer.seconds, after_step)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(times)
    trainer.train()
    return times.steps
