"""Routing replay: a policy's routers repeat the experts recorded in an earlier pass or by the rollout engine.

A router has one slot for the experts to replay, while several microbatches may be in flight in a pipeline. So
the experts of a microbatch are set in the routers of a model chunk right before its forward pass through that
chunk. Recomputation in the backward pass takes them from a queue, because a chunk's backward passes run in
the order of its forward passes.
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
        routing: the replay hooks.
        batch: the L tokens. The routers' own choices are compared with its ``routed_experts`` if present.
        device: device of the model.
        replay: make the routers repeat the batch's ``routed_experts``.
        record: keep the routers' choices for ``gather``.
    """

    routing: Routing
    batch: TrainBatch
    device: torch.device
    replay: bool
    record: bool = False
    # layer -> (index, experts) of each microbatch
    _recorded: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        assert self.batch.routed_experts is not None or not self.replay
        # by token: number of layers whose choice differs
        self._differs = torch.zeros(len(self.batch.tokens), dtype=torch.int32, device=self.device)

    @contextmanager
    def of(self, chunk: torch.nn.Module, microbatch: Microbatch) -> Iterator[None]:
        """Wrap the forward pass of one microbatch through one chunk, after ``Routing.cut``."""
        hooks = self.routing.hooks[chunk]
        experts = microbatch.routed_experts  # (T', layers of the chunk, topk)
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
            # a later call of the router is a recomputation
            hook.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD if self.replay else None)  # pyright: ignore[reportArgumentType]
            if not torch.is_grad_enabled():
                hook.clear_indices()

    def end(self) -> None:
        """Stop replay and recording in the routers. Call it after the last microbatch."""
        for hook in (hook for hooks in self.routing.hooks.values() for hook in hooks.values()):
            assert not hook.replay_backward_list, "a microbatch was not recomputed"
            hook.clear_router_replay_action()

    def gather(self) -> Tensor:
        """Return the recorded choice for every input token, on the host of every rank. Collective.

        One all-reduce per layer combines the ranks' shares, so the device holds one whole layer at a time.

        Returns:
            (L, layers, topk) int16, -1 in layers without experts and for tokens that were not computed.
        """
        shape, length = self.routing.shape, len(self.batch.tokens)
        everything = torch.full((length, shape.num_layers, shape.topk), -1, dtype=torch.int16)
        for layer in shape.moe_layers:
            pieces = [(index, chosen + 1) for index, chosen in self._recorded[layer]]
            everything[:, layer] = sum_pieces(pieces, length, shape.topk, torch.int16, self.device) - 1
        routed = (everything[:, list(shape.moe_layers)] >= 0).all(-1).all(-1)
        assert routed[self.batch.computed].all(), "a token was not routed"
        return everything

    def differences(self) -> Tensor:
        """Compare the routers' own choice, as a set, with the batch's ``routed_experts``. Collective.

        Returns:
            (2,) int64 on every rank's device: number of (token, MoE layer) pairs that differ, and of tokens
            with at least one such layer.
        """
        if self.batch.routed_experts is not None:
            dist.all_reduce(self._differs)
        return torch.stack([self._differs.sum(), (self._differs > 0).sum()])

    def metrics(self, name: str, differences: Tensor) -> dict[str, Metric]:
        """Return metrics from the host's copy of ``differences``.

        The metric ``name`` is the share of the pairs that differ, ``{name}_tokens`` the share of the tokens.
        Tokens without known experts do not count.
        """
        if self.batch.routed_experts is None:
            return {}
        layers = self.routing.shape.moe_layers
        known = int(((self.batch.routed_experts[:, layers[0], 0] >= 0) & self.batch.computed).sum())
        pairs, tokens = differences.tolist()
        return {name: Metric(pairs, known * len(layers)), f"{name}_tokens": Metric(tokens, known)}

    def _compare(self, index: Tensor, chosen: Tensor, experts: Tensor) -> None:
        differs = (chosen.sort().values != experts.sort().values).any(1) & (experts[:, 0] >= 0)
        self._differs.index_add_(0, index.clamp(min=0), differs.int())  # padding adds 0

    def _spread(self, microbatch: Microbatch) -> Tensor:
        """Return (T', topk) int64 experts for slots without known ones: padding and last tokens.

        These slots carry no loss. Consecutive slots get different experts, so that no expert is overloaded.
        The experts depend only on the position in the sequence, so every packing gives the same experts.
        """
        shape = self.routing.shape
        start = self.routing.own(microbatch.position_ids)[:, None] * shape.topk
        return (start + torch.arange(shape.topk, device=start.device)) % shape.num_experts
