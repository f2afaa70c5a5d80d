"""Run the microbatches of a batch through Megatron's pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from ..batch.columns import Microbatch, TrainBatch
from ..batch.packing import pack, plan_microbatches
from ..batch.pixels import PixelReader
from ..batch.plan import StepPlan, plan_step
from ..config import Config
from ..models.attention import packing_of
from ..models.description import ModelDescription
from ..weights.parameters import unwrapped
from .build import output_weight
from .fp8 import total_multiple
from .logprobs import vocab_parallel_logprobs
from .prefetch import prefetched
from .routers import RouterPass
from .routing import RoutingPass

MicrobatchLoss = Callable[[Tensor, Tensor, Microbatch], tuple[Tensor, dict[str, Any]]]
"""(logprobs (T,), entropy (T,), microbatch) -> (scaled loss, anything to keep).

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
        pixels: reads the images of a vision-language model's batches.
    """

    def __init__(
        self,
        cfg: Config,
        description: ModelDescription,
        groups: ProcessGroupCollection,
        device: torch.device,
        pixels: PixelReader | None,
    ) -> None:
        self.cfg, self.description, self.groups, self.device = cfg, description, groups, device
        self._pixels = pixels

    def plan(
        self,
        lengths: np.ndarray,
        response_lengths: np.ndarray,
        units: np.ndarray,
        computed: np.ndarray,
        minibatches: int,
        patches: Callable[[Sequence[int]], int] | None = None,
    ) -> StepPlan:
        """Return the plan of a step for all replicas, see ``plan_step``. Needs no message.

        Args:
            patches: the patches of the distinct images of some sequences; None without images.
        """
        patch_cost = self._patch_cost() if patches else 0.0

        def assign(numbers: np.ndarray) -> list[list[list[int]]]:
            def image_cost(members: list[int]) -> float:
                return patch_cost * patches(numbers[members].tolist()) if patches else 0.0

            plan = plan_microbatches(
                lengths[numbers].tolist(),
                max_tokens=self.cfg.train.max_tokens_per_microbatch,
                data_parallel_size=self.groups.dp.size(),
                sequence_multiple=self.cfg.parallel.sequence_multiple,
                count_multiple=self.cfg.parallel.microbatch_multiple,
                image_cost=image_cost,
            )
            return [[numbers[members].tolist() for members in microbatches] for microbatches in plan]

        return plan_step(lengths, response_lengths, units, computed, minibatches, assign)

    def _patch_cost(self) -> float:
        """Return the tower's work on a patch on its stage, in units of ``packing.cost``.

        A frozen tower has 2 of a token's 4 passes: with the old log probabilities, and forward in training.
        Tensor and pipeline parallelism divide the language model and not the tower.
        """
        vision, language = self.description.vision, self.description.transformer
        assert vision
        tower = vision.numel
        moe = self.description.is_moe
        heads = (
            2
            * (language.num_attention_heads + (language.num_query_groups or 0))
            * (language.kv_channels or 0)
        )
        mlp = (
            language.moe_router_topk * (language.moe_ffn_hidden_size or 0)
            if moe
            else language.ffn_hidden_size
        )
        parameters = language.num_layers * language.hidden_size * (heads + 3 * (mlp or 0))
        passes = 0.5 if self.cfg.model.freeze_vision else 1.0
        return passes * tower / parameters * self.groups.tp.size() * self.groups.pp.size()

    def run(
        self,
        chunks: list[torch.nn.Module],
        batch: TrainBatch,
        loss: MicrobatchLoss,
        routing: RoutingPass | None = None,
        routers: RouterPass | None = None,
        forward_only: bool = False,
        first: int = 0,
    ) -> list[dict[str, Any]]:
        """Run the microbatches of the batch's plan forward and, unless ``forward_only``, backward.

        Args:
            first: leave out the optimizer steps before this number.

        Returns:
            On the last pipeline stage, the second result of ``loss`` for each microbatch; [] on other stages.
        """
        assert self._pixels or batch.image_counts is None, "the policy has no reader of the batch's images"
        schedule = get_forward_backward_func()
        steps = batch.plan[first:]
        plan = [members for step in steps for members in step.microbatches]
        places = [step.first_microbatch + i for step in steps for i in range(len(step.microbatches))]
        iterators = [self._microbatches(batch, plan, places, chunk, routing) for chunk in chunks]
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
        """Return (L,) fp32 on the host of every rank of the replica: log probability of every response token.

        Other tokens have 0.

        Args:
            first: leave out the optimizer steps before this number.
        """
        found: list[tuple[Tensor, Tensor]] = []

        def keep(logprobs: Tensor, _: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Any]]:
            found.append(response_logprobs(logprobs, microbatch))
            return logprobs.new_zeros(()), {}

        for chunk in chunks:
            chunk.eval()
        self.run(chunks, batch, keep, routing, routers, forward_only=True, first=first)
        return self.gather(found, len(batch.tokens)).cpu()

    def gather(self, found: list[tuple[Tensor, Tensor]], length: int) -> Tensor:
        """Combine the ``response_logprobs`` of the microbatches of a replica's ranks. Collective.

        Returns:
            (L,) fp32 on the device of every rank of the replica, 0 for tokens that no rank has.
        """
        flat = torch.zeros(length, device=self.device)
        for index, logprobs in found:
            flat[index] = logprobs.float()
        pp = self.groups.pp
        if pp.rank() == pp.size() - 1:
            dist.all_reduce(flat, group=self.groups.cp)
        if pp.size() > 1:
            dist.broadcast(flat, src=dist.get_global_rank(pp, pp.size() - 1), group=pp)
        return flat

    def _microbatches(
        self,
        batch: TrainBatch,
        plan: list[list[int]],
        places: list[int],
        chunk: torch.nn.Module,
        routing: RoutingPass | None,
    ) -> Iterator[tuple[int, Microbatch]]:
        cp = self.groups.cp
        encodes = hasattr(unwrapped(chunk), "visual")
        # with sequence parallelism, a rank has the hidden states of one part of the slots
        split = self.description.transformer.sequence_parallel
        part = (self.groups.tp.rank(), self.groups.tp.size()) if split else (0, 1)

        def packed(place: int) -> Microbatch:
            microbatch = pack(
                batch,
                plan[place],
                cp_size=cp.size(),
                cp_rank=cp.rank(),
                sequence_multiple=self.cfg.parallel.sequence_multiple,
                total_multiple=total_multiple(self.cfg),
                pixels=self._pixels,
                encodes=encodes,
            )
            if microbatch.images:
                microbatch.images = microbatch.images.cut(*part)
            return routing.routing.cut(batch, microbatch, chunk, places[place]) if routing else microbatch

        return zip(places, prefetched(packed, len(plan), self.device), strict=True)

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
            routing.of(model, microbatch, place) if routing else nullcontext(),
            routers.of(model, microbatch, place) if routers else nullcontext(),
        ):
            output = model(
                microbatch.tokens[None],
                _positions(microbatch),
                None,  # attention is causal within each sequence, which packed_seq_params delimit
                packed_seq_params=packing_of(microbatch.bounds, microbatch.cu_seqlens),
                **({"images": microbatch.images} if self.description.vision else {}),
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
            return loss(logprobs, entropy, microbatch)

        return output, loss_of_hidden


def _positions(microbatch: Microbatch) -> Tensor:
    """Return the positions of the slots, (1, T), or (3, 1, T) in time, height and width."""
    if microbatch.rope_positions is None:
        return microbatch.position_ids[None]
    return microbatch.rope_positions.T[:, None]
