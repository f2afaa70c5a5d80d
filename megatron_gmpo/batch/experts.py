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
    moe = list(routing.moe_layers)
    # (topk, slots), contiguous, because the checks below compare whole rows
    ranked = np.ascontiguousarray(found.reshape(-1, routing.topk).T)
    outside = (ranked.min(0) < 0) | (ranked.max(0) >= routing.num_experts)
    twice = np.zeros(ranked.shape[1], np.bool_)
    for one, other in combinations(ranked, 2):
        twice |= one == other
    if outside.reshape(-1, routing.num_layers)[:, moe].any():
        experts = found[:, moe]
        wrong = experts[(experts < 0) | (experts >= routing.num_experts)]
        raise InputError(
            f"sample {number}: routed expert {wrong[0]} of {routing.num_experts}: "
            "generate with the model of model.path"
        )
    if twice.reshape(-1, routing.num_layers)[:, moe].any():
        raise InputError(
            f"sample {number}: a token has the same routed expert twice: "
            "generate with the model of model.path"
        )
