"""Make the TrainBatch of a replica from the samples of all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.training import Unit
from .columns import TrainBatch, turn_numbers
from .exchange import Exchange
from .images import ImageTokens, image_columns, image_rows
from .index import StepIndex, samples_of
from .plan import StepPlan
from .samples import SampleGroup


def make_train_batch(
    groups: dict[int, SampleGroup],
    index: StepIndex,
    advantages: Tensor,
    plan: StepPlan,
    exchange: Exchange,
    replica: int,
    unit: Unit = "episode",
    vision: ImageTokens | None = None,
) -> TrainBatch:
    """Move the columns of all ranks' samples and return the batch of this rank's replica. Collective.

    The tokens stay in the memory that the exchange maps.

    Args:
        groups: this rank's groups by their position in the step. They are removed, so that the memory of
            their samples is free as soon as these are written.
        index: the sequences of all ranks. A sequence without response tokens in it carries no loss.
        advantages: (S,), one per sequence of the step.
        plan: the plan of the step.
        replica: number of this rank's replica.
        unit: what the loss takes as a sequence, as for ``plan``.
        vision: the image tokens of a vision-language model; None leaves out the columns of images.

    Raises:
        InputError: see ``Exchange.distribute``. Raised on every rank.
    """
    samples = samples_of(groups, index)
    groups.clear()
    columns = exchange.distribute(samples, index, plan.replica_of)
    numbers = plan.numbers(replica)
    lengths = index.length[numbers]
    mask, logprobs = columns.response_mask, columns.rollout_logprobs
    kept = np.repeat(index.response_length[numbers] > 0, lengths)
    if mask[~kept].any():
        mask, logprobs = mask & kept, np.where(kept, logprobs, np.float32(0))
    response_mask, lengths = torch.from_numpy(mask), torch.from_numpy(lengths.astype(np.int64))
    images: dict[str, Any] = {}
    if vision:
        images = image_columns(
            torch.from_numpy(columns.tokens),
            torch.from_numpy(columns.response_mask),
            lengths,
            torch.from_numpy(index.images[numbers].astype(np.int64)),
            index.image_rows[np.repeat(plan.replica_of == replica, index.images)],
            vision,
        )
    return TrainBatch(
        tokens=torch.from_numpy(columns.tokens),
        lengths=lengths,
        response_mask=response_mask,
        turns=turn_numbers(response_mask, lengths) if unit == "turn" else None,
        advantages=advantages[torch.from_numpy(numbers)].float(),
        rollout_logprobs=torch.from_numpy(logprobs),
        routed_experts=None if columns.routed_experts is None else torch.from_numpy(columns.routed_experts),
        numbers=torch.from_numpy(numbers),
        plan=plan.minibatches(replica),
        **images,
    )


def whole_batch(groups: Iterable[SampleGroup], vision: ImageTokens | None = None) -> TrainBatch:
    """Return the batch of groups that every rank holds, with advantages of 0 and without a plan.

    Args:
        vision: the image tokens of a vision-language model; None leaves out the columns of images.
    """
    samples = [sample for group in groups for sample in group.samples]
    records = [sample.routed_experts for sample in samples]

    def joined(columns: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(columns))

    tokens = joined([sample.tokens for sample in samples])
    mask = joined([sample.response_mask for sample in samples])
    lengths = torch.tensor([len(sample.tokens) for sample in samples])
    images: dict[str, Any] = {}
    if vision:
        counts = torch.tensor([len(sample.images) for sample in samples])
        rows = image_rows([image for sample in samples for image in sample.images])
        images = image_columns(tokens, mask, lengths, counts, rows, vision)
    return TrainBatch(
        tokens=tokens,
        lengths=lengths,
        response_mask=mask,
        advantages=torch.zeros(len(samples)),
        rollout_logprobs=joined([sample.rollout_logprobs for sample in samples]),
        routed_experts=joined(
            [np.pad(record, ((0, 1), (0, 0), (0, 0))) for record in records if record is not None]
        )
        if all(record is not None for record in records)
        else None,
        **images,
    )
