"""Memory, work and traffic of one rank, as a dry run reports them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """The bytes that one rank sends in one kind of collective.

    Attributes:
        operation: ``all_gather``, ``reduce_scatter``, ``all_reduce``, ``all_to_all`` or ``broadcast``.
        group: name of the process group in Megatron's ProcessGroupCollection, e.g. ``tp``.
        ranks: ranks of that group.
        sent: bytes on the wire per rank, as a ring sends them: (n - 1) / n of the tensor, twice that in an
            all-reduce.
    """

    operation: str
    group: str
    ranks: tuple[int, ...]
    sent: int


@dataclass(frozen=True)
class Work:
    """The cost of one microbatch on one rank.

    Attributes:
        flops: FLOPs of matrix products and attention.
        traffic: collectives within the pass, without the sends of the pipeline.
    """

    flops: int
    traffic: tuple[Traffic, ...]


@dataclass(frozen=True)
class RankPlan:
    """Memory and work of the first rank of a pipeline stage. Memory is in bytes.

    Attributes:
        stage: pipeline stage.
        rank: global rank.
        parameters: elements on this rank.
        stage_parameters: elements of the whole stage, each counted once over all its ranks.
        stage_expert_parameters: elements of the stage's routed experts.
        weights: weights of the model.
        gradients: fp32 gradient buffers.
        optimizer: this rank's share of fp32 main weights and moments.
        reference: weights of the reference policy.
        activations: tensors that in-flight microbatches keep for their backward passes.
        temporaries: all other memory that is allocated at the peak of a microbatch's passes. With
            recomputation this is mostly the layer that is being recomputed.
        in_flight: number of microbatches whose activations are alive at the same time; with a virtual
            pipeline, number of passes through one chunk.
        boundary: bytes of a microbatch's activations between two chunks, and of their gradient; 0 for the
            last stage of a pipeline with one chunk per rank.
        forward: work of a forward pass with log probabilities.
        training: work of forward pass, backward pass and recomputation.
        gradient_sync: collectives of an optimizer step.
        tower: FLOPs of the vision tower in a forward pass. They are part of ``forward`` and, with those of a
            trained tower's backward pass, of ``training``.
    """

    stage: int
    rank: int
    parameters: int
    stage_parameters: int
    stage_expert_parameters: int
    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    temporaries: int
    in_flight: int
    boundary: int
    forward: Work
    training: Work
    gradient_sync: tuple[Traffic, ...]
    tower: int = 0

    @property
    def resident(self) -> int:
        """Return the bytes that stay allocated between steps."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def while_sampling(self) -> int:
        """Return the bytes that stay allocated while colocated servers generate, without the gradients."""
        return self.resident - self.gradients

    @property
    def total(self) -> int:
        """Return the bytes at the peak of a training step."""
        return self.resident + self.activations + self.temporaries


def total_work(parts: Iterable[Work]) -> Work:
    """Return the sum of several pieces of work."""
    parts = list(parts)
    sent: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    for traffic in (traffic for part in parts for traffic in part.traffic):
        sent[traffic.operation, traffic.group, traffic.ranks] += traffic.sent
    return Work(sum(part.flops for part in parts), tuple(Traffic(*key, count) for key, count in sent.items()))
