"""Random batches through a step of the policy, with every combination of what the step leaves out.

The ranks of ``tests/distributed/test_fuzz_steps.py`` run ``compare``. It computes in float64. In fp32 a token
whose log ratio is next to the clip, or whose second and third expert have nearly equal scores, would be
treated differently in two computations that are both right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from megatron_gmpo.batch.assembly import whole_batch
from megatron_gmpo.batch.columns import TrainBatch, turn_numbers
from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.config import Config
from megatron_gmpo.distributed import rank
from megatron_gmpo.losses.advantages import group_advantages
from megatron_gmpo.losses.correction import correct
from megatron_gmpo.losses.objective import Objective
from megatron_gmpo.models import description
from megatron_gmpo.policy import build, schedule
from megatron_gmpo.policy.policy import Policy

from . import cases, reference
from .batches import lean_share, split, whole
from .groups import index_of

SAVINGS = ("sequences", "first pass", "logits")
COMBINATIONS = [frozenset(chosen) for size in range(4) for chosen in combinations(SAVINGS, size)]
"""The parts that a step leaves out: the sequences without gradient, the pass for the old log probabilities
of the first minibatch, and the logits of all tokens. The first combination leaves out nothing."""
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Step:
    """The results of a step: a loss and gradients for each minibatch, and the rest once.

    Attributes:
        losses: the loss of each minibatch.
        gradients: their gradients by Hugging Face name.
        old_logprobs: (L,) old log probabilities, 0 where none are needed.
        weights: the weights after the step, by Hugging Face name.
        computed: share of the tokens that were computed.
    """

    losses: list[float]
    gradients: list[dict[str, Tensor]]
    old_logprobs: Tensor
    weights: dict[str, Tensor]
    computed: float


def compare(
    cfg: Config, seeds: range, formula: Any = None, only: frozenset[str] | None = None
) -> tuple[list[str], int]:
    """Make a step on the batch of each seed, with every combination of savings.

    Args:
        formula: the loss for ``reference.batch_loss``. None compares with the step that leaves out nothing,
            otherwise with transformers.
        only: the only combination to run; None means all.

    Returns:
        A line for every difference, and how many batches had sequences left out.
    """
    failures: list[str] = []
    leaner = 0
    with _float64(), cases.opened(cfg) as policy:
        objective = cases._objective(policy)
        model = Reference(cfg, objective, formula) if formula and rank() == 0 else None
        start = _State(policy)
        for seed in seeds:
            start.restore()
            batch = random_batch(seed, policy)
            expected = model.step(batch) if model else None
            for savings in [only] if only is not None else COMBINATIONS:
                start.restore()
                with leaving_out(savings, objective) as changed:
                    found = _step(policy, replace(batch), changed, "first pass" in savings)
                expected = expected or found
                failures += [
                    f"seed {seed}, without {sorted(savings)}: {x}" for x in differences(found, expected)
                ]
            leaner += found.computed < 1
    return (failures if rank() == 0 else []), leaner


def one_step(cfg: Config, batch: TrainBatch) -> Step:
    """Make a step on the batch in fp32, as a run does it."""
    with cases.opened(cfg) as policy:
        return _step(policy, batch, cases._objective(policy), leave_out_pass=True)


def random_batch(seed: int, policy: Policy) -> TrainBatch:
    """Return a step of 1 to 4 groups of 1 to 16 samples of 1 to 200 tokens, few of them large.

    Every fifth batch has no advantage, and two of three have a sample without response tokens.
    """
    draw = np.random.default_rng(seed)
    vocab = policy.description.hf.vocab_size
    rewards = draw.choice(["equal", "two", "many"], p=[0.15, 0.6, 0.25])

    def sample(prompt: list[int]) -> Sample:
        length = int(np.clip(draw.lognormal(2.5, 1.2), 0, 200 - len(prompt)))
        if draw.random() < 0.1:
            length = 0
        tokens = np.concatenate([prompt, draw.integers(1, vocab, length)])
        mask = np.arange(len(tokens)) >= len(prompt)
        if draw.random() < 0.3:  # text that the policy did not write, as of a tool
            mask &= draw.random(len(tokens)) < draw.random()
        reward = {"equal": 0.0, "two": float(draw.random() < 0.3), "many": float(draw.normal())}[rewards]
        return Sample(tokens, mask, np.zeros(len(tokens)), "", "stop", 0, reward)

    groups = []
    for number in range(draw.choice([1, 2, 3, 4], p=[0.5, 0.2, 0.2, 0.1])):
        prompt = draw.integers(1, vocab, int(np.clip(draw.lognormal(1.5, 1), 1, 100))).tolist()
        samples = [sample(prompt) for _ in range(int(16 ** draw.random() + 0.5))]
        groups.append(SampleGroup(Prompt(str(number), ""), samples))
    batch = whole_batch(groups)
    batch.advantages = group_advantages(index_of(groups))
    noise = torch.from_numpy(draw.normal(size=len(batch.tokens), scale=0.2)).float()
    batch.rollout_logprobs = torch.where(batch.response_mask, policy.logprobs(batch) + noise, 0.0)
    if policy.cfg.algorithm.unit == "turn":
        batch.turns = turn_numbers(batch.response_mask, batch.lengths)
    if policy.cfg.algorithm.moe_routing_replay == "rollout":
        shape = policy.description.routing
        scores = torch.from_numpy(draw.random((len(batch.tokens), shape.num_layers, shape.num_experts)))
        batch.routed_experts = scores.topk(shape.topk).indices.short()
    return batch


@contextmanager
def leaving_out(savings: frozenset[str], objective: Objective) -> Iterator[Objective]:
    """Compute all sequences and all logits unless they are in ``savings``; yield the changed objective."""
    if "sequences" not in savings:
        objective = replace(objective, loss=replace(objective.loss, needs_advantage=False))
    # no setting brings the logits back, so the plain path replaces the function
    function = schedule.vocab_parallel_logprobs if "logits" in savings else logprobs_from_logits
    with mock.patch.object(schedule, "vocab_parallel_logprobs", function):
        yield objective


def logprobs_from_logits(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab_size: int, temperature: float, **_: Any
) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(hidden @ weight[:vocab_size].T / temperature, -1)
    return logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def _step(policy: Policy, batch: TrainBatch, objective: Objective, leave_out_pass: bool) -> Step:
    """Do what ``train.Loop`` does with a batch, or compute all old log probabilities before the updates."""
    share = lean_share(policy, batch, objective)
    figures = policy.prepare(share)
    if not leave_out_pass:
        policy.set_old_logprobs(share)
    correct(share, policy.cfg.algorithm)
    if policy.reference:
        share.ref_logprobs = policy.reference_logprobs(share)
    objective.add_columns(share)
    losses, gradients = [], []
    policy.begin_step(0)
    if leave_out_pass:
        minibatches = policy.minibatches(share)
    else:
        minibatches = [share.minibatch(number) for number in range(len(share.plan))]
    for minibatch in minibatches:
        loss = policy.train_step(minibatch, objective)["loss"]
        losses.append(float(loss.total / max(1, loss.count)))
        gradients.append(_gradients(policy))
    old = torch.cat(
        [
            torch.zeros(len(minibatch.tokens)) if minibatch.old_logprobs is None else minibatch.old_logprobs
            for minibatch in minibatches
        ]
    )
    old = whole(batch, share, old)
    computed = figures["train/computed_tokens"]
    return Step(losses, gradients, old, _exported(policy), computed.total / computed.count)


def _exported(policy: Policy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.export_hf()}


def _gradients(policy: Policy) -> dict[str, Tensor]:
    """Return the gradients by Hugging Face name: the export is linear."""
    parameters = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return _exported(policy)
    finally:
        for parameter, data in zip(parameters, weights, strict=True):
            parameter.data = data


def differences(found: Step, expected: Step) -> Iterator[str]:
    """Yield a line for everything that is further from ``expected`` than ``TOLERANCE``, or nan."""
    for update, (loss, wanted) in enumerate(zip(found.losses, expected.losses, strict=True)):
        if not abs(loss - wanted) <= TOLERANCE * max(1, abs(wanted)):
            yield f"loss {loss} of update {update}, not {wanted}"
    for update, (gradients, wanted) in enumerate(zip(found.gradients, expected.gradients, strict=True)):
        if not (off := distance(gradients, wanted)) <= TOLERANCE:
            yield f"gradient of update {update} off by {off:.1e}"
    if not (off := distance(found.weights, expected.weights)) <= TOLERANCE:
        yield f"weights off by {off:.1e}"
    needed = found.old_logprobs != 0
    off = (found.old_logprobs - expected.old_logprobs)[needed].abs().max() if needed.any() else 0.0
    if not off <= TOLERANCE:
        yield f"old log probabilities off by {off:.1e}"


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the distance of all tensors of ``expected`` together, relative to their norm, or to 1e-3."""
    off = sum((found[name] - tensor).double().square().sum() for name, tensor in expected.items())
    norm = sum(tensor.double().square().sum() for tensor in expected.values())
    return float(torch.as_tensor(off).sqrt() / torch.as_tensor(norm).sqrt().clamp(min=1e-3))


@contextmanager
def _float64() -> Iterator[None]:
    """Build policies with weights, gradients and moments in float64 for ``model.dtype`` "fp32"."""
    ddp_config = build.DistributedDataParallelConfig

    def with_float64_gradients(**fields: Any) -> Any:
        return ddp_config(**fields | {"grad_reduce_in_fp32": False})

    with (  # a run has no float64, in which a flipped clip cannot hide behind rounding
        mock.patch.object(description, "DTYPES", {"fp32": torch.float64}),
        mock.patch.object(build, "DistributedDataParallelConfig", with_float64_gradients),
    ):
        yield


class _State:
    """The weights of a new policy; ``restore`` undoes all updates."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._weights = [
            (parameter, parameter.detach().clone())
            for chunk in policy.chunks
            for parameter in chunk.parameters()
        ]

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, weight in self._weights:
            parameter.copy_(weight)
        optimizer = self._policy.model.optimizer
        for one in getattr(optimizer, "chained_optimizers", [optimizer]):
            one.optimizer.state.clear()


class Reference:
    """The step in transformers and torch's AdamW."""

    def __init__(self, cfg: Config, objective: Objective, formula: str | Callable[..., Tensor]) -> None:
        self._temperature, self._minibatches = cfg.rollout.temperature, cfg.train.minibatches_per_step
        self._old = cfg.algorithm.old_logprobs
        self._optimizer = {"lr": cfg.optimizer.lr, "eps": cfg.optimizer.adam_eps, "weight_decay": 0.0}
        self._loss = {
            "loss": formula,
            "clip_low": objective.clip_low,
            "clip_high": objective.clip_high,
            "kl_coef": objective.kl_coef,
            "entropy_coef": objective.entropy_coef,
            "per_token": objective.loss.divisor == "tokens",
            "temperature": self._temperature,
            "unit": cfg.algorithm.unit,
        }
        self._model = reference.load_float64(Path(cfg.model.path))
        self._frozen = reference.load_float64(Path(cfg.model.reference_path or cfg.model.path))
        self._start = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}

    def step(self, batch: TrainBatch) -> Step:
        self._model.load_state_dict(self._start)
        parameters = dict(self._model.named_parameters())
        optimizer = torch.optim.AdamW(parameters.values(), **self._optimizer)
        old = self._logprobs(self._model, batch).float()
        batch = replace(batch, old_logprobs=batch.rollout_logprobs if self._old == "rollout" else old)
        batch.ref_logprobs = old
        if self._loss["kl_coef"]:
            batch.ref_logprobs = self._logprobs(self._frozen, batch).float()
        losses, gradients = [], []
        for minibatch in split(batch, self._minibatches):
            for parameter in parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            losses.append(0.0)
            if minibatch.response_mask.any():
                loss = reference.batch_loss(self._model, minibatch, minibatch.ref_logprobs, **self._loss)
                loss.backward()
                losses[-1] = loss.item()
            gradients.append(_unfused({name: parameter.grad for name, parameter in parameters.items()}))
            optimizer.step()
        weights = {name: parameter.detach() for name, parameter in parameters.items()}
        return Step(losses, gradients, old, _unfused(weights), 1.0)

    @torch.no_grad()
    def _logprobs(self, model: Any, batch: TrainBatch) -> Tensor:
        found = [
            reference.sequence_logprobs(model, batch.tokens[span], self._temperature)[0]
            for span in reference.spans(batch)
        ]
        return torch.cat(found) * batch.response_mask


def _unfused(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Return copies by the names in files, where every expert has matrices of its own."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        assert tensor is not None
        layer, _, matrix = name.partition("experts.")
        if matrix not in ("gate_up_proj", "down_proj"):
            found[name] = tensor.clone()
            continue
        for expert, of_expert in enumerate(tensor):
            parts = of_expert.chunk(2) if matrix == "gate_up_proj" else [of_expert]
            for part, values in zip(("gate", "up") if len(parts) == 2 else ("down",), parts, strict=True):
                found[f"{layer}experts.{expert}.{part}_proj.weight"] = values.clone()
    return found
