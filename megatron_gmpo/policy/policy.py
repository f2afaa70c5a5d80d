"""The policy: a parallel Megatron model that gives log probabilities, learns, exports and saves itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from ..batch.columns import Microbatch, RoutingShape, TrainBatch
from ..batch.packing import pack, plan_microbatches
from ..checkpoint import native
from ..config import Config
from ..distributed import all_gather_objects
from ..errors import NonFiniteError
from ..losses.objective import Objective
from ..metrics.figures import Metric, reduce_metrics, value_of
from ..models.attention import packing_of
from ..models.description import ModelDescription
from ..weights.export import export_hf
from ..weights.load import load_hf
from .auxiliary_losses import AuxiliaryLosses
from .build import build_chunks, make_trainable, move_to_host, on_device
from .fp8 import drop_initial_values, total_multiple
from .logprobs import vocab_parallel_logprobs
from .routers import OldRouters, RouterPass, RouterShift, freeze_routers
from .routing import Routing, RoutingPass

MicrobatchLoss = Callable[[Tensor, Tensor, Microbatch, int], tuple[Tensor, dict[str, Any]]]
"""(logprobs (T,), entropy (T,), microbatch, its place) -> (scaled loss, anything to keep), on the last pipeline stage."""


class Policy:
    """One model replica's share of the policy on this rank. Every method is collective: all ranks call it with equal arguments.

    Args:
        cfg: the run's config.
        description: the model, from ``models.description.describe_model``.
        groups: the process groups, from ``policy.parallel.start_model_parallel``.
        device: where the model lives.
        trainable: False leaves out gradient buffers, optimizer and reference; then it gives log probabilities, and weights can be loaded
            and exported.
    """

    def __init__(
        self,
        cfg: Config,
        description: ModelDescription,
        groups: ProcessGroupCollection,
        device: torch.device,
        trainable: bool = True,
    ) -> None:
        assert (cfg.fp8.recipe is not None) == bool(description.transformer.fp8), (
            "never silently in another precision"
        )
        self.cfg, self.description, self.groups, self.device = cfg, description, groups, device
        self.trainable = trainable
        self.chunks = self._load(cfg.model.path)
        self.routing: Routing | None = None
        if trainable:
            if cfg.train.freeze_router:
                freeze_routers(self.chunks)
            updates = cfg.train.num_steps * cfg.train.minibatches_per_step
            self.model = make_trainable(self.chunks, cfg.optimizer, updates, groups)
            self.chunks = self.model.chunks
            self.reference = (
                self._load(cfg.model.reference_path or cfg.model.path) if cfg.algorithm.kl_coef > 0 else None
            )
            if self.reference:
                drop_initial_values(self.reference)
                if cfg.model.reference_offload:
                    move_to_host(self.reference)
            observed = description.transformer.moe_enable_routing_replay
            self.routing = Routing(self.chunks, description.routing, groups.tp) if observed else None
            self.auxiliary = AuxiliaryLosses(description.transformer, groups, device)
            self._weights_are_old = False  # since ``set_old_logprobs`` no update changed them
        else:
            drop_initial_values(self.chunks)

    def _load(self, path: str) -> list[torch.nn.Module]:
        chunks = build_chunks(self.description, self.groups, self.device)
        load_hf(chunks, self.description.mapping, path, self.groups)
        return chunks

    def logprobs(self, batch: TrainBatch) -> Tensor:
        """(L,) fp32 on the CPU: log probability of every response token at the rollout temperature, 0 elsewhere.

        Under routing replay with the batch's ``routed_experts``, once it has some.
        """
        return self._logprobs(
            self.chunks, batch, self._routing_pass(batch, replay=batch.routed_experts is not None)
        )

    def set_old_logprobs(self, batch: TrainBatch) -> dict[str, Metric]:
        """Gives the batch its ``old_logprobs`` and, where routing is recorded, that behind them.

        Returns:
            Of a MoE, load and entropy of its routers: see ``OldRouters.metrics``; and ``moe/routing_differs`` and
            ``moe/routing_differs_tokens``: how far the routing is from the rollout engine's, if that was recorded; under its replay, how
            far it would be. See ``RoutingPass.metrics``.
        """
        kind, rspo = self.cfg.algorithm.moe_routing_replay, self.cfg.algorithm.loss == "rspo"
        routing = self._routing_pass(batch, replay=kind == "rollout", record=kind != "rollout")
        routers = OldRouters(*self._routers_of(batch), keep_scores=rspo) if self.description.is_moe else None
        batch.old_logprobs = self._logprobs(self.chunks, batch, routing, routers)
        self._weights_are_old = True
        metrics = (
            routers.metrics(per_layer=self.description.transformer.moe_per_layer_logging) if routers else {}
        )
        if routing:
            metrics |= routing.metrics("moe/routing_differs")
            if routing.record:
                batch.routed_experts = routing.gather()
        if routers and rspo:
            batch.router_scores = routers.gather_scores()
        return metrics

    def router_shift(self, batch: TrainBatch) -> Tensor:
        """(L,) fp32 on the CPU: rspo's gamma under the current weights, see ``TrainBatch.router_shift``. Needs ``router_scores``.

        One forward pass, with the routing that training takes; none before the first update after ``set_old_logprobs``.
        """
        assert batch.router_scores is not None
        if self._weights_are_old:
            return torch.ones(len(batch.tokens))
        shift = RouterShift(*self._routers_of(batch))
        self._logprobs(self.chunks, batch, self._routing_pass(batch, replay=True), shift)
        return shift.gather()

    def reference_logprobs(self, batch: TrainBatch) -> Tensor:
        """The same under the reference policy; needs ``algorithm.kl_coef`` > 0."""
        assert self.reference is not None
        with on_device(self.reference, self.device) if self.cfg.model.reference_offload else nullcontext():
            return self._logprobs(self.reference, batch)

    def train_step(self, minibatch: TrainBatch, objective: Objective) -> dict[str, Metric]:
        """One optimizer step on the minibatch, whose ``old_logprobs`` are known.

        The loss is the objective's sum over the minibatch divided by its count, in every layout: the schedule multiplies by
        cp / microbatches and the gradient buffers average over dp * cp (schedules.py, distributed_data_parallel.py), so each
        microbatch's sum is scaled by dp * microbatches / count.

        Returns:
            ``loss``, ``grad_norm``, ``learning_rate`` and the objective's metrics, over all ranks; those of ``AuxiliaryLosses``;
            ``moe/routing_drift`` and ``moe/routing_drift_tokens``, how far the current weights' own routing is from the minibatch's
            ``routed_experts``, if any.

        Raises:
            NonFiniteError: the loss or the gradient norm is not finite.
        """
        if self.cfg.algorithm.loss == "rspo":
            minibatch = replace(minibatch, router_shift=self.router_shift(minibatch), router_scores=None)
        plan = self._plan(minibatch)
        response_lengths = minibatch.response_lengths
        scale = self.groups.dp.size() * len(plan) / max(1, objective.count(response_lengths))

        def loss(
            logprobs: Tensor, entropy: Tensor, microbatch: Microbatch, place: int
        ) -> tuple[Tensor, dict[str, Any]]:
            output = objective(logprobs, entropy, microbatch, self.groups.cp)
            count = objective.count(response_lengths[plan[place]])
            return output.loss * scale, {"loss": Metric(output.loss.detach(), count), **output.metrics}

        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()  # pyright: ignore[reportCallIssue]
        optimizer: Any = self.model.optimizer
        optimizer.zero_grad()
        routing = self._routing_pass(minibatch, replay=True)
        metrics = self._reduce(self._run(self.chunks, minibatch, plan, loss, routing))
        metrics |= self.auxiliary.metrics(len(plan))
        metrics |= routing.metrics("moe/routing_drift") if routing else {}
        _check_finite("loss", metrics["loss"])
        self.model.scheduler.step(1)
        _, grad_norm, _ = optimizer.step()
        self._weights_are_old = False
        metrics["grad_norm"] = Metric(float(grad_norm))
        metrics["learning_rate"] = Metric(optimizer.param_groups[0]["lr"])
        _check_finite("gradient norm", metrics["grad_norm"])
        return metrics

    def scale_lr(self, factor: float) -> None:
        """From the next optimizer step on, learning rates are those of the config times ``factor``."""
        optimizer: Any = self.model.optimizer
        for (
            group
        ) in optimizer.param_groups:  # where the schedule looks first (optimizer_param_scheduler.py:get_lr)
            group["max_lr"], group["min_lr"] = (
                factor * self.cfg.optimizer.lr,
                factor * self.cfg.optimizer.min_lr,
            )

    def export_hf(self) -> Export:
        """(Hugging Face name, full tensor) on every rank, gathered as it is iterated."""
        return Export(self)

    def save(self, run_dir: Path, step: int, state: dict[str, Any], keep_last: int) -> Path:
        """Writes the checkpoint of ``step`` and drops older ones but for ``keep_last`` in all. See ``checkpoint.native.save``."""
        state = {"model": self._identity, **state}
        self.model.finish_update()
        return native.save(
            run_dir, step, self.model, state, self.groups, keep_last, Path(self.cfg.model.path)
        )

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Takes over weights, optimizer, schedule and random states; returns the ``state`` given to ``save``.

        Raises:
            InputError: the checkpoint is of another model, or of this one in another precision.
        """
        native.check_model(checkpoint, self._identity)
        return native.load(checkpoint, self.model, self.groups)

    def load_weights(self, checkpoint: Path) -> None:
        """Takes over the weights alone.

        Raises:
            InputError: as ``load``.
        """
        native.check_model(checkpoint, self._identity)
        native.load_weights(checkpoint, self.chunks, self.groups)

    @property
    def _identity(self) -> dict[str, Any]:
        return native.model_identity(self.description.hf, self.cfg.model.dtype)

    def _plan(self, batch: TrainBatch) -> list[list[int]]:
        """This data-parallel rank's microbatches, as numbers of sequences."""
        virtual = self.cfg.parallel.virtual_pipeline_model_parallel_size
        plan = plan_microbatches(
            batch.lengths.tolist(),
            max_tokens=self.cfg.train.max_tokens_per_microbatch,
            data_parallel_size=self.groups.dp.size(),
            sequence_multiple=self._sequence_multiple,
            count_multiple=self.groups.pp.size() if virtual else 1,
        )
        return plan[self.groups.dp.rank()]

    @property
    def _sequence_multiple(self) -> int:
        return 2 * self.groups.cp.size() if self.groups.cp.size() > 1 else 1

    def _routing_pass(self, batch: TrainBatch, *, replay: bool, record: bool = False) -> RoutingPass | None:
        """What the routers do in a pass over the batch; None where nobody asks."""
        if self.routing is None:
            return None
        replay = replay and self.cfg.algorithm.moe_routing_replay != "none"
        return RoutingPass(self.routing, batch, self.device, replay, record)

    def _routers_of(self, batch: TrainBatch) -> tuple[RoutingShape, dist.ProcessGroup, int, torch.device]:
        """The arguments of a ``RouterPass`` over the batch."""
        return self.description.routing, self.groups.tp, len(batch.tokens), self.device

    @torch.no_grad()
    def _logprobs(
        self,
        chunks: list[torch.nn.Module],
        batch: TrainBatch,
        routing: RoutingPass | None = None,
        routers: RouterPass | None = None,
    ) -> Tensor:
        def keep(
            logprobs: Tensor, _: Tensor, microbatch: Microbatch, place: int
        ) -> tuple[Tensor, dict[str, Any]]:
            return logprobs.new_zeros(()), {
                "at": microbatch.flat_index[microbatch.mask],
                "logprobs": logprobs[microbatch.mask],
            }

        for chunk in chunks:
            chunk.eval()
        flat = torch.zeros(len(batch.tokens), device=self.device)
        for found in self._run(chunks, batch, self._plan(batch), keep, routing, routers, forward_only=True):
            flat[found["at"]] = found["logprobs"].float()
        if self.groups.pp.rank() == self.groups.pp.size() - 1:
            dist.all_reduce(flat, group=self.groups.dp_cp)
        if self.groups.pp.size() > 1:
            dist.broadcast(
                flat,
                src=dist.get_global_rank(self.groups.pp, self.groups.pp.size() - 1),
                group=self.groups.pp,
            )
        return flat.cpu()

    def _run(
        self,
        chunks: list[torch.nn.Module],
        batch: TrainBatch,
        plan: list[list[int]],
        loss: MicrobatchLoss,
        routing: RoutingPass | None = None,
        routers: RouterPass | None = None,
        forward_only: bool = False,
    ) -> list[dict[str, Any]]:
        """Runs the pipeline schedule; what ``loss`` kept of each microbatch, on the last stage (elsewhere nothing)."""
        schedule = get_forward_backward_func()
        iterators = [self._microbatches(batch, plan, chunk, routing) for chunk in chunks]
        kept = schedule(
            forward_step_func=partial(self._forward_step, loss, routing, routers),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=len(plan),
            seq_length=self.cfg.train.max_tokens_per_microbatch,  # the real ones travel with the tensors: variable_seq_lengths
            micro_batch_size=1,
            forward_only=forward_only,
        )
        if routing:
            routing.end()
        return kept

    def _microbatches(
        self, batch: TrainBatch, plan: list[list[int]], chunk: torch.nn.Module, routing: RoutingPass | None
    ) -> Iterator[tuple[int, Microbatch]]:
        cp = self.groups.cp
        if routing is None:
            batch = replace(batch, routed_experts=None)
        for place, sequences in enumerate(plan):
            microbatch = pack(
                batch,
                sequences,
                cp_size=cp.size(),
                cp_rank=cp.rank(),
                sequence_multiple=self._sequence_multiple,
                total_multiple=total_multiple(self.cfg),
            )
            if routing:
                microbatch = routing.routing.cut(microbatch, chunk)
            yield place, microbatch.to(self.device)

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
                None,  # causal within each sequence: the attention reads the packing
                packed_seq_params=packing_of(microbatch.cu_seqlens),
            )

        def loss_of_logits(logits: Tensor) -> tuple[Tensor, dict[str, Any]]:
            logprobs, entropy = vocab_parallel_logprobs(
                logits[0],
                microbatch.labels,
                vocab_size=self.description.hf.vocab_size,
                tp_group=self.groups.tp,
                temperature=self.cfg.rollout.temperature,
                chunk_tokens=self.cfg.train.logprob_chunk_tokens,
            )
            return loss(logprobs, entropy, microbatch, place)

        return output, loss_of_logits

    def _reduce(self, kept: list[dict[str, Metric]]) -> dict[str, Metric]:
        """Metrics over microbatches and ranks, equal on all; tensor-parallel ranks hold copies, so one of them speaks."""
        merged = reduce_metrics(kept if self.groups.tp.rank() == 0 else [])
        plain = {name: _on_cpu(m) for name, m in merged.items()}
        return reduce_metrics(all_gather_objects(plain))


@dataclass(frozen=True)
class Export:
    """The weights a policy has when this is iterated, as often as that is; all ranks run each iteration to its end."""

    policy: Policy

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        if self.policy.trainable:
            self.policy.model.finish_update()
        return export_hf(self.policy.chunks, self.policy.description.mapping, self.policy.groups)


def _on_cpu(metric: Metric) -> Metric:
    total = (
        metric.total.cpu()
        if isinstance(metric.total, Tensor) and metric.op == "histogram"
        else float(metric.total)
    )
    return Metric(total, float(metric.count), metric.op)


def _check_finite(what: str, metric: Metric) -> None:
    if not math.isfinite(metric.total):
        raise NonFiniteError(f"{what} is {value_of(metric)}")
