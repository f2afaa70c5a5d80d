"""One rank of any layout, on any machine: the real model, gradient buffers, optimizer and a microbatch, with shapes and no memory.

The process group is torch's fake one, of the full world size, whose collectives do nothing; every tensor lives on the meta device. What
is reported is what the policy's own code then holds, computes and sends. Two things are put in the place of what runs on a GPU:

- Fused kernels. Norms and core attention of the plain layer spec are replaced by functions that keep what Transformer Engine's and
  FlashAttention's kernels keep, unless the run is to be on a CPU. The rest is the plain spec, which also keeps a little that Transformer
  Engine fuses away.
- Routing. The number of tokens an expert gets depends on data. Here every expert gets the same: Megatron's padding to a capacity, of a
  factor 1.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..config import Config, OptimizerConfig
from ..losses.objective import needed_columns
from ..models.attention import PackedAttention, RMSNorm, packing_of
from ..models.description import DTYPES, ModelDescription
from ..platform import prepare_megatron
from ..platform.cpu import on_meta
from ..policy.build import build_chunks, make_trainable
from ..policy.logprobs import vocab_parallel_logprobs
from ..policy.parallel import start_model_parallel, stop_model_parallel

_META = torch.device("meta")


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in one kind of collective.

    Attributes:
        operation: ``all_gather``, ``reduce_scatter``, ``all_reduce``, ``all_to_all`` or ``broadcast``.
        group: name of the process group in Megatron's ProcessGroupCollection, e.g. ``tp``.
        ranks: of that group.
        sent: bytes on the wire for each rank, as a ring sends them: (n - 1) / n of the tensor, twice that in an all-reduce.
    """

    operation: str
    group: str
    ranks: tuple[int, ...]
    sent: int


@dataclass(frozen=True)
class Work:
    """What one microbatch costs a rank.

    Attributes:
        flops: of matrix products and attention.
        traffic: collectives within the pass, without the pipeline's sends.
    """

    flops: int
    traffic: tuple[Traffic, ...]


@dataclass(frozen=True)
class RankPlan:
    """What the first rank of a pipeline stage holds and does. Memory in bytes.

    Attributes:
        stage: pipeline stage.
        rank: the rank in the world.
        parameters: elements on this rank.
        stage_parameters: elements of the whole stage, all its ranks together, each counted once.
        stage_expert_parameters: those of routed experts among them.
        weights: of the model; gradients: their fp32 sums; optimizer: this rank's share of fp32 main weights and moments.
        reference: weights of the reference policy.
        activations: what the microbatches in flight keep for their backward passes, without logits.
        logits: logits of a microbatch and their gradient.
        temporaries: what else is alive at the peak of a microbatch's passes; under recomputation mostly the layer that is recomputed.
        in_flight: microbatches, or with a virtual pipeline passes through a chunk, whose activations are alive together.
        boundary: bytes that a microbatch sends from one chunk to the next, and its gradient back; 0 for a last stage of one chunk.
        forward: a forward pass with log probabilities; training: forward, backward and recomputation.
        gradient_sync: collectives of an optimizer step.
    """

    stage: int
    rank: int
    parameters: int
    stage_parameters: int
    stage_expert_parameters: int
    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    logits: int
    temporaries: int
    in_flight: int
    boundary: int
    forward: Work
    training: Work
    gradient_sync: tuple[Traffic, ...]

    @property
    def resident(self) -> int:
        """Bytes that stay between steps."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def total(self) -> int:
        """Bytes at the peak of a training step."""
        return self.resident + self.activations + self.logits + self.temporaries


def dry_run(
    cfg: Config,
    description: ModelDescription,
    *,
    world_size: int,
    stage: int,
    lengths: list[int],
    num_microbatches: int,
) -> RankPlan:
    """The first rank of ``stage`` in a world of ``world_size`` ranks. This process must have no process group.

    Args:
        description: of ``cfg``, from ``describe_model`` with the CPU as the device.
        lengths: padded sequence lengths of the microbatch.
        num_microbatches: of an optimizer step on a rank.
    """
    prepare_megatron(torch.device("cpu"))
    description = _with_even_routing(description)
    with _groups(cfg, world_size, stage) as groups, on_meta():
        observer = _Observer(groups)
        chunks = _build(cfg, description, groups, observer)
        # the optimizer that runs anywhere: what low precision and offload make of its state is counted below
        plain = {
            "moments_dtype": "fp32",
            "offload_fraction": 0.0,
            "overlap_grad_reduce": False,
            "overlap_param_gather": False,
        }
        chunks = (
            trainable := make_trainable(chunks, cfg.optimizer.model_copy(update=plain), 1, groups)
        ).chunks
        observer.resident = {
            *_storages(_tensors(chunks)),
            *_storages(buffer.grad_data for buffer in _buffers(chunks)),
        }
        passes = [_microbatch(cfg, description, groups, chunk, lengths, observer) for chunk in chunks]
        counts = _in_flight(len(chunks), groups, num_microbatches)
        kept = sum(count * one.kept for count, one in zip(counts, passes, strict=True))
        beside = max(one.peak - one.kept for one in passes)  # the one in its backward pass
        logits = max(one.logits for one in passes)
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
            gradients=_nbytes(buffer.grad_data for buffer in _buffers(chunks)),
            optimizer=_optimizer_nbytes(trainable.optimizer, chunks, cfg.optimizer),
            reference=_nbytes(_tensors(reference)),
            activations=kept,
            logits=logits,
            temporaries=max(0, beside - logits),
            in_flight=sum(counts),
            boundary=max(one.boundary for one in passes),
            forward=_sum(one.forward for one in passes),
            training=_sum(one.training for one in passes),
            gradient_sync=tuple(observer.gradient_sync(chunks)),
        )


@contextmanager
def _groups(cfg: Config, world_size: int, stage: int) -> Iterator[ProcessGroupCollection]:
    first = stage * (
        world_size // cfg.parallel.pipeline_model_parallel_size
    )  # Megatron's order of ranks: tp-cp-ep-dp-pp
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
    cfg: Config, description: ModelDescription, groups: ProcessGroupCollection, observer: _Observer
) -> list[torch.nn.Module]:
    with _META:
        chunks = build_chunks(description, groups, _META)
    for parent in [module for chunk in chunks for module in chunk.modules()]:
        for name, module in parent.named_children():
            if isinstance(module, PackedAttention):
                setattr(parent, name, _FusedAttention(groups.cp, observer))
            elif isinstance(module, RMSNorm) and cfg.device != "cpu":
                setattr(parent, name, _FusedNorm(module.weight))
    return chunks


@dataclass(frozen=True)
class _Pass:
    """A microbatch through one chunk. Bytes: ``kept`` until the backward pass, ``peak`` with it, ``logits`` with their gradient."""

    kept: int
    peak: int
    logits: int
    boundary: int
    forward: Work
    training: Work


def _microbatch(
    cfg: Config,
    description: ModelDescription,
    groups: ProcessGroupCollection,
    chunk: Any,
    lengths: list[int],
    observer: _Observer,
) -> _Pass:
    model: Any = chunk.module
    tokens = sum(lengths) // groups.cp.size()
    of_rank = tokens // groups.tp.size() if cfg.parallel.uses_sequence_parallel else tokens
    hidden = (of_rank, 1, description.transformer.hidden_size)
    dtype = description.transformer.params_dtype
    packing = packing_of(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))
    chunk.train()
    logits = boundary = 0
    observer.start()
    with observer:
        if not model.pre_process:
            model.set_input_tensor(torch.empty(hidden, dtype=dtype, device=_META, requires_grad=True))
        inputs = torch.empty(2, 1, tokens, dtype=torch.int64, device=_META)
        with torch.autograd.graph.saved_tensors_hooks(observer.note_saved, lambda tensor: tensor):
            output = chunk(inputs[0], inputs[1], None, packed_seq_params=packing)
        kept = observer.saved
        if model.post_process:
            logits = 2 * output.nbytes
            logprobs, entropy = vocab_parallel_logprobs(
                output[0],
                inputs[0, 0],
                vocab_size=description.hf.vocab_size,
                tp_group=groups.tp,
                temperature=cfg.rollout.temperature,
                chunk_tokens=cfg.train.logprob_chunk_tokens,
            )
            output = logprobs + entropy
        else:
            kept += (boundary := output.nbytes)  # until it has been sent, and its gradient has come
        forward = observer.work()
        output.backward(torch.empty_like(output))
    return _Pass(kept, observer.peak, logits, boundary, forward, observer.work())


def _in_flight(chunks: int, groups: ProcessGroupCollection, num_microbatches: int) -> list[int]:
    """For each chunk the passes whose activations are alive together (schedules.py: one more than the warm-up of its schedule)."""
    stages, stage = groups.pp.size(), groups.pp.rank()
    if chunks == 1:
        return [min(stages - stage, num_microbatches)]
    alive = min((stages - stage - 1) * 2 + (chunks - 1) * stages + 1, chunks * num_microbatches)
    order = [
        (number % (stages * chunks)) // stages for number in range(alive)
    ]  # groups of ``stages`` microbatches go chunk by chunk
    return [order.count(chunk) for chunk in range(chunks)]


class _Observer(TorchDispatchMode):
    """Watches meta tensors come and go, counts FLOPs and collectives."""

    def __init__(self, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.resident: set[int] = set()  # storages that were there before
        self._names = {}
        for field in reversed(
            dataclasses.fields(groups)
        ):  # tp, cp, ... come first, and win where groups are the same
            group = getattr(groups, field.name, None)
            if isinstance(group, dist.ProcessGroup):
                self._names[group.group_name] = field.name
        self.start()

    def start(self) -> None:
        """Forgets everything."""
        self.live = self.peak = self.flops = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._saved: dict[int, int] = {}
        self._sent: Counter[tuple[str, str, tuple[int, ...]]] = Counter()

    def work(self) -> Work:
        """Since ``start``."""
        return Work(self.flops, tuple(Traffic(*key, sent) for key, sent in self._sent.items()))

    def note_saved(self, tensor: Tensor) -> Tensor:
        """Takes what autograd saves for a backward pass."""
        storage = tensor.untyped_storage()
        if tensor.is_meta and storage._cdata not in self.resident:
            self._saved[storage._cdata] = storage.nbytes()
        return tensor

    @property
    def saved(self) -> int:
        """Bytes of it, each storage once."""
        return sum(self._saved.values())

    def gradient_sync(self, chunks: list[torch.nn.Module]) -> Iterable[Traffic]:
        """Gradients summed over the data-parallel ranks, and with a distributed optimizer the updated weights gathered."""
        sent: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
        for buffer in _buffers(chunks):
            group = buffer.data_parallel_group
            if buffer.param_data is None:
                sent[self._key("all_reduce", group)] += _wire_bytes(
                    "all_reduce", buffer.grad_data.nbytes, group.size()
                )
            else:
                sent[self._key("reduce_scatter", group)] += _wire_bytes(
                    "reduce_scatter", buffer.grad_data.nbytes, group.size()
                )
                sent[self._key("all_gather", group)] += _wire_bytes(
                    "all_gather", buffer.param_data.nbytes, group.size()
                )
        return [Traffic(*key, count) for key, count in sent.items() if count]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "c10d":
            self._note_collective(func, args)
        elif (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._note_storage(tensor.untyped_storage())
        return out

    def _note_storage(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or key in self.resident:
            return
        alive = self._alive

        def gone(_: Any) -> None:
            del alive[key]
            if alive is self._alive:
                self.live -= size

        alive[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _note_collective(self, func: Any, args: tuple[Any, ...]) -> None:
        operation = _OPERATIONS.get(func._overloadpacket._qualified_op_name.removeprefix("c10d::"))
        group = next(
            (
                dist.ProcessGroup.unbox(arg)
                for arg in args
                if isinstance(arg, torch.ScriptObject) and _is_group(arg)
            ),
            None,
        )
        assert operation, f"{func} is a collective that the dry run does not know"
        assert group is not None
        size = max(
            sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor)) for arg in args
        )  # the whole, not a rank's share
        if group.size() > 1:
            self._sent[self._key(operation, group)] += _wire_bytes(operation, size, group.size())

    def _key(self, operation: str, group: dist.ProcessGroup) -> tuple[str, str, tuple[int, ...]]:
        return (
            operation,
            self._names.get(group.group_name, group.group_name),
            tuple(dist.get_process_group_ranks(group)),
        )


_OPERATIONS = {
    "allreduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
}


def _wire_bytes(operation: str, size: int, ranks: int) -> int:
    if operation == "broadcast":
        return size
    return size * (ranks - 1) // ranks * (2 if operation == "all_reduce" else 1)


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())  # pyright: ignore[reportAttributeAccessIssue]


class _FusedNorm(torch.nn.Module):
    """Stands for a fused RMSNorm: it keeps its input, and one fp32 number a token."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return _FusedNormFunction.apply(x, self.weight)  # pyright: ignore[reportReturnType]


class _FusedNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _FusedAttention(torch.nn.Module):
    """Stands for FlashAttention, whose backward pass computes the scores anew: kept are queries, keys, values, the output, and one fp32
    number a token and head. Over context-parallel ranks keys and values go around, and their gradients come back."""

    def __init__(self, cp_group: dist.ProcessGroup, observer: _Observer) -> None:
        super().__init__()
        self.cp_group, self.observer = cp_group, observer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: Any,
        packed_seq_params: PackedSeqParams,
        **__: Any,
    ) -> Tensor:
        bounds = packed_seq_params.cu_seqlens_q
        squares = int(((bounds[1:] - bounds[:-1]).long() ** 2).sum()) // self.cp_group.size()
        # two products, of which the causal mask leaves one half
        flops = squares * query.shape[1] * (query.shape[2] + value.shape[2])
        return _FusedAttentionFunction.apply(query, key, value, self.cp_group, self.observer, flops)  # pyright: ignore[reportReturnType]


class _FusedAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cp_group: dist.ProcessGroup,
        observer: _Observer,
        flops: int,
    ) -> Tensor:
        tokens, heads, _ = query.shape
        out = query.new_empty(tokens, heads * value.shape[2])
        ctx.save_for_backward(query, key, value, out, query.new_empty(tokens, heads, dtype=torch.float32))
        ctx.cp_group, ctx.observer, ctx.flops = cp_group, observer, flops
        observer.flops += flops
        for x in (key, value):
            if cp_group.size() > 1:
                dist.all_gather_into_tensor(
                    x.new_empty(cp_group.size() * len(x), *x.shape[1:]), x.contiguous(), group=cp_group
                )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, _, _ = ctx.saved_tensors
        ctx.observer.flops += ctx.flops * 5 // 2  # the scores again, and four products for the gradients
        for x in (key, value):
            if ctx.cp_group.size() > 1:
                whole = x.new_empty(ctx.cp_group.size() * len(x), *x.shape[1:])
                dist.reduce_scatter_tensor(torch.empty_like(x), whole, group=ctx.cp_group)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None, None


def _sum(parts: Iterable[Work]) -> Work:
    parts = list(parts)
    sent: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    for traffic in (traffic for part in parts for traffic in part.traffic):
        sent[traffic.operation, traffic.group, traffic.ranks] += traffic.sent
    return Work(sum(part.flops for part in parts), tuple(Traffic(*key, count) for key, count in sent.items()))


def _tensors(chunks: list[torch.nn.Module]) -> Iterable[Tensor]:
    # a DistributedDataParallel's own ``buffers`` are gradients
    return [tensor for chunk in chunks for tensor in (*chunk.parameters(), *torch.nn.Module.buffers(chunk))]


def _buffers(chunks: list[Any]) -> list[Any]:
    """Megatron's buffers of gradients and weights (param_and_grad_buffer.py)."""
    return [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(_storages(tensors).values())


def _optimizer_nbytes(optimizer: Any, chunks: list[torch.nn.Module], cfg: OptimizerConfig) -> int:
    """On the device: main weights that are not the model's own, and two moments of each of their elements."""
    main = [param for group in optimizer.param_groups for param in group["params"]]
    known = _storages(_tensors(chunks))
    own = sum(size for key, size in _storages(main).items() if key not in known)
    moments = 2 * sum(param.numel() for param in main) * DTYPES[cfg.moments_dtype].itemsize
    return round((1 - cfg.offload_fraction) * (own + moments))


def _stage_parameters(chunk: Any, groups: ProcessGroupCollection) -> tuple[int, int]:
    """Elements of a chunk over all its ranks, and those of routed experts among them; an embedding shared with the head counts once."""
    total = experts = 0
    for name, param in chunk.named_parameters():
        if getattr(param, "shared_embedding", False) and not chunk.module.pre_process:
            continue
        if ".mlp.experts." in name:
            count = param.numel() * groups.ep.size() * groups.expt_tp.size()
            experts += count
        else:
            count = param.numel() * (
                groups.tp.size() if getattr(param, "tensor_model_parallel", False) else 1
            )
        total += count
    return total, experts
