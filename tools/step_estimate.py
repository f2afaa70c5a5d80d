"""How long a step takes: what each rank computes and sends, from the dry run, over stated hardware numbers.

A rough estimate, good for comparing layouts and for finding what dominates. The assumptions that make it one are the constants below.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_gmpo.batch.packing import plan_microbatches
from megatron_gmpo.config import Config
from megatron_gmpo.losses.objective import needed_columns
from megatron_gmpo.models.fp8_blocks import BLOCK
from megatron_gmpo.planning.dry_run import RankPlan, Traffic, Work

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One GPU of a node of eight.

    Attributes:
        memory: bytes that torch sees.
        flops: dense BF16 a second.
        bandwidth: of its memory, bytes a second.
        nvlink, network: bytes a second in one direction, to GPUs of the node and to other nodes.
    """

    memory: int
    flops: float
    bandwidth: float
    nvlink: float
    network: float


# NVIDIA's data sheets of the H100 SXM, the H200 SXM and the HGX B200; sparsity left out, NVLink halved to one direction. Network: one
# 400 Gb/s adapter a GPU, as in DGX systems.
HARDWARE = {
    "h100": Hardware(79 * GIB, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Hardware(139 * GIB, 989e12, 4.8e12, 450e9, 50e9),
    "b200": Hardware(178 * GIB, 2250e12, 7.7e12, 900e9, 50e9),
}
GPUS_PER_NODE = 8

# Assumptions
COMPUTE_EFFICIENCY = 0.45
"""Share of the peak that the matrix products of training reach, with the small kernels between them."""
PREFILL_EFFICIENCY = 0.4
"""The same of the servers' prompts."""
DECODE_EFFICIENCY = 0.6
"""Share of the memory bandwidth that decoding reaches."""
LINK_EFFICIENCY = 0.7
"""Share of NVLink and network that collectives reach; none of their time is hidden behind computation."""
LAYER_LATENCY_S = 60e-6
"""Of one layer in decoding, however small the batch: launches of a dozen kernels."""
TP_LATENCY_S = 20e-6
"""Of one layer's two all-reduces in decoding with a server of several GPUs."""
DISK_BANDWIDTH = 2e9
"""Bytes a second that one process writes to a shared file system, or reads."""
HOST_COPY_BANDWIDTH = 10e9
"""Bytes a second through shared memory of a host."""
RESERVED = 5 * GIB
"""Memory for CUDA's context, NCCL's buffers, workspaces of libraries, and holes between tensors."""


@dataclass(frozen=True)
class Model:
    """Elements of all parameters and of those that one token meets, and bytes of a token's keys and values of one head over all layers."""

    parameters: int
    active_parameters: int
    expert_parameters: int
    kv_heads: int
    kv_head_bytes: int
    num_layers: int
    num_experts: int
    topk: int
    served_weights: int
    """Bytes of the weights on a server, and on their way to it."""

    @property
    def weights(self) -> int:
        """Bytes in bf16."""
        return 2 * self.parameters

    def kv_bytes_on(self, gpus: int) -> int:
        """Bytes that a token takes in the caches of a server's GPUs together: each has whole heads, at least one."""
        return self.kv_head_bytes * max(self.kv_heads, gpus)


@dataclass(frozen=True)
class Batch:
    """The sequences of a step and how they are packed.

    Attributes:
        lengths: tokens of each sequence; responses: tokens of each response.
        microbatches: of each optimizer step, on a rank.
        forward_microbatches: of a pass over the whole batch, on a rank.
    """

    lengths: list[int]
    responses: list[int]
    microbatches: list[int]
    forward_microbatches: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def draw_batch(cfg: Config, world_size: int, prompt_tokens: int, response_tokens: int) -> Batch:
    """Lognormal response lengths around a mean of ``response_tokens``, cut at ``rollout.max_new_tokens``, and their packing."""
    count = cfg.rollout.prompts_per_step * cfg.rollout.samples_per_prompt
    shape = np.random.default_rng(0).lognormal(0.0, 0.6, count)
    limit, scale = cfg.rollout.max_new_tokens, float(response_tokens)
    for _ in range(50):  # until the mean after the cut is the one asked for
        responses = np.clip(shape * scale, 1, limit)
        scale *= response_tokens / responses.mean()
    responses = [int(length) for length in np.clip(shape * scale, 1, limit)]
    lengths = [prompt_tokens + length for length in responses]
    parallel, parts = cfg.parallel, cfg.train.minibatches_per_step
    replicas = world_size // parallel.model_parallel_size
    cp, pp = parallel.context_parallel_size, parallel.pipeline_model_parallel_size

    def microbatches(part: list[int]) -> int:
        plan = plan_microbatches(
            part,
            max_tokens=cfg.train.max_tokens_per_microbatch,
            data_parallel_size=replicas,
            sequence_multiple=2 * cp if cp > 1 else 1,
            count_multiple=pp if parallel.virtual_pipeline_model_parallel_size else 1,
        )
        return len(plan[0])

    bounds = [round(i * count / parts) for i in range(parts + 1)]
    minibatches = [lengths[bounds[i] : bounds[i + 1]] for i in range(parts)]
    return Batch(lengths, responses, [microbatches(part) for part in minibatches], microbatches(lengths))


@dataclass(frozen=True)
class Servers:
    """Rollout servers: how many, GPUs of each, and how many tokens one's cache of keys and values holds."""

    count: int
    gpus: int
    cache_tokens: int


class StepEstimate:
    """Seconds of each phase of a step, and bytes that one rank sends in it.

    Args:
        slots: tokens of the microbatch that the plans are of.
    """

    def __init__(
        self,
        cfg: Config,
        model: Model,
        plans: list[RankPlan],
        batch: Batch,
        servers: Servers,
        hardware: Hardware,
        world_size: int,
        slots: int,
    ) -> None:
        self.cfg, self.model, self.plans, self.batch = cfg, model, plans, batch
        self.servers, self.hardware, self.world_size = servers, hardware, world_size
        replicas = world_size // cfg.parallel.model_parallel_size
        # tokens in a microbatch of training over those of a full one
        self._filled = batch.tokens / (replicas * sum(batch.microbatches) * slots)
        self._forward_filled = batch.tokens / (replicas * batch.forward_microbatches * slots)
        self.passes = 2 if "ref_logprobs" in needed_columns(cfg.algorithm) else 1
        """Forward passes before the updates: old log probabilities, and the reference's."""
        self.seconds = {
            "rollout": self._rollout(),
            "weight_sync": self._weight_sync(),
            "logprobs": self.passes
            * self._pipeline(batch.forward_microbatches, self._forward_filled, training=False),
            "train": sum(
                self._pipeline(count, self._filled, training=True) + self._update()
                for count in batch.microbatches
            ),
        }

    @property
    def step(self) -> float:
        """Seconds; with ``rollout.max_staleness`` the servers generate while the trainer trains."""
        trainer = self.seconds["logprobs"] + self.seconds["train"]
        both = (
            max(trainer, self.seconds["rollout"])
            if self.cfg.rollout.max_staleness
            else trainer + self.seconds["rollout"]
        )
        return both + self.seconds["weight_sync"]

    @property
    def gpus(self) -> int:
        """The trainer's, and the servers' where they have their own."""
        colocated = self.cfg.rollout.placement == "colocated" or self.cfg.rollout.engine == "embedded"
        return self.world_size + (0 if colocated else self.servers.count * self.servers.gpus)

    @property
    def mfu(self) -> float:
        """Of the training phase: three forward passes' FLOPs, without recomputation, over the peak."""
        forward = sum(plan.forward.flops for plan in self.plans) / len(self.plans)
        return (
            3
            * forward
            * self._filled
            * sum(self.batch.microbatches)
            / (self.seconds["train"] * self.hardware.flops)
        )

    def traffic(self) -> list[Traffic]:
        """What the busiest rank of each group sends in a step."""
        most: dict[tuple[str, str], Traffic] = {}
        for plan in self.plans:
            sent: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
            for work, times in (
                (plan.training.traffic, sum(self.batch.microbatches) * self._filled),
                (plan.forward.traffic, self.passes * self.batch.forward_microbatches * self._forward_filled),
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
        """Bytes that a stage sends to its neighbours in a step, forward and back."""
        sent = max(plan.boundary for plan in self.plans) * (
            self.cfg.parallel.virtual_pipeline_model_parallel_size or 1
        )
        forward = self.passes * self.batch.forward_microbatches * self._forward_filled
        return int(sent * (2 * sum(self.batch.microbatches) * self._filled + forward))

    def _pipeline(self, microbatches: int, filled: float, *, training: bool) -> float:
        """Of the slowest stage, with the bubble at both ends: (microbatches + (stages - 1) / chunks) passes."""
        stages, chunks = len(self.plans), self.cfg.parallel.virtual_pipeline_model_parallel_size or 1
        slowest = max(self._seconds(plan.training if training else plan.forward) for plan in self.plans)
        slowest += (
            max(plan.boundary for plan in self.plans)
            * chunks
            * (2 if training else 1)
            / (self._stage_link * LINK_EFFICIENCY)
        )
        return (microbatches + (stages - 1) / chunks) * slowest * filled

    @property
    def _stage_link(self) -> float:
        return self.hardware.nvlink if self.world_size <= GPUS_PER_NODE else self.hardware.network

    def _seconds(self, work: Work) -> float:
        return work.flops / (self.hardware.flops * COMPUTE_EFFICIENCY) + sum(map(self._sending, work.traffic))

    def _sending(self, traffic: Traffic) -> float:
        """Rings that leave a node go at the network's speed; of an all-to-all only what leaves the node."""
        nodes = Counter(rank // GPUS_PER_NODE for rank in traffic.ranks)
        outside = 1.0 if len(nodes) > 1 else 0.0
        if traffic.operation == "all_to_all":
            outside = (len(traffic.ranks) - nodes[traffic.ranks[0] // GPUS_PER_NODE]) / (
                len(traffic.ranks) - 1
            )
        slowest = max(outside / self.hardware.network, (1 - outside) / self.hardware.nvlink)
        return traffic.sent * slowest / LINK_EFFICIENCY

    def _update(self) -> float:
        """Of the slowest rank: gradients summed, weights gathered, and the optimizer's state read and written."""
        return max(
            sum(map(self._sending, plan.gradient_sync))
            + 2 * (plan.optimizer + plan.gradients) / self.hardware.bandwidth
            for plan in self.plans
        )

    def _weight_sync(self) -> float:
        """Every rank gathers all weights once; the first gives them on."""
        link = self.hardware.network if self.world_size > GPUS_PER_NODE else self.hardware.nvlink
        gathered = self.model.weights / (link * LINK_EFFICIENCY)
        if self.cfg.rollout.engine == "embedded":
            return gathered
        route = {
            "disk": 2 * self.model.served_weights / DISK_BANDWIDTH,
            "distributed": self.model.served_weights / (self.hardware.network * LINK_EFFICIENCY),
            "tensor": self.model.served_weights / HOST_COPY_BANDWIDTH,
        }
        return gathered + route[self.cfg.weight_sync.route]

    def _rollout(self) -> float:
        """Of the slowest server: its prompts' prefill, then decoding with as many responses at a time as it takes."""
        servers, model, hardware = self.servers, self.model, self.hardware
        responses = self.batch.responses[:: servers.count]
        prompts = [
            length - response
            for length, response in zip(self.batch.lengths, self.batch.responses, strict=True)
        ][:: servers.count]
        unique = sum(prompts) / self.cfg.rollout.samples_per_prompt  # the prefix cache keeps a group's prompt
        prefill = 2 * model.active_parameters * unique / (servers.gpus * hardware.flops * PREFILL_EFFICIENCY)
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
        met = (
            1 - (1 - model.topk / model.num_experts) ** batch if model.num_experts else 0.0
        )  # experts that some token meets
        weights = (
            model.served_weights / model.parameters * (model.parameters - model.expert_parameters * (1 - met))
        )
        read = weights + cached_tokens * model.kv_bytes_on(servers.gpus)
        reading = read / (servers.gpus * hardware.bandwidth * DECODE_EFFICIENCY)
        computing = 2 * model.active_parameters * batch / (servers.gpus * hardware.flops * PREFILL_EFFICIENCY)
        latency = model.num_layers * (LAYER_LATENCY_S + (TP_LATENCY_S if servers.gpus > 1 else 0.0))
        return max(reading, computing) + latency


def model_of(plans: list[RankPlan], hf: Any, transformer: Any, padding: int, *, quantized: bool) -> Model:
    """The whole model, from its stages.

    Args:
        padding: elements that pad the vocabulary.
        quantized: the servers hold it in block-wise FP8.
    """
    parameters = sum(plan.stage_parameters for plan in plans) - padding
    experts = sum(plan.stage_expert_parameters for plan in plans)
    count, topk = (
        transformer.num_moe_experts or 0,
        transformer.moe_router_topk if transformer.num_moe_experts else 0,
    )
    idle = experts * (count - topk) // count if count else 0
    if getattr(transformer, "multi_latent_attention", False):
        kv_heads, kv = 1, 2 * (hf.kv_lora_rank + hf.qk_rope_head_dim)  # the latents, which all heads share
    else:
        kv_heads, kv = transformer.num_query_groups, 2 * 2 * transformer.kv_channels
    layers = transformer.num_layers
    wide = hf.hidden_size * (
        hf.vocab_size * (1 if hf.tie_word_embeddings else 2) + layers * count
    )  # embeddings, routers; norms are small
    served = 2 * wide + (parameters - wide) * (1 + 4 / BLOCK**2) if quantized else 2 * parameters
    return Model(
        parameters, parameters - idle, experts, kv_heads, kv * layers, layers, count, topk, round(served)
    )
