"""Check the routed experts that a rollout engine recorded."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from ..errors import InputError
from .columns import RoutingShape
from .samples import Sample


def check_experts(number: int, sample: Sample, routing: RoutingShape) -> None:
    """Check the record of sample ``number``. Layers without experts may hold anything.

    Raises:
        InputError: the sample has no record, a record of another shape, an expert that the model does not
            have, or a token with the same expert twice.
    """
    found, expected = sample.routed_experts, (len(sample.tokens) - 1, routing.num_layers, routing.topk)
    if found is None:
        raise InputError(
            f"sample {number} has no record of its routed experts: "
            "generate with rollout.routed_experts = true"
        )
    if found.shape != expected:
        raise InputError(
            f"sample {number}: routed experts of shape {found.shape}, not {expected} "
            "(tokens - 1, layers, topk): generate with the model of model.path"
        )
    experts = found[:, list(routing.moe_layers)]
    # (topk, slots), contiguous, because the checks below compare whole rows
    ranked = np.ascontiguousarray(experts.reshape(-1, routing.topk).T)
    if ranked.size and not 0 <= ranked.min() <= ranked.max() < routing.num_experts:
        outside = ranked[(ranked < 0) | (ranked >= routing.num_experts)]
        raise InputError(
            f"sample {number}: routed expert {outside[0]} of {routing.num_experts}: "
            "generate with the model of model.path"
        )
    if any((one == other).any() for one, other in combinations(ranked, 2)):
        raise InputError(
            f"sample {number}: a token has the same routed expert twice: "
            "generate with the model of model.path"
        )
