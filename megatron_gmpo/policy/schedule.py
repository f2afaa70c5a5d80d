"""Run the microbatches of a batch through Megatron's pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from ..batch.columns import Microbatch, TrainBatch
from ..batch.packing import pack, plan_microbatches
from ..config import Config
from ..models.attention import packing_of
from ..models.description import ModelDescription
from .build import output_weight
from .fp8 import total_multiple
from .logprobs import vocab_parallel_logprobs
from .prefetch import prefetched
from .routers import RouterPass
from .routing import RoutingPass

MicrobatchLoss = Callable[[Tensor, Tensor, Microbatch, int], tuple[Tensor, dict[str, Any]]]
"""(logprobs (T,), entropy (T,), microbatch, its place in the plan) -> (scaled loss, anything to keep).

Both are 0 on slots without loss. Runs on the last pipeline stage."""


def response_logprobs(logprobs: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
    """Return index in the batch and log probability of the response tokens of a microbatch."""
    slots = microbatch.loss_slots
    return microbatch.flat_index[slots], logprobs.detach()[slots]


class Schedule:
    """Run batches through the model chunks of this rank. Every method is collective.

    Args:
        cfg: the run's config.
        description: the model.
        groups: the process groups.
        device: device of the model; batches are on the host.
    """

    def __init__(
        self, cfg: Config, description: ModelDescription, groups: ProcessGroupCollection, device: torch.device
    ) -> None:
        self.cfg, self.description, self.groups, self.device = cfg, description, groups, device

    def plan(self, batch: TrainBatch, first: int = 0) -> list[list[int]]:
        """Return the microbatches of this data-parallel rank, each as numbers of sequences.

        Args:
            first: leave out the sequences before this number.
        """
        computed = torch.ones(len(batch), dtype=torch.bool)
        if batch.has_gradient is not None:
            computed = batch.has_gradient.clone()
        computed[:first] = False
        numbers: list[int] = computed.nonzero()[:, 0].tolist()
        plan = plan_microbatches(
            batch.lengths[computed].tolist(),
            max_tokens=self.cfg.train.max_tokens_per_microbatch,
            data_parallel_size=self.groups.dp.size(),
            sequence_multiple=self.cfg.parallel.sequence_multiple,
            count_multiple=self.cfg.parallel.microbatch_multiple,
        )
        return [[numbers[i] for i in members] for members in plan[self.groups.dp.rank()]]

    def run(
        self,
        chunks: list[torch.nn.Module],
        batch: TrainBatch,
        plan: list[list[int]],
        loss: MicrobatchLoss,
        routing: RoutingPass | None = None,
        routers: RouterPass | None = None,
        forward_only: bool = False,
    ) -> list[dict[str, Any]]:
        """Run the planned microbatches forward and, unless ``forward_only``, backward.

        Returns:
            On the last pipeline stage, the second result of ``loss`` for each microbatch; [] on other stages.
        """
        schedule = get_forward_backward_func()
        iterators = [self._microbatches(batch, plan, chunk, routing) for chunk in chunks]
        kept = schedule(
            forward_step_func=partial(self._forward_step, loss, routing, routers),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=len(plan),
            # nominal: with variable_seq_lengths the stages send the actual shapes
            seq_length=self.cfg.train.max_tokens_per_microbatch,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        if routing:
            routing.end()
        return kept

    @torch.no_grad()
    def logprobs(
        self,
        chunks: list[torch.nn.Module],
        batch: TrainBatch,
        routing: RoutingPass | None = None,
        routers: RouterPass | None = None,
        first: int = 0,
    ) -> Tensor:
        """Return (L,) fp32 on every rank's host: log probability of every token of ``trained_mask``.

        Other tokens have 0.

        Args:
            first: leave out the sequences before this number.
        """
        found: list[tuple[Tensor, Tensor]] = []

        def keep(
            logprobs: Tensor, _: Tensor, microbatch: Microbatch, place: int
        ) -> tuple[Tensor, dict[str, Any]]:
            found.append(response_logprobs(logprobs, microbatch))
            return logprobs.new_zeros(()), {}

        for chunk in chunks:
            chunk.eval()
        self.run(chunks, batch, self.plan(batch, first), keep, routing, routers, forward_only=True)
        return self.gather(found, len(batch.tokens)).cpu()

    def gather(self, found: list[tuple[Tensor, Tensor]], length: int) -> Tensor:
        """Combine the ``response_logprobs`` of all ranks' microbatches. Collective.

        Returns:
            (L,) fp32 on every rank's device, 0 for tokens that no rank has.
        """
        flat = torch.zeros(length, device=self.device)
        for index, logprobs in found:
            flat[index] = logprobs.float()
        pp = self.groups.pp
        if pp.rank() == pp.size() - 1:
            dist.all_reduce(flat, group=self.groups.dp_cp)
        if pp.size() > 1:
            dist.broadcast(flat, src=dist.get_global_rank(pp, pp.size() - 1), group=pp)
        return flat

    def _microbatches(
        self, batch: TrainBatch, plan: list[list[int]], chunk: torch.nn.Module, routing: RoutingPass | None
    ) -> Iterator[tuple[int, Microbatch]]:
        cp = self.groups.cp
        if routing is None:
            batch = batch.without_layers()

        def packed(place: int) -> Microbatch:
            microbatch = pack(
                batch,
                plan[place],
                cp_size=cp.size(),
                cp_rank=cp.rank(),
                sequence_multiple=self.cfg.parallel.sequence_multiple,
                total_multiple=total_multiple(self.cfg),
            )
            return routing.routing.cut(microbatch, chunk) if routing else microbatch

        return enumerate(prefetched(packed, len(plan), self.device))

    def _forward_step(
        self,
        loss: MicrobatchLoss,
        routing: RoutingPass | None,
        routers: RouterPass | None,
        microbatches: Iterator[tuple[int, Microbatch]],
        model: torch.nn.Module,
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Any]]]]:
        place, microbatch = next(microbatches)
        with (
            routing.of(model, microbatch) if routing else nullcontext(),
            routers.of(model, microbatch) if routers else nullcontext(),
        ):
            output = model(
                microbatch.tokens[None],
                microbatch.position_ids[None],
                None,  # attention is causal within each sequence, which packed_seq_params delimit
                packed_seq_params=packing_of(microbatch.bounds, microbatch.cu_seqlens),
            )

        def loss_of_hidden(hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
            slots = microbatch.loss_slots
            found = vocab_parallel_logprobs(
                hidden[0, slots],
                output_weight(model),
                microbatch.labels[slots],
                vocab_size=self.description.hf.vocab_size,
                tp_group=self.groups.tp,
                temperature=self.cfg.rollout.temperature,
                chunk_tokens=self.cfg.train.logprob_chunk_tokens,
                fp32_head=self.cfg.uses_fp32_head,
            )
            logprobs, entropy = (
                values.new_zeros(len(microbatch.tokens)).index_copy(0, slots, values) for values in found
            )
            return loss(logprobs, entropy, microbatch, place)

        return output, loss_of_hidden
