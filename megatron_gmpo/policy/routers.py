"""Observe the routers during a pass: load, entropy and the shift of their scores (RSPO).

A ``RouterPass`` wraps each microbatch's forward pass through each model chunk. In every layout exactly one
rank sees a (token, MoE layer) pair, so sums over all ranks count it once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from ..batch.columns import Microbatch, RoutingShape
from ..losses.rspo import log_router_shift
from ..metrics.across_ranks import fetch
from ..metrics.figures import Metric


def routers_of(chunk: torch.nn.Module) -> dict[int, TopKRouter]:
    """Return the routers of a chunk by the layer's number in the model, from 0, ascending."""
    routers = [module for module in chunk.modules() if isinstance(module, TopKRouter)]
    return {router.layer_number - 1: router for router in routers}  # pyright: ignore[reportOptionalOperand]


def own_slots(slots: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """Return the part of (T, ...) slots that this rank's routers see.

    With sequence parallelism each rank has one contiguous range of the slots.
    """
    return slots.chunk(tp_group.size())[tp_group.rank()]


def freeze_routers(chunks: list[torch.nn.Module]) -> None:
    """Exclude the routers' weights from training. Must run before the gradient buffers are built."""
    for router in (router for chunk in chunks for router in routers_of(chunk).values()):
        router.requires_grad_(False)


def routes_together(config: TransformerConfig) -> bool:
    """Return whether the experts of a token depend on the other tokens of its microbatch.

    Experts with a capacity drop the tokens beyond it (moe_utils.py), and Sinkhorn's algorithm balances all
    tokens (router.py).
    """
    return (
        config.moe_expert_capacity_factor is not None
        # Megatron-Core 0.16 has no moe_expert_rank_capacity_factor
        or getattr(config, "moe_expert_rank_capacity_factor", None) is not None
        or config.moe_router_load_balancing_type == "sinkhorn"
    )


class RouterPass(ABC):
    """One pass of a replica's batch of L tokens that observes every router. Recomputation is not observed.

    Args:
        shape: dimensions of the model's routing.
        groups: the process groups of the model.
        length: L.
        device: device of the model.
    """

    def __init__(
        self, shape: RoutingShape, groups: ProcessGroupCollection, length: int, device: torch.device
    ) -> None:
        self.shape, self.length, self.device, self.groups = shape, length, device, groups
        self.number = -1

    @contextmanager
    def of(self, chunk: torch.nn.Module, microbatch: Microbatch, number: int) -> Iterator[None]:
        """Wrap the forward pass of a microbatch, of this number in the step, through one chunk."""
        self.number = number
        index = own_slots(microbatch.input_index, self.groups.tp)
        with ExitStack() as hooks:
            for place, (layer, router) in enumerate(routers_of(chunk).items()):

                def note(
                    router: TopKRouter,
                    args: tuple[Tensor],
                    output: tuple[Tensor, Tensor],
                    place: int = place,
                    layer: int = layer,
                ) -> None:
                    with torch.no_grad():
                        self._note(microbatch, index, place, layer, _log_scores(router, args[0]), output[1])

                hooks.callback(router.register_forward_hook(note).remove)
            yield

    @abstractmethod
    def _note(
        self,
        microbatch: Microbatch,
        index: Tensor,
        place: int,
        layer: int,
        log_scores: Tensor,
        routed: Tensor,
    ) -> None:
        """Record one router's forward pass.

        Args:
            microbatch: the microbatch.
            index: (T',) index of the input tokens in the batch, -1 on padding.
            place: number of the layer among the chunk's MoE layers.
            layer: number of the layer in the model.
            log_scores: (T', experts) fp32.
            routed: (T', experts) bool, the experts that each token goes to.
        """


def _log_scores(router: TopKRouter, hidden: Tensor) -> Tensor:
    """Return (T', experts) log of the distribution over all experts, before top-k and without an expert bias.

    Sigmoid scores are normalized. The gating is computed a second time, because Megatron's router does not
    return it; its matrix is small compared with the experts'.
    """
    logits = router.gating(hidden).flatten(0, -2).float()
    scores = torch.nn.functional.logsigmoid(logits) if router.score_function == "sigmoid" else logits
    return scores.log_softmax(-1)


class OldRouters(RouterPass):
    """Observe the pass of the old log probabilities: load, entropy and, if ``keep_scores``, scores.

    ``per_layer`` adds the figures of each layer to the metrics.

    Attributes:
        sums: (layers, experts + 2) float64, this rank's share of what ``metrics`` needs.
    """

    def __init__(self, *arguments, keep_scores: bool, per_layer: bool) -> None:
        super().__init__(*arguments)
        self._keep_scores, self._per_layer = keep_scores, per_layer
        # (layer, microbatch) -> (T', topk)
        self._scores: dict[tuple[int, int], Tensor] = {}
        # by layer: number of tokens of each expert, the sum of the tokens' entropies, number of tokens
        self.sums = torch.zeros(
            self.shape.num_layers, self.shape.num_experts + 2, dtype=torch.float64, device=self.device
        )

    def _note(
        self,
        microbatch: Microbatch,
        index: Tensor,
        place: int,
        layer: int,
        log_scores: Tensor,
        routed: Tensor,
    ) -> None:
        real = (index >= 0)[:, None]
        self.sums[layer, :-2] += (routed & real).sum(0)
        self.sums[layer, -2] -= (log_scores.exp() * log_scores * real).sum(dtype=torch.float64)
        self.sums[layer, -1] += real.sum()
        if self._keep_scores:
            # in ascending order; nonzero() would wait for the device
            numbers = torch.arange(self.shape.num_experts, device=routed.device).expand(routed.shape)
            experts = numbers.where(routed, self.shape.num_experts).sort(1).values[:, : self.shape.topk]
            self._scores[layer, self.number] = log_scores.gather(1, experts)

    def metrics(self, sums: Tensor) -> dict[str, Metric]:
        """Return figures over the observed tokens, without padding, from all ranks' ``sums``, on the host.

        - ``moe/load_max``: tokens of the expert with the most tokens divided by the mean over experts, in the
          layer where this is largest;
        - ``moe/load_max_layer``: number of that layer, from 0;
        - ``moe/load_cv``: standard deviation of the experts' token counts divided by their mean, averaged
          over layers;
        - ``moe/dead_experts``: number of experts without a token, summed over layers;
        - ``moe/router_entropy``: entropy in nats of the distribution over all experts, averaged over tokens
          and layers;
        - if ``per_layer``, ``moe/layer_07/load_max`` and so on: the figures of each layer, except
          ``load_max_layer``.
        """
        sums = sums[list(self.shape.moe_layers)]
        if not sums[:, -1].all():
            return {}
        load, entropy, tokens = sums[:, :-2], sums[:, -2], sums[:, -1]
        mean = load.mean(1)
        by_layer = {
            "load_max": load.amax(1) / mean,
            "load_cv": load.std(1, correction=0) / mean,
            "dead_experts": (load == 0).sum(1),
            "router_entropy": entropy / tokens,
        }
        worst = int(by_layer["load_max"].argmax())
        metrics = {
            "moe/load_max": Metric(float(by_layer["load_max"][worst]), op="max"),
            "moe/load_max_layer": Metric(self.shape.moe_layers[worst]),
            "moe/load_cv": Metric(float(by_layer["load_cv"].mean())),
            "moe/dead_experts": Metric(int(by_layer["dead_experts"].sum())),
            "moe/router_entropy": Metric(float(by_layer["router_entropy"].mean())),
        }
        if self._per_layer:
            for name, values in by_layer.items():
                metrics |= {
                    f"moe/layer_{n:02d}/{name}": Metric(float(v))
                    for n, v in zip(self.shape.moe_layers, values, strict=True)
                }
        return metrics

    def scores(self) -> dict[tuple[int, int], Tensor]:
        """Return ``TrainBatch.own_scores``: the scores that this rank computed, on the host."""
        return fetch(self._scores)


class RouterShift(RouterPass):
    """A pass under the current weights over a batch with known experts and ``own_scores``."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        # summed over layers; index -1, which is padding, selects the extra last row
        self._log_shift = torch.zeros(self.length + 1, device=self.device)

    def _note(
        self,
        microbatch: Microbatch,
        index: Tensor,
        place: int,
        layer: int,
        log_scores: Tensor,
        routed: Tensor,
    ) -> None:
        assert microbatch.routed_experts is not None
        assert microbatch.router_scores is not None
        experts = microbatch.routed_experts[:, place].long().clamp(min=0).sort().values
        self._log_shift[index] += log_router_shift(
            log_scores.gather(1, experts), microbatch.router_scores[:, place]
        )

    def gather(self) -> Tensor:
        """Return ``TrainBatch.router_shift`` on every rank of the replica. Collective."""
        for group in (self.groups.tp, self.groups.cp, self.groups.pp):
            dist.all_reduce(self._log_shift, group=group)
        return torch.exp(self._log_shift[:-1] / len(self.shape.moe_layers)).cpu()
