"""Reduce metrics over all ranks in tensor collectives, and fetch them with one wait for the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import all_gather_objects, world_size
from .figures import Metric, Op, rescaled
from .histogram import BINS

_SUMMANDS: dict[Op, int] = {"mean": 2, "histogram": BINS + 1, "max": 1, "min": 1, "weights": 3}
"""Number of values of a metric that are added: its total, one number, two or BINS, and its count.

For an extreme, the value states whether it is NaN, because an all-reduce of maxima may drop NaN."""
_SIGNS: dict[Op, float] = {"max": 1.0, "min": -1.0, "weights": 1.0}
"""Metrics of which the maximum is taken: extremes, negated for a minimum, and the scales of weights."""
Key = TypeVar("Key")


def fetch(tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Copy tensors to the host with one wait for the device. A tensor on the host is returned as it is."""
    # from a GPU, this copies into pinned memory without waiting; not run on a GPU yet
    host = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.current_stream().synchronize()
    return host


class RankReduction:
    """Reduce metrics over all ranks: one all-reduce takes the maximum of the extremes, one adds.

    The vectors of these all-reduces have the same layout on all ranks, although only ranks of the last
    pipeline stage have metrics of the loss. The ranks gather their metrics' names as objects the first time,
    and again only if a rank has a name that is new.

    Args:
        device: device of the collectives.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ops: dict[str, Op] = {}  # of every known name, in the same order on all ranks

    def __call__(
        self,
        mine: Mapping[str, Metric],
        summed: Mapping[str, Tensor] | None = None,
        fetched: Mapping[str, Tensor] | None = None,
    ) -> tuple[dict[str, Metric], dict[str, Tensor]]:
        """Reduce this rank's metrics, and fetch other tensors with them. Collective.

        Args:
            mine: metrics of this rank, with tensors of any device. Totals, counts and histograms are added,
                extremes take the extreme. A name may be absent on some ranks.
            summed: other tensors that are added over all ranks, in float64.
            fetched: other tensors, of which every rank gets its own.

        Returns:
            The metrics that some rank has, with floats or host tensors, and the host copies of the other
            tensors.
        """
        summed, fetched = summed or {}, fetched or {}
        highest = self._highest(mine)
        if world_size() > 1:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        flat = [tensor.flatten().double() for tensor in summed.values()]
        sums = torch.cat([self._sums(mine, highest), *flat])
        if world_size() > 1:
            dist.all_reduce(sums)
        host = fetch({"sums": sums, "highest": highest, **fetched})
        sizes = [tensor.numel() for tensor in summed.values()]
        own, *rest = host.pop("sums").split([len(sums) - sum(sizes), *sizes])
        highest = host.pop("highest")
        others = host | {
            name: part.view(tensor.shape) for (name, tensor), part in zip(summed.items(), rest, strict=True)
        }
        if own[0]:  # a rank had a name that is not among the known ones
            self._agree(mine)
            metrics, _ = self(mine)
        else:
            metrics = self._metrics(own[1:], highest)
        return metrics, others

    def _agree(self, mine: Mapping[str, Metric]) -> None:
        """Extend the known names by those of all ranks. Collective."""
        for ops in all_gather_objects({name: metric.op for name, metric in mine.items()}):
            for name, op in ops.items():
                assert self._ops.setdefault(name, op) == op, f"{name} is both {self._ops[name]} and {op}"

    def _sums(self, mine: Mapping[str, Metric], highest: Tensor) -> Tensor:
        """Return the number of new names, and for each known name whether it is present and its summands."""
        pieces = [self._vector(sum(self._ops.get(name) != metric.op for name, metric in mine.items()))]
        extremes = iter(highest)
        for name, op in self._ops.items():
            metric = mine.get(name)
            extreme = next(extremes) if op in _SIGNS else None
            pieces.append(self._vector(metric is not None))
            if metric is None:
                pieces.append(self._vector(0, _SUMMANDS[op]))
            elif op == "weights":
                assert extreme is not None
                pieces += [rescaled(self._vector(metric.total), extreme), self._vector(metric.count)]
            elif op in _SIGNS:
                pieces.append(self._vector(metric.total).isnan().double())
            else:
                pieces += [self._vector(metric.total), self._vector(metric.count)]
        return torch.cat(pieces)

    def _highest(self, mine: Mapping[str, Metric]) -> Tensor:
        """Return the known extremes, -inf where absent or NaN. Minima are negated."""
        pieces = [self._vector(0, 0)]
        for name, op in self._ops.items():
            if sign := _SIGNS.get(op):
                metric = mine.get(name)
                value = self._vector(-torch.inf) if metric is None else sign * self._vector(metric.total)[:1]
                pieces.append(value.masked_fill(value.isnan(), -torch.inf))
        return torch.cat(pieces)

    def _metrics(self, sums: Tensor, highest: Tensor) -> dict[str, Metric]:
        """Read the vectors of ``_sums``, without its first number, and of ``_highest``."""
        metrics: dict[str, Metric] = {}
        extremes = iter(highest.tolist())
        for name, op in self._ops.items():
            present, values, sums = sums.split([1, _SUMMANDS[op], len(sums) - 1 - _SUMMANDS[op]])
            extreme = _SIGNS[op] * next(extremes) if op in _SIGNS else 0.0
            if not present:
                continue
            if op in ("max", "min"):
                metrics[name] = Metric(math.nan if values[0] else extreme, op=op)
            elif op == "mean":
                metrics[name] = Metric(float(values[0]), float(values[1]))
            else:
                scale = values.new_tensor([extreme] if op == "weights" else [])
                metrics[name] = Metric(torch.cat([scale, values[:-1]]), float(values[-1]), op)
        return metrics

    def _vector(self, value: Tensor | float, size: int = 1) -> Tensor:
        """Return ``value`` as a float64 vector on the device, without waiting for it."""
        if isinstance(value, Tensor):
            return value.detach().to(self._device, torch.float64).flatten()
        return torch.full((size,), value, dtype=torch.float64, device=self._device)
