"""Routing replay: a policy's routers repeat the experts recorded in an earlier pass or by the rollout engine.

A router has one slot for the experts to replay, while several microbatches may be in flight in a pipeline. So
the experts of a microbatch are set in the routers of a model chunk right before its forward pass through that
chunk. Recomputation in the backward pass takes them from a queue, because a chunk's backward passes run in
the order of its forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor

from ..batch.columns import Microbatch, RoutingShape, TrainBatch
from ..batch.packing import take
from ..metrics.across_ranks import fetch
from ..metrics.figures import Metric
from .routers import OldRouters, own_slots, routers_of


class _Hook(RouterReplay):
    """Megatron's replay hook of a router, which during replay also records the router's own choice.

    During replay the router takes its scores at the given experts, for every score function, so gradients
    reach its weights.
    """

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] = torch.topk,
    ) -> tuple[Tensor, Tensor]:
        if self.router_replay_action is RouterReplayAction.REPLAY_FORWARD:
            _, own = default_compute_topk(scores.detach(), topk, num_groups=num_groups, group_topk=group_topk)
            self.record_indices(own)
            if torch.is_grad_enabled():
                # a pass with gradients is not recomputed, so it needs no queue entry
                self.replay_backward_list.pop()
        return super().get_replay_topk(scores, topk, num_groups, group_topk, default_compute_topk)


class Routing:
    """The replay hooks of this rank's model chunks. Other models in the process are not affected.

    Args:
        chunks: model chunks built with ``moe_enable_routing_replay``.
        shape: dimensions of the model's routing.
        tp_group: tensor-parallel group, see ``own_slots``.

    Attributes:
        hooks: by chunk, then by the layer's number in the model, from 0.
    """

    def __init__(
        self, chunks: list[torch.nn.Module], shape: RoutingShape, tp_group: dist.ProcessGroup
    ) -> None:
        self.shape, self._tp_group = shape, tp_group
        self.hooks: dict[torch.nn.Module, dict[int, RouterReplay]] = {}
        for chunk in chunks:
            self.hooks[chunk] = {}
            for layer, router in routers_of(chunk).items():
                router.router_replay = self.hooks[chunk][layer] = _Hook()

    def own(self, slots: Tensor) -> Tensor:
        """Return the slots that this rank's routers see, see ``own_slots``."""
        return own_slots(slots, self._tp_group)

    def known(self, batch: TrainBatch, microbatch: Microbatch) -> Tensor:
        """Return (T',) bool: the slots of this rank's routers whose experts the batch knows.

        The rollout engine recorded none for the last token of a sequence.
        """
        return self.own(microbatch.input_index if batch.own_experts else microbatch.flat_index) >= 0

    def cut(
        self, batch: TrainBatch, microbatch: Microbatch, chunk: torch.nn.Module, number: int
    ) -> Microbatch:
        """Add the experts and scores of the slots and MoE layers that this rank computes in ``chunk``.

        Args:
            number: number of the microbatch in the step.
        """
        layers = list(self.hooks[chunk])
        if not layers or not (batch.own_experts or batch.routed_experts is not None):
            return microbatch
        if batch.own_experts:
            experts = torch.stack([batch.own_experts[layer, number] for layer in layers], 1)
        else:
            assert batch.routed_experts is not None
            # the slice leaves the layers of other stages unread
            span = batch.routed_experts[:, layers[0] : layers[-1] + 1]
            experts = take(span, self.own(microbatch.input_index))
            experts = experts[:, [layer - layers[0] for layer in layers]]
        unknown = ~self.known(batch, microbatch)
        scores = [batch.own_scores[layer, number] for layer in layers] if batch.own_scores else None
        return replace(
            microbatch,
            routed_experts=experts.short().masked_fill(unknown[:, None, None], -1),
            router_scores=torch.stack(scores, 1) if scores else None,
        )


@dataclass
class RoutingPass:
    """One pass of a batch's microbatches through the model, during which the routers record or replay.

    Attributes:
        routing: the replay hooks.
        batch: the L tokens. The routers' own choices are compared with the experts that it knows, if any.
        pp_group: pipeline-parallel group, whose ranks see the same slots in other layers.
        replay: make the routers repeat the experts that the batch knows.
        record: keep the routers' choices for ``recorded``.
    """

    routing: Routing
    batch: TrainBatch
    pp_group: dist.ProcessGroup
    replay: bool
    record: bool = False
    # (layer, microbatch) -> (T', topk)
    _recorded: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    # microbatch -> (T',) bool, and (T',) number of this rank's layers whose choice differs
    _known: dict[int, Tensor] = field(default_factory=dict)
    _differs: dict[int, Tensor] = field(default_factory=dict)
    # microbatch -> (T',) index of the input tokens of these slots, -1 on padding
    _inputs: dict[int, Tensor] = field(default_factory=dict)

    @property
    def compares(self) -> bool:
        """Return whether the batch knows experts to compare with."""
        return bool(self.batch.own_experts) or self.batch.routed_experts is not None

    @contextmanager
    def of(self, chunk: torch.nn.Module, microbatch: Microbatch, number: int) -> Iterator[None]:
        """Wrap the forward pass of a microbatch of this number through one chunk, after ``Routing.cut``."""
        hooks = self.routing.hooks[chunk]
        experts = microbatch.routed_experts  # (T', layers of the chunk, topk)
        if self.replay and hooks:
            assert experts is not None
            targets = torch.where(experts < 0, self._spread(microbatch)[:, None], experts)
            for place, hook in enumerate(hooks.values()):
                hook.set_target_indices(targets[:, place])
        for hook in hooks.values():
            hook.set_router_replay_action(
                RouterReplayAction.REPLAY_FORWARD if self.replay else RouterReplayAction.RECORD
            )
        yield
        if self.compares and number not in self._known:
            self._known[number] = self.routing.known(self.batch, microbatch)
            self._inputs[number] = self.routing.own(microbatch.input_index)
            self._differs[number] = torch.zeros_like(self._known[number], dtype=torch.int32)
        for place, (layer, hook) in enumerate(hooks.items()):
            chosen = hook.get_recorded_indices()
            assert chosen is not None
            if experts is not None:
                differs = (chosen.sort().values != experts[:, place].sort().values).any(1)
                self._differs[number] += differs & self._known[number]
            if self.record:
                self._recorded[layer, number] = chosen.to(self.routing.shape.dtype)
            hook.recorded_topk_idx = hook.target_topk_idx = None
            # a later call of the router is a recomputation
            hook.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD if self.replay else None)  # pyright: ignore[reportArgumentType]
            if not torch.is_grad_enabled():
                hook.clear_indices()

    def end(self) -> None:
        """Stop replay and recording in the routers. Call it after the last microbatch."""
        for hook in (hook for hooks in self.routing.hooks.values() for hook in hooks.values()):
            assert not hook.replay_backward_list, "a microbatch was not recomputed"
            hook.clear_router_replay_action()

    def recorded(self) -> dict[tuple[int, int], Tensor]:
        """Return ``TrainBatch.own_experts``: this rank's choices, on the host. They stay with the rank."""
        return fetch(self._recorded)

    def figures(self) -> Tensor:
        """Compare the routers' own choice, as a set, with the experts that the batch knows. Collective.

        Returns:
            (3,) float64 on the device, to add over all ranks: number of (token, MoE layer) pairs that differ,
            of tokens with at least one such layer, and of tokens with known experts.
        """
        numbers = sorted(self._known)
        known, differs = (torch.cat([by[n] for n in numbers]) for by in (self._known, self._differs))
        pairs = differs.sum()
        if self.pp_group.size() > 1:
            dist.all_reduce(differs, group=self.pp_group)
        counts = torch.stack([pairs, (differs > 0).sum(), known.sum()]).double()
        return counts if self.pp_group.rank() == 0 else counts * counts.new_tensor([1, 0, 0])

    def rerouted(self, groups: ProcessGroupCollection) -> Tensor:
        """Return (L,) int32 on the device of every rank of the replica. Collective.

        Row t is the number of MoE layers whose experts for token t - 1, which predicts token t, differ from
        those that the batch knows.
        """
        device = next(iter(self._differs.values())).device
        counts = torch.zeros(len(self.batch.tokens) + 1, dtype=torch.int32, device=device)
        for number, differs in self._differs.items():
            inputs = self._inputs[number]
            counts[inputs[inputs >= 0] + 1] = differs[inputs >= 0]
        dist.all_reduce(counts, group=groups.pp)
        # the ranks of these groups see other slots, or the same
        dist.all_reduce(counts, dist.ReduceOp.MAX, group=groups.tp)
        dist.all_reduce(counts, dist.ReduceOp.MAX, group=groups.cp)
        return counts[:-1]

    def metrics(self, name: str, figures: Tensor) -> dict[str, Metric]:
        """Return metrics from the host's copy of all ranks' sum of ``figures``.

        The metric ``name`` is the share of the pairs that differ, ``{name}_tokens`` the share of the tokens.
        Tokens without known experts do not count.
        """
        pairs, tokens, known = figures.tolist()
        layers = len(self.routing.shape.moe_layers)
        return {name: Metric(pairs, known * layers), f"{name}_tokens": Metric(tokens, known)}

    def _spread(self, microbatch: Microbatch) -> Tensor:
        """Return (T', topk) int64 experts for slots without known ones: padding and last tokens.

        These slots carry no loss. Consecutive slots get different experts, so that no expert is overloaded.
        The experts depend only on the position in the sequence, so every packing gives the same experts.
        """
        shape = self.routing.shape
        start = self.routing.own(microbatch.position_ids)[:, None] * shape.topk
        return (start + torch.arange(shape.topk, device=start.device)) % shape.num_experts


def pass_figures(routing: RoutingPass | None, routers: OldRouters | None) -> dict[str, Tensor]:
    """Return the figures of a pass on the device, to add over all ranks. Collective."""
    figures = {"routers": routers.sums} if routers else {}
    return figures | ({"routing": routing.figures()} if routing and routing.compares else {})


def pass_metrics(
    host: dict[str, Tensor], routing: RoutingPass | None, routers: OldRouters | None, differences: str
) -> dict[str, Metric]:
    """Return the metrics of a pass from the host copies of its ``pass_figures``.

    Args:
        differences: name of the metric of the routings that differ.
    """
    metrics = routers.metrics(host["routers"]) if routers else {}
    return metrics | (routing.metrics(differences, host["routing"]) if routing and routing.compares else {})
