"""The policy: a parallel Megatron model that computes log probabilities, trains, exports and saves itself."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from ..batch.columns import Microbatch, RoutingShape, TrainBatch
from ..batch.images import patches_of
from ..batch.index import StepIndex
from ..batch.pixels import PixelReader
from ..batch.plan import StepPlan, computed_metrics, planned
from ..checkpoint import Save, check_model, start_save
from ..config import Config
from ..errors import NonFiniteError
from ..losses.objective import Objective, minibatches_without_pass, needed_columns
from ..metrics.across_ranks import RankReduction
from ..metrics.figures import Metric, reduce_metrics, value_of
from ..models.description import ModelDescription
from ..models.identity import model_identity
from ..weights.export import Export
from ..weights.load import has_tower_of, load_hf
from ..weights.random_states import restore_random_states
from ..weights.run_checkpoint import RunState, read_state
from .auxiliary_losses import AuxiliaryLosses
from .build import build_chunks, make_trainable, move_to_host, on_device, train_tower, without_logits
from .fp8 import drop_initial_values
from .observed import Observed
from .optimizer_state import load_training_state, load_weights, tensors_to_save
from .routers import OldRouters, RouterShift, freeze_routers, routes_together
from .routing import Routing, RoutingPass, pass_figures, pass_metrics
from .schedule import Schedule, response_logprobs


class Policy:
    """This rank's share of the policy. Every method is collective: all ranks call it with equal arguments.

    Only the batches differ: the ranks of a data-parallel replica have the batch of their replica.

    Args:
        cfg: the run's config.
        description: the model, from ``models.description.describe_model``.
        groups: the process groups, from ``policy.parallel.start_model_parallel``.
        device: device of the model.
        trainable: False builds no gradient buffers, optimizer and reference policy. Such a policy computes
            log probabilities, and loads and exports weights.

    Attributes:
        updates: number of optimizer steps that the weights contain, for Adam's bias correction.
    """

    def __init__(
        self,
        cfg: Config,
        description: ModelDescription,
        groups: ProcessGroupCollection,
        device: torch.device,
        trainable: bool = True,
        pixels: PixelReader | None = None,
    ) -> None:
        agree = (cfg.fp8.recipe is not None) == bool(description.transformer.fp8)
        assert agree, "cfg and description disagree about FP8"
        self.cfg, self.description, self.groups, self.device = cfg, description, groups, device
        self.trainable = trainable
        self.schedule = Schedule(cfg, description, groups, device, pixels)
        self._over_ranks = RankReduction(device)
        self._needs = needed_columns(cfg.algorithm)
        self._num_minibatches = cfg.train.minibatches_per_step
        is_moe, minibatches = description.is_moe, self._num_minibatches
        self._without_pass = minibatches_without_pass(cfg.algorithm, minibatches, is_moe=is_moe)
        self.chunks = self._load(cfg.model.path)
        self.routing: Routing | None = None
        if trainable:
            if cfg.train.freeze_router:
                freeze_routers(self.chunks)
            if not cfg.model.freeze_vision:
                train_tower(self.chunks)
            total = cfg.train.num_steps * cfg.train.minibatches_per_step
            self.model = make_trainable(self.chunks, cfg.optimizer, total, groups)
            self.updates, self.chunks = 0, self.model.chunks
            reference = cfg.model.reference_path or cfg.model.path
            self.reference = self._load(reference) if "ref_logprobs" in self._needs else None
            if self.reference:
                drop_initial_values(self.reference)
                if cfg.model.reference_offload:
                    move_to_host(self.reference)
            observed = description.transformer.moe_enable_routing_replay
            self.routing = Routing(self.chunks, description.routing, groups.tp) if observed else None
            self.auxiliary = AuxiliaryLosses(description.transformer, groups, device)
            self._weights_are_old = False  # no update since ``prepare`` or ``set_old_logprobs``
        else:
            drop_initial_values(self.chunks)

    def _load(self, path: str) -> list[torch.nn.Module]:
        chunks = without_logits(build_chunks(self.description, self.groups, self.device))
        load_hf(chunks, self.description.mapping, path, self.groups)
        return chunks

    @property
    def replica(self) -> int:
        """Return the number of the data-parallel replica that this rank belongs to."""
        return self.groups.dp.rank()

    @property
    def leads_replica(self) -> bool:
        """Return whether this rank is the first one of its replica."""
        return self.groups.tp.rank() == self.groups.cp.rank() == self.groups.pp.rank() == 0

    def plan(self, index: StepIndex, advantages: Tensor, objective: Objective) -> StepPlan:
        """Plan a step's updates and leave out what changes nothing. Needs no message.

        A sequence without response tokens or with advantage 0 has no gradient. It is computed only if a term
        of the loss, an auxiliary loss, an update of the routers' bias or the routing of other tokens uses it,
        or if no sequence has a gradient, so that figures of the policy exist.

        Args:
            index: the sequences of the step.
            advantages: (S,), one per sequence.
        """
        transformer = self.description.transformer
        every_token = (
            self.auxiliary.used or transformer.moe_router_bias_update_rate or routes_together(transformer)
        )
        computed = (advantages != 0).numpy() & (index.response_length > 0)
        if every_token or not objective.needs_advantage or not computed.any():
            computed = np.ones(len(index), np.bool_)
        units = index.units(self.cfg.algorithm.unit)
        patches = patches_of(index.images, index.image_rows) if index.images.any() else None
        lengths = index.length, index.response_length
        return self.schedule.plan(*lengths, units, computed, self._num_minibatches, patches)

    def share(self, batch: TrainBatch, minibatches: int = 1) -> TrainBatch:
        """Return this replica's share of a batch that every rank holds whole; every sequence is computed."""
        lengths, responses = batch.lengths.numpy(), batch.response_lengths.numpy()
        units = np.where(responses > 0, batch.units.numpy(), 0)
        plan = self.schedule.plan(lengths, responses, units, np.ones(len(batch), np.bool_), minibatches)
        return planned(batch, plan, self.replica)

    def logprobs(self, batch: TrainBatch) -> Tensor:
        """Return (L,) fp32 on the host: log probability of every response token, 0 elsewhere.

        Every rank holds the batch whole, and gets the whole result. Logits are divided by the rollout
        temperature. Routing replay uses the batch's ``routed_experts`` if present.
        """
        share = self.share(batch)
        routing = self._routing_pass(share, replay=batch.routed_experts is not None)
        found = self.schedule.logprobs(self.chunks, share, routing)
        assert share.numbers is not None
        flat = torch.zeros(len(batch.tokens), device=self.device)
        flat[batch.token_index(share.numbers).to(self.device)] = found.to(self.device)
        dist.all_reduce(flat, group=self.groups.dp)
        return flat.cpu()

    def prepare(self, batch: TrainBatch) -> dict[str, Metric]:
        """Set the ``old_logprobs`` of a step's batch.

        The minibatches of ``minibatches_without_pass`` get none here. ``train_step`` sets those of the first
        minibatch.

        Returns:
            The metrics of ``computed_metrics`` and of ``set_old_logprobs``.
        """
        self._weights_are_old = True
        metrics = computed_metrics(batch.plan, self._without_pass)
        if self._without_pass < len(batch.plan):
            metrics |= self.set_old_logprobs(batch, self._without_pass)
        return metrics

    def minibatches(self, batch: TrainBatch) -> list[TrainBatch]:
        """Split a batch of ``prepare`` into the minibatches of the step's updates."""
        minibatches = [batch.minibatch(number) for number in range(len(batch.plan))]
        for minibatch in minibatches[: self._without_pass]:
            minibatch.old_logprobs = None
        return minibatches

    def set_old_logprobs(self, batch: TrainBatch, first: int = 0) -> dict[str, Metric]:
        """Set the batch's ``old_logprobs`` and what this rank's routers record for training.

        Args:
            first: leave out the optimizer steps before this number.

        Returns:
            For a MoE, load and entropy of the routers, see ``OldRouters.metrics``. If the rollout engine
            recorded its routing, also ``moe/routing_differs`` and ``moe/routing_differs_tokens``: the
            difference between that routing and the routers' own choice, also when the routing is replayed,
            see ``RoutingPass.metrics``.
        """
        kind, shifts = self.cfg.algorithm.moe_routing_replay, "router_shift" in self._needs
        batch.own_experts, batch.own_scores = {}, {}
        routing = self._routing_pass(batch, replay=kind == "rollout", record=kind != "rollout")
        routers = self._old_routers(batch, keep_scores=shifts)
        batch.old_logprobs = self.schedule.logprobs(self.chunks, batch, routing, routers, first)
        self._weights_are_old = True
        _, host = self._over_ranks({}, pass_figures(routing, routers))
        metrics = pass_metrics(host, routing, routers, "moe/routing_differs")
        if routing and routing.record:
            batch.own_experts = routing.recorded()
        if routers and shifts:
            batch.own_scores = routers.scores()
        return metrics

    def router_shift(self, batch: TrainBatch) -> Tensor:
        """Return ``TrainBatch.router_shift`` under the current weights, (L,) fp32 on the host.

        The batch must have passed ``set_old_logprobs``. Costs one forward pass with the routing of training,
        except before the first update after it, when the shift is 1.
        """
        if self._weights_are_old:
            return torch.ones(len(batch.tokens))
        shift = RouterShift(*self._routers(batch))
        self.schedule.logprobs(self.chunks, batch, self._routing_pass(batch, replay=True), shift)
        return shift.gather()

    def reference_logprobs(self, batch: TrainBatch) -> Tensor:
        """Return (L,) fp32 on the host: the reference policy's log probability of every response token.

        The loss must need the column ``ref_logprobs``.
        """
        assert self.reference is not None
        with on_device(self.reference, self.device) if self.cfg.model.reference_offload else nullcontext():
            return self.schedule.logprobs(self.reference, batch)

    def over_replicas(self, metrics: dict[str, Metric]) -> dict[str, Metric]:
        """Reduce metrics that every rank of a replica has of its replica's batch. Collective."""
        return self._over_ranks(metrics if self.leads_replica else {})[0]

    def begin_step(self, step: int) -> None:
        """Put the learning-rate schedule at the first optimizer step after ``step`` steps of the run.

        The position follows from the run's step alone, so a resumed run has the learning rate that a run with
        its settings has at this step, whatever ``minibatches_per_step`` and ``num_steps`` were before. A step
        with fewer minibatches does not delay the schedule.
        """
        self.model.scheduler.num_steps = step * self.cfg.train.minibatches_per_step

    def train_step(self, minibatch: TrainBatch, objective: Objective) -> dict[str, Metric]:
        """Make one optimizer step on the minibatch, a batch whose plan has one.

        Before the first update of a step, the current policy is the old one. If the minibatch then has no
        ``old_logprobs``, this pass sets them; a ratio that divides by them is 1.

        In every layout the loss is the objective's sum over the minibatch divided by its count. Megatron
        multiplies a microbatch's loss by cp / microbatches (schedules.py) and averages gradients over dp * cp
        (distributed_data_parallel.py), so each microbatch's sum is scaled by dp * microbatches / count.

        Returns:
            Over all ranks: ``loss``, ``grad_norm``, ``learning_rate``, the objective's metrics and those of
            ``AuxiliaryLosses``. If the minibatch knows experts, also ``moe/routing_drift`` and
            ``moe/routing_drift_tokens``: the difference between them and the current weights' own routing.
            If this pass sets ``old_logprobs``, the metrics of ``set_old_logprobs`` instead of these two.

        Raises:
            NonFiniteError: the loss or the gradient norm is not finite.
        """
        if "router_shift" in self._needs:
            minibatch = replace(minibatch, router_shift=self.router_shift(minibatch), own_scores={})
        (part,) = minibatch.plan
        count = objective.count(part.sequences, part.response_tokens)
        scale = self.groups.dp.size() * len(part.microbatches) / max(1, count)
        is_old = minibatch.old_logprobs is None and self._weights_are_old
        routers = self._old_routers(minibatch) if is_old else None
        found: list[tuple[Tensor, Tensor]] = []

        def loss(logprobs: Tensor, entropy: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Any]]:
            if is_old:
                microbatch = replace(microbatch, old_logprobs=logprobs.detach())
                found.append(response_logprobs(logprobs, microbatch))
            output = objective(logprobs, entropy, microbatch, self.groups.cp)
            return output.loss * scale, {"loss": Metric(output.loss.detach()), **output.metrics}

        self.model.restore_gradients()
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()  # pyright: ignore[reportCallIssue]
        optimizer: Any = self.model.optimizer
        optimizer.zero_grad()
        routing = None
        if minibatch.routed_experts is not None or minibatch.own_experts:
            # R2 would replay the old policy's routing, which is that of this pass
            replay = not is_old or self.cfg.algorithm.moe_routing_replay == "rollout"
            routing = self._routing_pass(minibatch, replay=replay)
        kept = self.schedule.run(self.chunks, minibatch, loss, routing, routers)
        if isinstance(objective, Observed):
            objective.end(self.schedule, minibatch, routing)
        summed = pass_figures(routing, routers) | {"auxiliary": self.auxiliary.take()}
        fetched = {"old_logprobs": self.schedule.gather(found, len(minibatch.tokens))} if is_old else {}
        # one rank of each tensor-parallel group has the metrics; this is the only wait before the optimizer
        mine = reduce_metrics(kept) if self.groups.tp.rank() == 0 else {}
        metrics, host = self._over_ranks(mine, summed, fetched)
        # every context-parallel rank has the whole loss of its sequences
        metrics["loss"] = Metric(metrics["loss"].total / self.groups.cp.size(), count)
        kind = "differs" if is_old else "drift"
        metrics |= pass_metrics(host, routing, routers, f"moe/routing_{kind}")
        metrics |= self.auxiliary.metrics(host["auxiliary"], len(part.microbatches))
        if is_old:
            minibatch.old_logprobs = host["old_logprobs"]
        _check_finite("loss", metrics["loss"])
        self.model.scheduler.step(1)
        _, grad_norm, _ = optimizer.step()
        self.updates += 1
        self._weights_are_old = False
        metrics["grad_norm"] = Metric(float(grad_norm))
        metrics["learning_rate"] = Metric(optimizer.param_groups[0]["lr"])
        _check_finite("gradient norm", metrics["grad_norm"])
        return metrics

    def scale_lr(self, factor: float) -> None:
        """Scale the config's learning rates by ``factor`` from the next optimizer step on."""
        lr, min_lr = factor * self.cfg.optimizer.lr, factor * self.cfg.optimizer.min_lr
        optimizer: Any = self.model.optimizer
        # values in param_groups override the schedule (optimizer_param_scheduler.py:get_lr)
        for group in optimizer.param_groups:
            group["max_lr"], group["min_lr"] = lr, min_lr

    def export_hf(self) -> Export:
        """Return an iterable of (Hugging Face name, full tensor) that gathers the current weights.

        It leaves out a frozen vision tower if every rollout server has started with its weights.
        Colocated servers need memory from then on, so the gradient buffers are freed until ``train_step``.
        """
        if self.trainable and self.cfg.rollout.placement == "colocated":
            self.model.free_gradients()
        return self._export

    @cached_property
    def _export(self) -> Export:
        finish = self.model.finish_update if self.trainable else nullcontext
        cfg, mapping, vision = self.cfg, self.description.mapping, self.description.vision
        frozen = vision and cfg.model.freeze_vision and cfg.servers_keep_weights
        # the tower of a resumed run may have been trained
        left_out = frozen and has_tower_of(cfg.model.path, self.chunks, mapping, self.groups)
        return Export(self.chunks, mapping, self.groups, prepare=finish, with_tower=not left_out)

    def start_save(
        self, folder: Path, step: int, state: dict[str, Any], keep_last: int, **options: Any
    ) -> Save:
        """Save the state of ``step``, see ``checkpoint.start_save``, also for ``options``."""
        self.model.finish_update()
        tensors, gathered = tensors_to_save(self.model, self.groups, self.updates)
        state = {"model": self._identity, "updates": self.updates, **state}
        hf = Path(self.cfg.model.path)
        return start_save(folder, step, tensors, gathered, state, keep_last, hf, **options)

    def load(self, checkpoint: Path) -> RunState:
        """Load weights, optimizer and random states; return the rest of the checkpoint's state.

        Raises:
            InputError: the checkpoint belongs to another model, or to this model in another precision.
        """
        check_model(checkpoint, self._identity)
        state = read_state(checkpoint)
        self.updates = state.updates
        load_training_state(checkpoint, self.model, self.groups, self.updates)
        restore_random_states(checkpoint)
        return state

    def load_weights(self, checkpoint: Path) -> None:
        """Load the weights only.

        Raises:
            InputError: see ``load``.
        """
        check_model(checkpoint, self._identity)
        load_weights(checkpoint, self.chunks, self.groups)

    @property
    def _identity(self) -> dict[str, Any]:
        return model_identity(self.description.whole, self.cfg.model.dtype)

    def _routing_pass(self, batch: TrainBatch, *, replay: bool, record: bool = False) -> RoutingPass | None:
        """Return the routing of a pass over the batch; None if neither replay nor recording is enabled."""
        if self.routing is None:
            return None
        replay = replay and self.cfg.algorithm.moe_routing_replay != "none"
        return RoutingPass(self.routing, batch, self.groups.pp, replay, record)

    def _old_routers(self, batch: TrainBatch, *, keep_scores: bool = False) -> OldRouters | None:
        if not self.description.is_moe:
            return None
        per_layer: bool = self.description.transformer.moe_per_layer_logging
        return OldRouters(*self._routers(batch), keep_scores=keep_scores, per_layer=per_layer)

    def _routers(self, batch: TrainBatch) -> tuple[RoutingShape, ProcessGroupCollection, int, torch.device]:
        """Return the arguments of a ``RouterPass`` over the batch."""
        return self.description.routing, self.groups, len(batch.tokens), self.device


def _check_finite(name: str, metric: Metric) -> None:
    if not math.isfinite(metric.total):
        raise NonFiniteError(f"{name} is {value_of(metric)}")
