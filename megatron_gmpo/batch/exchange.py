"""Move the columns of a step's sequences to the ranks that train them.

This form sends every sample to every rank as an object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..distributed import Nodes, all_gather_objects
from .index import StepIndex
from .samples import Sample


@dataclass(frozen=True)
class Columns:
    """The flat columns of the L tokens of some sequences, in ascending order of their numbers.

    Attributes:
        tokens: (L,) int32.
        response_mask: (L,) bool.
        rollout_logprobs: (L,) float32.
        routed_experts: (L, layers, topk) uint8 or int16, or None without a record. The row of a sequence's
            last token is 0 and has no meaning.
    """

    tokens: np.ndarray
    response_mask: np.ndarray
    rollout_logprobs: np.ndarray
    routed_experts: np.ndarray | None


class Exchange:
    """Distribute the sequences of each step. Every rank makes one together.

    Args:
        nodes: the ranks by node.
        replica: number of the data-parallel replica that this rank belongs to.
        folder: folder of the files that a node's ranks map; "" means /dev/shm.
        timeout_s: limit for one collective.
    """

    def __init__(self, nodes: Nodes, replica: int, folder: str, timeout_s: float) -> None:
        self.replica = replica

    def distribute(self, mine: Mapping[int, Sample], index: StepIndex, replica_of: np.ndarray) -> Columns:
        """Return the columns of the sequences of this rank's replica. Collective.

        Args:
            mine: this rank's samples by the number of their sequence.
            index: all sequences.
            replica_of: (S,) int32 replica that trains each sequence; -1 means nobody.
        """
        everyone = {number: sample for part in all_gather_objects(mine) for number, sample in part.items()}
        chosen = np.flatnonzero(replica_of == self.replica)
        samples = [everyone[number] for number in chosen.tolist()]
        experts = None
        if len(chosen) and (nbytes := int(index.expert_bytes[chosen].max())):
            dtype = np.uint8 if nbytes == 1 else np.int16
            padded = [np.pad(s.routed_experts, ((0, 1), (0, 0), (0, 0))) for s in samples]  # pyright: ignore[reportArgumentType, reportCallIssue]
            experts = np.concatenate(padded).astype(dtype)
        return Columns(
            tokens=np.concatenate([np.empty(0, np.int32), *(s.tokens for s in samples)]),
            response_mask=np.concatenate([np.empty(0, np.bool_), *(s.response_mask for s in samples)]),
            rollout_logprobs=np.concatenate(
                [np.empty(0, np.float32), *(s.rollout_logprobs for s in samples)]
            ),
            routed_experts=experts,
        )
