"""Routing replay: a policy's routers choose again what they, or those of the rollout engine, chose before.

A router has one slot for the experts to replay, and several microbatches may be on their way through a pipeline. So the experts of a
microbatch are put into the routers of a model chunk right before its forward pass there. A recomputation in the backward pass takes
them from a queue: a chunk's microbatches come back in the order in which they went.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor

from ..batch.columns import PER_LAYER_COLUMNS, Microbatch, RoutingShape, TrainBatch
from ..metrics.figures import Metric
from .routers import own_slots, routers_of, sum_pieces


class _Hook(RouterReplay):
    """Megatron's hook into a router, which while it replays also notes what the router itself would choose.

    When it replays, the router takes its scores at the given experts, whatever its score function, so that gradients reach its weights.
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
                self.replay_backward_list.pop()  # the first forward pass of what will be recomputed has no gradient
        return super().get_replay_topk(scores, topk, num_groups, group_topk, default_compute_topk)


class Routing:
    """The routers of this rank's model chunks. Other models in the process, such as the reference, route as they like.

    Args:
        chunks: of a model built with ``moe_enable_routing_replay``.
        shape: what its routing looks like.
        tp_group: see ``own_slots``.
    """

    def __init__(
        self, chunks: list[torch.nn.Module], shape: RoutingShape, tp_group: dist.ProcessGroup
    ) -> None:
        self.shape, self._tp_group = shape, tp_group
        self.hooks: dict[
            torch.nn.Module, dict[int, RouterReplay]
        ] = {}  # by chunk, by the layer's number in the model, from 0
        for chunk in chunks:
            self.hooks[chunk] = {}
            for layer, router in routers_of(chunk).items():
                router.router_replay = self.hooks[chunk][layer] = _Hook()

    def own(self, slots: Tensor) -> Tensor:
        return own_slots(slots, self._tp_group)

    def cut(self, microbatch: Microbatch, chunk: torch.nn.Module) -> Microbatch:
        """Reduce the per-layer columns to this rank's slots and the MoE layers of ``chunk``."""
        whole = {name: getattr(microbatch, name) for name in PER_LAYER_COLUMNS}
        layers = list(self.hooks[chunk])
        return replace(
            microbatch,
            **{name: self.own(tensor)[:, layers] for name, tensor in whole.items() if tensor is not None},
        )


@dataclass
class RoutingPass:
    """One pass of a batch's microbatches through the model, during which the routers record or replay.

    Attributes:
        routing: the routers.
        batch: L tokens; its ``routed_experts``, if any, are what is replayed, and what the routers' own choices are compared with.
        device: of the model.
        replay: replay them.
        record: keep what the routers choose for ``gather``.
    """

    routing: Routing
    batch: TrainBatch
    device: torch.device
    replay: bool
    record: bool = False
    _recorded: dict[int, list[tuple[Tensor, Tensor]]] = field(
        default_factory=lambda: defaultdict(list)
    )  # layer -> (index, experts)

    def __post_init__(self) -> None:
        assert self.batch.routed_experts is not None or not self.replay
        self._differs = torch.zeros(
            len(self.batch.tokens), dtype=torch.int32, device=self.device
        )  # layers where a token's choice differs

    @contextmanager
    def of(self, chunk: torch.nn.Module, microbatch: Microbatch) -> Iterator[None]:
        """Around the forward pass of one microbatch, already ``Routing.cut``, through one chunk."""
        hooks, experts = (
            self.routing.hooks[chunk],
            microbatch.routed_experts,
        )  # (T', layers of the chunk, topk)
        if self.replay:
            assert experts is not None
            targets = torch.where(experts < 0, self._spread(microbatch)[:, None], experts)
            for place, hook in enumerate(hooks.values()):
                hook.set_target_indices(targets[:, place])
        for hook in hooks.values():
            hook.set_router_replay_action(
                RouterReplayAction.REPLAY_FORWARD if self.replay else RouterReplayAction.RECORD
            )
        yield
        index = self.routing.own(microbatch.input_index)
        for place, (layer, hook) in enumerate(hooks.items()):
            chosen = hook.get_recorded_indices()
            assert chosen is not None
            if experts is not None:
                self._compare(index, chosen, experts[:, place])
            if self.record:
                self._recorded[layer].append((index, chosen.short()))
            hook.recorded_topk_idx = hook.target_topk_idx = None
            # whoever asks a router from here on recomputes
            hook.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD if self.replay else None)  # pyright: ignore[reportArgumentType]
            if not torch.is_grad_enabled():
                hook.clear_indices()

    def end(self) -> None:
        """After the last microbatch: the routers choose for themselves again."""
        for hook in (hook for hooks in self.routing.hooks.values() for hook in hooks.values()):
            assert not hook.replay_backward_list, "a microbatch was not recomputed"
            hook.clear_router_replay_action()

    def gather(self) -> Tensor:
        """What the routers chose for every input token, (L, layers, topk) int16 on the CPU of every rank, -1 in layers without experts.

        Collective: the ranks' shares are put together layer by layer, so that one layer at a time is whole on the device.
        """
        shape, length = self.routing.shape, len(self.batch.tokens)
        everything = torch.full((length, shape.num_layers, shape.topk), -1, dtype=torch.int16)
        for layer in shape.moe_layers:
            pieces = [(index, chosen + 1) for index, chosen in self._recorded[layer]]
            everything[:, layer] = sum_pieces(pieces, length, shape.topk, torch.int16, self.device) - 1
        assert (everything[:, list(shape.moe_layers)] >= 0).all(), "a token was not routed"
        return everything

    def metrics(self, name: str) -> dict[str, Metric]:
        """``name``: the share of routings, one a token and MoE layer, in which the routers' own choice, as a set, is not the batch's;
        ``name_tokens``: the share of tokens with such a layer. Both where the batch's is known. Collective, equal on all ranks.
        """
        if self.batch.routed_experts is None:
            return {}
        dist.all_reduce(self._differs)
        layers = self.routing.shape.moe_layers
        known = int((self.batch.routed_experts[:, layers[0], 0] >= 0).sum())
        return {
            name: Metric(int(self._differs.sum()), known * len(layers)),
            f"{name}_tokens": Metric(int((self._differs > 0).sum()), known),
        }

    def _compare(self, index: Tensor, chosen: Tensor, experts: Tensor) -> None:
        differs = (chosen.sort().values != experts.sort().values).any(1) & (experts[:, 0] >= 0)
        self._differs.index_add_(0, index.clamp(min=0), differs.int())  # padding adds 0

    def _spread(self, microbatch: Microbatch) -> Tensor:
        """(T', topk) int64 experts for slots where none are known: padding, and last tokens, which carry no loss.

        Every expert in turn, so that none is flooded; by the position in the sequence, so that they are the same in every packing.
        """
        shape = self.routing.shape
        start = self.routing.own(microbatch.position_ids)[:, None] * shape.topk
        return (start + torch.arange(shape.topk, device=start.device)) % shape.num_experts
