"""Estimate how long a step takes: the work and traffic of a dry run, divided by stated hardware figures.

The estimate is rough. Use it to compare layouts and to find the phase that dominates a step. Its assumptions
are the constants of ``hardware.py``.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass

import numpy as np

from ..batch.packing import plan_microbatches
from ..batch.plan import minibatch_bounds
from ..config import Config
from ..losses.objective import minibatches_without_pass, needed_columns
from ..rollout.sglang.sync.route import BUCKET_BYTES
from .data_path import data_path
from .hardware import (
    BUCKET_S,
    COMPUTE_EFFICIENCY,
    DECODE_EFFICIENCY,
    DISK_BANDWIDTH,
    GPUS_PER_NODE,
    LAYER_LATENCY_S,
    LINK_EFFICIENCY,
    PREFILL_EFFICIENCY,
    STOP_S,
    TP_LATENCY_S,
    Hardware,
)
from .model_size import Model
from .rank_plan import RankPlan, Traffic, Work


@dataclass(frozen=True)
class Batch:
    """The sequences of a step and how they are packed.

    Attributes:
        lengths: tokens per sequence.
        responses: tokens per response.
        microbatches: for each optimizer step, the number of microbatches on a rank. A forward pass over the
            whole batch has the same ones.
    """

    lengths: list[int]
    responses: list[int]
    microbatches: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def draw_batch(cfg: Config, world_size: int, prompt_tokens: int, response_tokens: int) -> Batch:
    """Draw the sequences of a step and pack them.

    Response lengths are lognormal with a mean of ``response_tokens``, cut at ``rollout.max_response_tokens``.
    """
    count = cfg.rollout.prompts_per_step * cfg.rollout.samples_per_prompt
    shape = np.random.default_rng(0).lognormal(0.0, 0.6, count)
    limit, scale = cfg.rollout.max_response_tokens, float(response_tokens)
    for _ in range(50):  # until the mean after the cut is ``response_tokens``
        responses = np.clip(shape * scale, 1, limit)
        scale *= response_tokens / responses.mean()
    responses = [int(length) for length in np.clip(shape * scale, 1, limit)]
    lengths = [prompt_tokens + length for length in responses]
    parallel = cfg.parallel

    def microbatches(part: list[int]) -> int:
        plan = plan_microbatches(
            part,
            max_tokens=cfg.train.max_tokens_per_microbatch,
            data_parallel_size=world_size // parallel.model_parallel_size,
            sequence_multiple=parallel.sequence_multiple,
            count_multiple=parallel.microbatch_multiple,
        )
        return len(plan[0])

    bounds = minibatch_bounds(count, cfg.train.minibatches_per_step)
    per_update = [microbatches(lengths[start:end]) for start, end in bounds]
    return Batch(lengths, responses, per_update)


@dataclass(frozen=True)
class Servers:
    """The rollout servers.

    Attributes:
        count: number of servers.
        gpus: GPUs per server.
        cache_tokens: number of tokens that the KV cache of a server holds.
    """

    count: int
    gpus: int
    cache_tokens: int


class StepTraffic:
    """The batch of a step, and the bytes that one rank sends in a step.

    Args:
        lengths: lengths of the sequences in the microbatch of the dry run.
    """

    def __init__(
        self,
        cfg: Config,
        model: Model,
        plans: list[RankPlan],
        batch: Batch,
        world_size: int,
        lengths: list[int],
    ) -> None:
        self.cfg, self.model, self.plans, self.batch, self.world_size = cfg, model, plans, batch, world_size
        replicas = world_size // cfg.parallel.model_parallel_size
        slots = sum(lengths)
        # ratio of the tokens of a microbatch to the tokens of the dry run's microbatch
        self._filled = batch.tokens / (replicas * sum(batch.microbatches) * slots)
        self._slots = slots
        images = -(-len(lengths) // cfg.parallel.context_parallel_size)
        self.image_flops = plans[0].tower / images if plans else 0.0
        """FLOPs of the vision tower for the image of a prompt."""
        sent_tower = not (cfg.model.freeze_vision and cfg.servers_keep_weights)
        self.synced = model.served_weights - (0 if sent_tower else 2 * model.tower_parameters)
        """Bytes of a weight sync."""
        minibatches, is_moe = cfg.train.minibatches_per_step, model.num_experts > 0
        without = minibatches_without_pass(cfg.algorithm, minibatches, is_moe=is_moe)
        self.passes = 1 - without / minibatches
        """Forward passes before the updates: for old log probabilities, and for the reference policy."""
        if "ref_logprobs" in needed_columns(cfg.algorithm):
            self.passes += 1
        self.data_path = data_path(cfg, batch.tokens, model.expert_bytes, world_size)

    def traffic(self) -> list[Traffic]:
        """Return the traffic of the busiest rank of each group in a step."""
        most: dict[tuple[str, str], Traffic] = {}
        for plan in self.plans:
            sent: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
            for work, times in (
                (plan.training.traffic, sum(self.batch.microbatches) * self._filled),
                (plan.forward.traffic, self.passes * sum(self.batch.microbatches) * self._filled),
                (plan.gradient_sync, len(self.batch.microbatches)),
            ):
                for traffic in work:
                    sent[traffic.operation, traffic.group, traffic.ranks] += int(traffic.sent * times)
            for (operation, group, ranks), count in sent.items():
                known = most.get((operation, group))
                if known is None or known.sent < count:
                    most[operation, group] = Traffic(operation, group, ranks, count)
        return list(most.values())

    def boundary(self) -> int:
        """Return the bytes that a stage sends to its neighbors in a step, forward and backward."""
        sent = max(plan.boundary for plan in self.plans) * (
            self.cfg.parallel.virtual_pipeline_model_parallel_size or 1
        )
        forward = self.passes * sum(self.batch.microbatches) * self._filled
        return int(sent * (2 * sum(self.batch.microbatches) * self._filled + forward))


class StepEstimate(StepTraffic):
    """Seconds of each phase of a step on GPUs.

    Args:
        lengths: lengths of the sequences in the microbatch of the dry run.
        servers: rollout servers; for the embedded engine the ranks.
    """

    def __init__(
        self,
        cfg: Config,
        model: Model,
        plans: list[RankPlan],
        batch: Batch,
        world_size: int,
        lengths: list[int],
        servers: Servers,
        hardware: Hardware,
    ) -> None:
        super().__init__(cfg, model, plans, batch, world_size, lengths)
        self.servers, self.hardware = servers, hardware
        self.seconds = {
            "rollout": self._rollout(),
            "weight_sync": self._weight_sync(),
            "data": self.data_path.seconds,
            "logprobs": self.passes * self._pipeline(sum(batch.microbatches), training=False),
            "train": sum(
                self._pipeline(count, training=True) + self._update() for count in batch.microbatches
            ),
        }

    @property
    def step(self) -> float:
        """Return the seconds of a step; with ``rollout.max_staleness`` generation overlaps training."""
        trainer = self.seconds["data"] + self.seconds["logprobs"] + self.seconds["train"]
        both = (
            max(trainer, self.seconds["rollout"])
            if self.cfg.rollout.max_staleness
            else trainer + self.seconds["rollout"]
        )
        return both + self.seconds["weight_sync"]

    @property
    def gpus(self) -> int:
        """Return the number of GPUs of the trainer and of servers on GPUs of their own."""
        colocated = self.cfg.rollout.placement == "colocated" or self.cfg.rollout.engine == "embedded"
        return self.world_size + (0 if colocated else self.servers.count * self.servers.gpus)

    @property
    def mfu(self) -> float:
        """Return the MFU of the training phase.

        It is the FLOPs of three forward passes, without recomputation, divided by the GPU's peak FLOPs. A
        frozen vision tower has one forward pass.
        """
        passes = sum(3 * plan.forward.flops for plan in self.plans)
        if self.cfg.model.freeze_vision:
            passes -= sum(2 * plan.tower for plan in self.plans)
        return (
            passes
            / len(self.plans)
            * self._filled
            * sum(self.batch.microbatches)
            / (self.seconds["train"] * self.hardware.flops)
        )

    def _pipeline(self, microbatches: int, *, training: bool) -> float:
        """Return the time of the slowest stage with the pipeline bubble.

        This is the time of ``microbatches + (stages - 1) / chunks`` passes.
        """
        stages, chunks = len(self.plans), self.cfg.parallel.virtual_pipeline_model_parallel_size or 1
        slowest = max(self._seconds(plan.training if training else plan.forward) for plan in self.plans)
        slowest += self._head(training=training)
        slowest += (
            max(plan.boundary for plan in self.plans)
            * chunks
            * (2 if training else 1)
            / (self._stage_link * LINK_EFFICIENCY)
        )
        return (microbatches + (stages - 1) / chunks) * (
            slowest * self._filled + self._stops(training=training)
        )

    def _head(self, *, training: bool) -> float:
        """Return the time to read and write the chunks of logits of the dry run's microbatch.

        The products of the head are among the FLOPs. In a forward pass a product writes the fp32 logits and
        the kernel of ``policy.logprob_kernels`` reads them. The backward pass computes them again, replaces
        them by their gradient, and reads it in two products.
        """
        elements = self._slots / self.cfg.parallel.context_parallel_size * self.model.vocab_size
        elements /= self.cfg.parallel.tensor_model_parallel_size
        return elements * 4 * (2 + 5 * training) / self.hardware.bandwidth

    def _stops(self, *, training: bool) -> float:
        """Return the time that the host's waiting in the MoE layers of a stage costs."""
        if not self.model.num_experts:
            return 0.0
        again = training and self.cfg.megatron.get("recompute_granularity") == "full"
        return self.model.num_layers / len(self.plans) * (1 + again) * STOP_S

    @property
    def _stage_link(self) -> float:
        return self.hardware.nvlink if self.world_size <= GPUS_PER_NODE else self.hardware.network

    def _seconds(self, work: Work) -> float:
        return work.flops / (self.hardware.flops * COMPUTE_EFFICIENCY) + sum(map(self._sending, work.traffic))

    def _sending(self, traffic: Traffic) -> float:
        """Return the time of a collective.

        A ring that leaves a node runs at the speed of the network. In an all-to-all, only the part that
        leaves the node does.
        """
        nodes = Counter(rank // GPUS_PER_NODE for rank in traffic.ranks)
        outside = 1.0 if len(nodes) > 1 else 0.0
        if traffic.operation == "all_to_all":
            outside = (len(traffic.ranks) - nodes[traffic.ranks[0] // GPUS_PER_NODE]) / (
                len(traffic.ranks) - 1
            )
        slowest = max(outside / self.hardware.network, (1 - outside) / self.hardware.nvlink)
        return traffic.sent * slowest / LINK_EFFICIENCY

    def _update(self) -> float:
        """Return the time of an optimizer step on the slowest rank.

        It is the time of the collectives, and of reading and writing the optimizer state and gradients.
        """
        return max(
            sum(map(self._sending, plan.gradient_sync))
            + 2 * (plan.optimizer + plan.gradients) / self.hardware.bandwidth
            for plan in self.plans
        )

    def _weight_sync(self) -> float:
        """Return the time of a weight sync, whose buckets are sent while the next ones are gathered.

        Every rank gathers all weights. On the route ``distributed``, a sender of each stage gathers and sends
        the stage's weights at the same time as the other senders. On the route ``tensor``, the servers copy
        the weights within their GPUs.
        """
        link = self.hardware.network if self.world_size > GPUS_PER_NODE else self.hardware.nvlink
        served = self.synced
        unsent = self.model.served_weights - served
        gathered = (self.model.weights - unsent) / (link * LINK_EFFICIENCY)
        if self.cfg.rollout.engine == "embedded":
            return gathered
        buckets = served / ((self.cfg.weight_sync.bucket_bytes or BUCKET_BYTES["cuda"]) / 2)
        match self.cfg.weight_sync.route_to(self.cfg.rollout.placement):
            case "disk":
                return gathered + 2 * served / DISK_BANDWIDTH
            case "tensor":
                copied = 2 * served / self.servers.gpus / self.hardware.bandwidth
                return max(gathered, copied + buckets * BUCKET_S)
            case "distributed":
                sent = served / (self.hardware.network * LINK_EFFICIENCY)
                return max(gathered, sent + buckets * BUCKET_S) / len(self.plans)

    def _rollout(self) -> float:
        """Return the time of the slowest server: prefill of its prompts, then decoding in a full batch."""
        servers, model, hardware = self.servers, self.model, self.hardware
        responses = self.batch.responses[:: servers.count]
        prompts = [
            length - response
            for length, response in zip(self.batch.lengths, self.batch.responses, strict=True)
        ][:: servers.count]
        # the prefix cache holds a group's prompt
        unique = sum(prompts) / self.cfg.rollout.samples_per_prompt
        images = len(prompts) / self.cfg.rollout.samples_per_prompt
        flops = 2 * model.active_parameters * unique + self.image_flops * images
        prefill = flops / (servers.gpus * hardware.flops * PREFILL_EFFICIENCY)
        mean_prompt, mean_response = sum(prompts) / len(prompts), sum(responses) / len(responses)
        slots = max(
            1,
            min(
                int(servers.cache_tokens / (mean_prompt + mean_response)),
                self.cfg.sglang.max_concurrent_requests,
            ),
        )
        waiting, running, step, seconds = responses[::-1], [], 0, 0.0
        while waiting or running:
            while waiting and len(running) < slots:
                heapq.heappush(running, step + waiting.pop())
            end = heapq.heappop(running)
            batch = len(running) + 1
            seconds += (end - step) * self._decode_step(batch, batch * (mean_prompt + mean_response / 2))
            step = end
        return prefill + seconds

    def _decode_step(self, batch: int, cached_tokens: float) -> float:
        model, servers, hardware = self.model, self.servers, self.hardware
        # share of the experts that at least one token uses
        used = 1 - (1 - model.topk / model.num_experts) ** batch if model.num_experts else 0.0
        weights = (
            model.served_weights
            / model.parameters
            * (model.parameters - model.expert_parameters * (1 - used))
        )
        read = weights + cached_tokens * model.kv_bytes_on(servers.gpus)
        reading = read / (servers.gpus * hardware.bandwidth * DECODE_EFFICIENCY)
        computing = 2 * model.active_parameters * batch / (servers.gpus * hardware.flops * PREFILL_EFFICIENCY)
        latency = model.num_layers * (LAYER_LATENCY_S + (TP_LATENCY_S if servers.gpus > 1 else 0.0))
        return max(reading, computing) + latency
