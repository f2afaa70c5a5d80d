"""Build and run one rank of any layout on any machine, on tensors without memory.

The rank builds the real model, gradient buffers and optimizer, and runs a real microbatch. The process group
is torch's fake process group of the full world size, whose collectives do nothing. Every tensor is on the
meta device. An ``Observer`` counts the memory, FLOPs and traffic of the policy's own code. Two parts differ
from a GPU run:

- Fused kernels. Stand-ins replace the norms and the core attention of the plain layer spec. They save the
  same tensors as the kernels of Transformer Engine and FlashAttention. For ``device = "cpu"`` the plain norms
  stay. The rest of the plain spec saves slightly more than Transformer Engine does.
- Routing. In training, the number of tokens per expert depends on the data. Here every expert gets the same
  number, because Megatron pads to a capacity with a factor of 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from ..config import Config, OptimizerConfig
from ..losses.objective import needed_columns
from ..models.attention import PackedAttention, RMSNorm, packing_of
from ..models.description import DTYPES, ModelDescription
from ..models.mapping import TOWER
from ..platform import prepare_megatron
from ..platform.cpu import on_meta
from ..policy.build import build_chunks, make_trainable, output_weight, train_tower, without_logits
from ..policy.logprobs import vocab_parallel_logprobs
from ..policy.parallel import start_model_parallel, stop_model_parallel
from .fused import FusedAttention, FusedNorm
from .observer import Observer
from .rank_plan import RankPlan, Work, total_work

_META = torch.device("meta")

_ANYWHERE = {
    "moments_dtype": "fp32",
    "offload_fraction": 0.0,
    "overlap_grad_reduce": False,
    "overlap_param_gather": False,
}
"""Values of optimizer options that every machine supports.

``_optimizer_nbytes`` accounts for low precision and offloading.
"""


def dry_run(
    cfg: Config,
    description: ModelDescription,
    *,
    world_size: int,
    stage: int,
    lengths: list[int],
    num_microbatches: int,
    image_tokens: int = 0,
) -> RankPlan:
    """Return the plan of the first rank of ``stage`` in a world of ``world_size`` ranks.

    This process must not have a process group.

    Args:
        description: result of ``describe_model`` for ``cfg`` with the CPU as the device.
        lengths: padded sequence lengths of the microbatch.
        num_microbatches: microbatches of an optimizer step on a rank.
        image_tokens: tokens of the image of each sequence of a vision-language model's microbatch; 0 without
            images.
    """
    prepare_megatron(torch.device("cpu"))
    description = _with_even_routing(description)
    with _groups(cfg, world_size, stage) as groups, on_meta():
        observer = Observer(groups)
        chunks: list[Any] = _build(cfg, description, groups, observer)
        if not cfg.model.freeze_vision:
            train_tower(chunks)
        trainable = make_trainable(chunks, cfg.optimizer.model_copy(update=_ANYWHERE), 1, groups)
        chunks = trainable.chunks
        gradients = [buffer.grad_data for buffer in _buffers(chunks)]
        observer.resident = {*_storages(_tensors(chunks)), *_storages(gradients)}
        with _frozen_tower(chunks):
            passes = [_microbatch(cfg, description, groups, chunk, lengths, observer) for chunk in chunks]
        towers = [
            _encoding(tower, -(-len(lengths) // groups.cp.size()), image_tokens, observer)
            for chunk in chunks
            if image_tokens and (tower := getattr(chunk.module, "visual", None))
        ]
        counts = _in_flight(len(chunks), groups, num_microbatches)
        in_backward = max(one.peak - one.kept for one in passes + towers)
        has_reference = "ref_logprobs" in needed_columns(cfg.algorithm) and not cfg.model.reference_offload
        reference = _build(cfg, description, groups, observer) if has_reference else []
        totals = [_stage_parameters(chunk, groups) for chunk in chunks]
        return RankPlan(
            stage=stage,
            rank=dist.get_rank(),
            parameters=sum(p.numel() for chunk in chunks for p in chunk.parameters()),
            stage_parameters=sum(total for total, _ in totals),
            stage_expert_parameters=sum(experts for _, experts in totals),
            weights=_nbytes(_tensors(chunks)),
            gradients=_nbytes(gradients),
            optimizer=_optimizer_nbytes(trainable.optimizer, chunks, cfg.optimizer),
            reference=_nbytes(_tensors(reference)),
            activations=sum(count * one.kept for count, one in zip(counts, passes, strict=True))
            # the tower is in the first chunk
            + sum(counts[0] * tower.kept for tower in towers),
            temporaries=max(0, in_backward),
            in_flight=sum(counts),
            boundary=max(one.boundary for one in passes),
            forward=total_work(one.forward for one in passes + towers),
            training=total_work(one.training for one in passes + towers),
            gradient_sync=tuple(observer.gradient_sync(_buffers(chunks))),
            tower=sum(tower.forward.flops for tower in towers),
        )


@contextmanager
def _frozen_tower(chunks: list[Any]) -> Iterator[None]:
    """Let the chunks pass over their trained vision tower, which ``_encoding`` runs by itself."""
    trained = [
        parameter
        for chunk in chunks
        for name, parameter in chunk.module.named_parameters()
        if name.startswith(TOWER) and parameter.requires_grad
    ]
    for parameter in trained:
        parameter.requires_grad_(False)
    yield
    for parameter in trained:
        parameter.requires_grad_()


@contextmanager
def _groups(cfg: Config, world_size: int, stage: int) -> Iterator[ProcessGroupCollection]:
    """Start a fake process group as the first rank of ``stage``. Megatron orders ranks tp-cp-ep-dp-pp."""
    first = stage * (world_size // cfg.parallel.pipeline_model_parallel_size)
    dist.init_process_group("fake", store=FakeStore(), rank=first, world_size=world_size)
    try:
        yield start_model_parallel(cfg.parallel, cfg.seed, cfg.distributed_timeout_s)
    finally:
        stop_model_parallel()
        dist.destroy_process_group()


def _with_even_routing(description: ModelDescription) -> ModelDescription:
    if not description.is_moe:
        return description
    transformer = dataclasses.replace(
        description.transformer, moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True
    )
    return dataclasses.replace(description, transformer=transformer)


def _build(
    cfg: Config, description: ModelDescription, groups: ProcessGroupCollection, observer: Observer
) -> list[torch.nn.Module]:
    with _META:
        chunks = without_logits(build_chunks(description, groups, _META))
    for parent in [module for chunk in chunks for module in chunk.modules()]:
        for name, module in parent.named_children():
            if isinstance(module, PackedAttention):
                setattr(parent, name, FusedAttention(groups.cp, observer))
            elif isinstance(module, RMSNorm) and cfg.device != "cpu":
                setattr(parent, name, FusedNorm(module.weight))
    return chunks


@dataclass(frozen=True)
class _Pass:
    """The cost of one microbatch in one chunk, or in the vision tower.

    Attributes:
        kept: bytes that autograd keeps until the backward pass.
        peak: bytes at the peak of forward and backward pass.
        boundary: bytes sent to the next chunk.
        forward: work of the forward pass.
        training: work of forward and backward pass.
    """

    kept: int
    peak: int
    boundary: int
    forward: Work
    training: Work


def _microbatch(
    cfg: Config,
    description: ModelDescription,
    groups: ProcessGroupCollection,
    chunk: Any,
    lengths: list[int],
    observer: Observer,
) -> _Pass:
    model: Any = chunk.module
    tokens = sum(lengths) // groups.cp.size()
    of_rank = tokens // groups.tp.size() if cfg.parallel.uses_sequence_parallel else tokens
    hidden = (of_rank, 1, description.transformer.hidden_size)
    dtype = description.transformer.params_dtype
    packing = packing_of([0, *accumulate(lengths)])
    chunk.train()
    boundary = 0
    observer.start()
    with observer:
        if not model.pre_process:
            model.set_input_tensor(torch.empty(hidden, dtype=dtype, device=_META, requires_grad=True))
        inputs = torch.empty(2, 1, tokens, dtype=torch.int64, device=_META)
        with torch.autograd.graph.saved_tensors_hooks(observer.note_saved, lambda tensor: tensor):
            output = chunk(inputs[0], inputs[1], None, packed_seq_params=packing)
        kept = observer.saved
        if model.post_process:
            logprobs, entropy = vocab_parallel_logprobs(
                output[0],
                output_weight(chunk),
                inputs[0, 0],
                vocab_size=description.hf.vocab_size,
                tp_group=groups.tp,
                temperature=cfg.rollout.temperature,
                chunk_tokens=cfg.train.logprob_chunk_tokens,
                fp32_head=cfg.uses_fp32_head,
            )
            output = logprobs + entropy
        else:
            kept += (boundary := output.nbytes)  # until it is sent and its gradient arrives
        forward = observer.work()
        output.backward(torch.empty_like(output))
    return _Pass(kept, observer.peak, boundary, forward, observer.work())


def _encoding(tower: Any, images: int, image_tokens: int, observer: Observer) -> _Pass:
    """Return the cost of the images of a microbatch. Only a trained tower has a backward pass."""
    from .tower import encode  # not for text models

    tower.train()
    observer.start()
    with observer:
        with torch.autograd.graph.saved_tensors_hooks(observer.note_saved, lambda tensor: tensor):
            features = encode(tower, images, image_tokens, observer)
        kept, forward = observer.saved, observer.work()
        if features.requires_grad:
            features.backward(torch.empty_like(features))
    return _Pass(kept, observer.peak, 0, forward, observer.work())


def _in_flight(chunks: int, groups: ProcessGroupCollection, num_microbatches: int) -> list[int]:
    """Return for each chunk the number of forward passes whose activations are alive at the same time.

    Their sum is one more than the number of warm-up passes of the schedule (schedules.py).
    """
    stages, stage = groups.pp.size(), groups.pp.rank()
    if chunks == 1:
        return [min(stages - stage, num_microbatches)]
    alive = min((stages - stage - 1) * 2 + (chunks - 1) * stages + 1, chunks * num_microbatches)
    # groups of ``stages`` microbatches pass through one chunk after the other
    order = [(number % (stages * chunks)) // stages for number in range(alive)]
    return [order.count(chunk) for chunk in range(chunks)]


def _tensors(chunks: list[torch.nn.Module]) -> Iterable[Tensor]:
    # the ``buffers`` of a DistributedDataParallel are gradients
    return [tensor for chunk in chunks for tensor in (*chunk.parameters(), *torch.nn.Module.buffers(chunk))]


def _buffers(chunks: list[Any]) -> list[Any]:
    """Return Megatron's buffers of gradients and weights (param_and_grad_buffer.py)."""
    return [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(_storages(tensors).values())


def _optimizer_nbytes(optimizer: Any, chunks: list[torch.nn.Module], cfg: OptimizerConfig) -> int:
    """Return the bytes of the optimizer state on the device.

    They are the main weights that are not tensors of the model, and two moments per element.
    """
    main = [param for group in optimizer.param_groups for param in group["params"]]
    known = _storages(_tensors(chunks))
    own = sum(size for key, size in _storages(main).items() if key not in known)
    moments = 2 * sum(param.numel() for param in main) * DTYPES[cfg.moments_dtype].itemsize
    return round((1 - cfg.offload_fraction) * (own + moments))


def _stage_parameters(chunk: Any, groups: ProcessGroupCollection) -> tuple[int, int]:
    """Return a chunk's elements over all its ranks, and the elements of routed experts among them.

    An embedding that is shared with the output layer counts once.
    """
    total = experts = 0
    for name, param in chunk.named_parameters():
        if getattr(param, "shared_embedding", False) and not chunk.module.pre_process:
            continue
        if ".mlp.experts." in name:
            count = param.numel() * groups.ep.size() * groups.expt_tp.size()
            experts += count
        else:
            is_split = getattr(param, "tensor_model_parallel", False)
            count = param.numel() * (groups.tp.size() if is_split else 1)
        total += count
    return total, experts
