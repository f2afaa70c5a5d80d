"""Functions that the ranks of a layout test run: the real policy on replayed rollouts.

The worker processes import this module.
"""

from __future__ import annotations

import os
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.batch.images import ImageFolder
from megatron_gmpo.batch.pixels import PixelReader
from megatron_gmpo.checkpoint import Save
from megatron_gmpo.config import Config
from megatron_gmpo.distributed import barrier, rank, world_size
from megatron_gmpo.errors import InputError, NonFiniteError
from megatron_gmpo.losses.adaptive_clip import ClipState
from megatron_gmpo.losses.correction import rollout_mismatch
from megatron_gmpo.losses.objective import Objective, make_objective
from megatron_gmpo.metrics.across_ranks import RankReduction
from megatron_gmpo.metrics.figures import Metric, value_of
from megatron_gmpo.models.description import ModelDescription, describe_model
from megatron_gmpo.platform import seed_everything
from megatron_gmpo.policy import build
from megatron_gmpo.policy.build import build_chunks
from megatron_gmpo.policy.optimizer_state import optimizer_slots
from megatron_gmpo.policy.parallel import start_model_parallel, stop_model_parallel
from megatron_gmpo.policy.policy import Policy
from megatron_gmpo.weights.background_files import BackgroundFiles
from megatron_gmpo.weights.export import Export
from megatron_gmpo.weights.parameters import unwrapped
from megatron_gmpo.weights.run_checkpoint import RunState, stored_checkpoints

from .batches import lean_share, recorded_experts, split, whole
from .held_saves import held
from .memory import peak_of_allocations
from .run_states import newest, records
from .stops import count_objects, watched

CPU = torch.device("cpu")


@contextmanager
def opened(cfg: Config) -> Iterator[Policy]:
    description = describe_model(cfg, world_size(), CPU)
    groups = start_model_parallel(cfg.parallel, cfg.seed, cfg.distributed_timeout_s)
    try:
        policy = Policy(cfg, description, groups, CPU, pixels=_pixels(cfg, description))
        yield policy
        _let_go(policy)
    finally:
        stop_model_parallel()


def _pixels(cfg: Config, description: ModelDescription) -> PixelReader | None:
    """Return a reader of the images in the model's folder."""
    if not description.vision:
        return None
    from megatron_gmpo.data.images import ModelImages

    folder = ImageFolder(Path(cfg.model.path) / "images")
    return PixelReader(folder, ModelImages(cfg.model.path, description.vision))


def _let_go(policy: Policy) -> None:
    """Drop the references that would keep the policy and its process groups' threads alive in this process.

    The dispatcher's graph leads to the gradient hooks and through them back to the model. The garbage
    collector cannot find this cycle.
    """
    for module in (module for chunk in policy.chunks for module in chunk.modules()):
        if hasattr(module, "token_dispatcher"):
            module.token_dispatcher.probs = None
    RotaryEmbedding.forward.cache_clear()
    YarnRotaryEmbedding.forward.cache_clear()


def train(cfg: Config, batch: TrainBatch, steps: int) -> dict[str, Any]:
    """Run ``steps`` optimizer steps on one batch.

    Returns the log probabilities before the steps, the metrics of each step, and the weights after the
    steps.
    """
    with opened(cfg) as policy:
        logprobs, share = policy.logprobs(batch), policy.share(batch)
        if policy.reference:
            share.ref_logprobs = policy.reference_logprobs(share)
        history = _steps(policy, share, steps)
        return {"logprobs": logprobs, "history": history, "weights": weights_on_rank_0(policy)}


def train_in_small_buckets(cfg: Config, batch: TrainBatch, steps: int) -> dict[str, Any]:
    """Do the same with buckets of gradients for about 2,000 parameters."""
    small = partial(build.DistributedDataParallelConfig, bucket_size=2000)
    with patch.object(build, "DistributedDataParallelConfig", small):
        return train(cfg, batch, steps)


def train_beside_servers(
    cfg: Config, batch: TrainBatch, steps: int
) -> tuple[list[Any], dict[str, Tensor] | None, list[int]]:
    """Export and take a step, ``steps`` times.

    Returns the metrics, the weights on rank 0, and the bytes of the gradient buffers after each export and
    each step.
    """
    sizes: list[int] = []

    def note(policy: Policy) -> None:
        chunks: Any = policy.chunks
        buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        sizes.append(sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers))

    history: list[Any] = []
    with opened(cfg) as policy:
        for _ in range(steps):
            for _ in policy.export_hf():
                pass
            note(policy)
            history += _steps(policy, policy.share(batch), 1)
            note(policy)
        return history, weights_on_rank_0(policy), sizes


def _objective(policy: Policy) -> Objective:
    return make_objective(policy.cfg.algorithm, is_moe=policy.description.is_moe, max_new_tokens=64)


def _steps(policy: Policy, batch: TrainBatch, steps: int) -> list[dict[str, float]]:
    objective = _objective(policy)
    objective.add_columns(batch)
    return [
        {name: value_of(metric) for name, metric in policy.train_step(batch, objective).items()}
        for _ in range(steps)
    ]


def learn(cfg: Config, batch: TrainBatch, steps: int, everything: bool) -> dict[str, Any]:
    """Run ``steps`` steps of ``train.minibatches_per_step`` updates each on one batch.

    Args:
        everything: compute every sequence, and all old log probabilities in a pass of their own.

    Returns:
        The metrics of every update, the share of computed tokens and the mismatch with the rollout, the old
        log probabilities of the minibatches that have them, and the weights.
    """
    with opened(cfg) as policy:
        objective = _objective(policy)
        history: list[dict[str, float]] = []
        for _ in range(steps):
            batch.old_logprobs = None
            if everything:
                share = policy.share(batch, cfg.train.minibatches_per_step)
                figures = policy.set_old_logprobs(share)
                minibatches = [share.minibatch(number) for number in range(len(share.plan))]
            else:
                share = lean_share(policy, batch, objective)
                figures = policy.prepare(share)
                minibatches = policy.minibatches(share)
            if policy.reference:
                for minibatch in minibatches:
                    minibatch.ref_logprobs = policy.reference_logprobs(minibatch)
            for minibatch in minibatches:
                metrics = policy.train_step(minibatch, objective)
                history.append({name: value_of(metric) for name, metric in metrics.items()})
        known = [minibatch for minibatch in minibatches if minibatch.old_logprobs is not None]
        figures |= policy.over_replicas(rollout_mismatch(*known))
        tokens = sum(minibatch.plan[0].tokens for minibatch in known)  # of all sequences
        old = torch.cat([torch.zeros(0), *(minibatch.old_logprobs for minibatch in known)])
        share.old_logprobs = torch.cat([old, torch.zeros(len(share.tokens) - len(old))])
        return {
            "history": history,
            "figures": {name: value_of(metric) for name, metric in figures.items()},
            "old_logprobs": whole(batch, share, share.old_logprobs)[:tokens],
            "weights": weights_on_rank_0(policy),
        }


def replay(
    cfg: Config, batch: TrainBatch, minibatches: int, steps: int, old_logprobs: Tensor | None = None
) -> dict[str, Any]:
    """Run ``steps`` steps of ``minibatches`` each; return results and the choices of this rank's routers.

    The old log probabilities are ``old_logprobs`` or else those that ``set_old_logprobs`` computes. All
    tokens of the batch must differ, because they identify the routers' choices. ``chosen`` has
    (token, layer) -> sets of experts.
    """
    with opened(cfg) as policy:
        share = policy.share(batch, minibatches)
        compared = {name: value_of(metric) for name, metric in policy.set_old_logprobs(share).items()}
        logprobs = share.old_logprobs
        if old_logprobs is not None:
            share.old_logprobs = old_logprobs[batch.token_index(share.numbers)]
        if policy.reference:
            share.ref_logprobs = policy.reference_logprobs(share)
        chosen = watch_routers(policy)
        history = [
            step
            for _ in range(steps)
            for number in range(len(share.plan))
            for step in _steps(policy, share.minibatch(number), 1)
        ]
        return {
            "logprobs": whole(batch, share, logprobs),
            "ref_logprobs": whole(batch, share, share.ref_logprobs) if policy.reference else None,
            "routed_experts": recorded_experts(policy, batch, share) if share.own_experts else None,
            "compared": compared,
            "history": history,
            "chosen": chosen,
            "router_shift": whole(batch, share, policy.router_shift(share)) if share.own_scores else None,
            "weights": weights_on_rank_0(policy),
        }


def stops(cfg: Config, batch: TrainBatch) -> list[dict[str, Any]]:
    """Return the ``Stops`` of each minibatch of the second step."""
    with opened(cfg) as policy:
        objective, found = _objective(policy), []
        for step in range(2):
            share = lean_share(policy, batch, objective)
            policy.prepare(share)
            for minibatch in policy.minibatches(share):
                with watched(policy) if step else nullcontext() as stops:
                    policy.train_step(minibatch, objective)
                if stops:
                    counts = {"fetches": stops.fetches, "objects": stops.objects}
                    found.append({"places": stops.places} | counts)
        return found


def reduce_over_ranks(parts: list[list[dict[str, Metric]]]) -> tuple[list[dict[str, Metric]], list[int]]:
    """Reduce each round's part of this rank; return the results, and the object collectives of each round."""
    reduce, results, objects = RankReduction(CPU), [], []
    for part in parts:
        with pytest.MonkeyPatch.context() as patch:
            counted = count_objects(patch)
            results.append(reduce(part[rank()], {"rank": torch.tensor([rank()])}))
            objects.append(sum(counted.values()))
    return [metrics | {"rank": Metric(float(host["rank"]))} for metrics, host in results], objects


def policy_mismatch(cfg: Config, batch: TrainBatch) -> dict[str, Any]:
    """Return the policy's old log probabilities and the metrics of its mismatch with the rollout."""
    with opened(cfg) as policy:
        share = policy.share(batch)
        figures = policy.set_old_logprobs(share) | policy.over_replicas(rollout_mismatch(share))
        return {"old_logprobs": whole(batch, share, share.old_logprobs)} | {
            name: value_of(metric) for name, metric in figures.items()
        }


def watch_routers(policy: Policy) -> dict[tuple[int, int], set[tuple[int, ...]]]:
    """Return a dict that forward passes fill: (token, layer) -> sets of experts in the router's output."""
    chosen: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    tp = policy.groups.tp
    for chunk in policy.chunks:
        running: list[list[int]] = []  # tokens of the microbatch; empty while a backward pass recomputes

        def start(_: Any, args: Any, running: list[list[int]] = running) -> None:
            running.append(args[0][0].chunk(tp.size())[tp.rank()].tolist())

        def stop(_: Any, __: Any, ___: Any, running: list[list[int]] = running) -> None:
            running.pop()

        def note(
            router: Any, _: Any, output: tuple[Tensor, Tensor], running: list[list[int]] = running
        ) -> None:
            for token, experts in zip(running[0] if running else [], output[1], strict=False):
                chosen.setdefault((token, router.layer_number - 1), set()).add(
                    tuple(experts.nonzero()[:, 0].tolist())
                )

        chunk.register_forward_pre_hook(start)
        chunk.register_forward_hook(stop)
        for router in (module for module in chunk.modules() if isinstance(module, TopKRouter)):
            router.register_forward_hook(note)
    return chosen


def router_gradients(cfg: Config, batch: TrainBatch) -> list[Tensor]:
    """Return the gradient of each layer's router after one step without gradient clipping, on one rank."""
    with opened(cfg) as policy:
        _steps(policy, policy.share(batch), 1)
        return [
            module.weight.main_grad.clone()
            for module in policy.chunks[0].modules()
            if isinstance(module, TopKRouter)
        ]


def router_logits_dtype(cfg: Config, batch: TrainBatch) -> set[torch.dtype]:
    """Return the dtypes of the router logits of all layers."""
    with opened(cfg) as policy:
        policy.logprobs(batch)
        routers = [module for module in policy.chunks[0].modules() if isinstance(module, TopKRouter)]
        return {
            router.gating(torch.ones(1, router.config.hidden_size, dtype=router.weight.dtype)).dtype
            for router in routers
        }


def run_on(
    cfg: Config, batch: TrainBatch, run_dir: Path, first: int, last: int, saves: list[int], keep_last: int = 9
) -> dict[str, Any]:
    """Run steps ``first`` + 1 to ``last`` of a run and save after the steps in ``saves``.

    If ``first`` is not 0, the run resumes from the latest checkpoint, which must be that of step ``first``.
    """
    with opened(cfg) as policy:
        if first:
            state = resume(policy, run_dir)
            assert (state.step, state.clip) == (first, ClipState(low=first, high=1))
        history: list[dict[str, float]] = []
        share = policy.share(batch)
        for step in range(first + 1, last + 1):
            policy.begin_step(step - 1)
            history += _steps(policy, share, 1)
            if step in saves:
                policy.start_save(run_dir, step, records(clip={"low": step, "high": 1}), keep_last).finish()
        return {"history": history, "weights": weights_on_rank_0(policy)}


def read_weights(cfg: Config, batch: TrainBatch, run_dir: Path) -> dict[str, Any]:
    """Return log probabilities and exported weights that this rank reads directly after updates.

    The updates have different numbers of microbatches. The results also include both values after a
    checkpoint was loaded.
    """
    with opened(cfg) as policy:

        def exported() -> dict[str, Tensor]:
            return {name: tensor.clone() for name, tensor in policy.export_hf()}

        share = policy.share(batch)
        _steps(policy, share, 1)
        found: dict[str, Any] = {"logprobs": policy.logprobs(batch)}
        _steps(policy, policy.share(split(batch, 2)[0]), 1)
        found["exported"] = exported()
        _steps(policy, share, 1)
        policy.start_save(run_dir, 3, records(), 1).finish()
        _steps(policy, share, 1)
        resume(policy, run_dir)
        return found | {
            "loaded": exported(),
            "logprobs_after_load": policy.logprobs(batch),
            "updates": policy.updates,
        }


def resume(policy: Policy, run_dir: Path) -> RunState:
    """Load the newest checkpoint and return its state."""
    checkpoint = newest(run_dir)
    assert checkpoint is not None
    return policy.load(checkpoint)


def refused_resume(cfg: Config, run_dir: Path) -> str:
    """Return the error message when the latest checkpoint is refused."""
    with opened(cfg) as policy, pytest.raises(InputError) as error:
        resume(policy, run_dir)
    return str(error.value)


def refused_weights(cfg: Config, run_dir: Path) -> str:
    """Return the error message when the latest checkpoint's weights are refused, as by evaluate."""
    checkpoint = newest(run_dir)
    assert checkpoint
    with opened(cfg) as policy, pytest.raises(InputError) as error:
        policy.load_weights(checkpoint)
    return str(error.value)


def random_numbers(cfg: Config, run_dir: Path) -> tuple[list[float], list[float]]:
    """Return numbers from every generator after a save, and again after the checkpoint is loaded."""

    def draw() -> list[float]:
        with get_cuda_rng_tracker().fork():
            tracked = torch.rand(()).item()
        with get_cuda_rng_tracker().fork("expert-parallel-rng"):
            tracked += torch.rand(()).item()
        return [random.random(), float(np.random.rand()), torch.rand(()).item(), tracked]

    with opened(cfg) as policy:
        seed_everything(100 + rank())
        draw()
        policy.start_save(run_dir, 1, records(), 1).finish()
        before = draw()
        draw()
        resume(policy, run_dir)
        return before, draw()


def save_both_ways(cfg: Config, batch: TrainBatch, run_dir: Path, go: Path) -> dict[str, Any]:
    """Save one state at once and in the background; return metrics of the steps before and after.

    The process that writes in the background waits until training has gone on for two steps.

    Returns:
        ``history`` of the steps, ``stored`` checkpoints of the background's folder while its second save is
        written, ``held`` bytes of that save in memory, and the ``peak`` of bytes that this rank allocates
        while it copies them.
    """
    go.unlink(missing_ok=True)
    with opened(cfg) as policy, held(), patch.dict(os.environ, WRITE_AFTER=str(go)):
        seed_everything(rank())
        share = policy.share(batch)
        history = _steps(policy, share, 2)
        state = records(clip={"low": 2, "high": 1})
        policy.start_save(run_dir / "at_once", 2, state, 1).finish()
        policy.start_save(run_dir / "background", 1, state, 1).finish()
        saves: list[Save] = []
        with patch.object(BackgroundFiles, "close", lambda files: None):  # the files stay, to be measured
            peak = peak_of_allocations(
                lambda: saves.append(policy.start_save(run_dir / "background", 2, state, 1, background=True))
            )
        (save,) = saves
        assert save._files
        nbytes = save._files.nbytes
        save._files.close()
        state["clip"]["low"] = -1
        history += _steps(policy, share, 2)
        assert min(random.random(), np.random.rand(), float(torch.rand(()))) >= 0  # the generators go on
        assert not save.ended(wait=False)
        barrier()
        stored = [path.name for path in stored_checkpoints(run_dir / "background")]
        barrier()
        go.touch()
        assert save.ended(wait=True)
        save.finish()
        return {"history": history, "stored": stored, "held": nbytes, "peak": peak}


def load_with_megatron_alone(cfg: Config, checkpoint: Path) -> tuple[set[str], set[str], dict[str, Tensor]]:
    """Return the checkpoint's keys, those of GPTModel.sharded_state_dict, and the weights Megatron loads."""
    description = describe_model(cfg, world_size(), CPU)
    groups = start_model_parallel(cfg.parallel, cfg.seed, cfg.distributed_timeout_s)
    try:
        (model,) = build_chunks(description, groups, CPU)
        model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(checkpoint)))
        weights = {name: tensor.clone() for name, tensor in Export([model], description.mapping, groups)}
        tensors = model.sharded_state_dict()
        apply_factories(tensors)
        names = {value.key for value in nested_values(tensors) if isinstance(value, ShardedTensor)}
        return set(dist_checkpointing.load_tensors_metadata(str(checkpoint))), names, weights
    finally:
        stop_model_parallel()


def weights_on_rank_0(policy: Policy) -> dict[str, Tensor] | None:
    weights = {name: tensor.clone() for name, tensor in policy.export_hf()}
    return weights if rank() == 0 else None


def exports(cfg: Config, batch_bytes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Return the weights that every rank gets from exports with these sizes of a gathered batch."""
    with opened(cfg) as policy:
        model, mapping, groups = policy.chunks, policy.description.mapping, policy.groups
        return [
            {name: tensor.clone() for name, tensor in Export(model, mapping, groups, nbytes)}
            for nbytes in batch_bytes
        ]


def exports_of_stages(cfg: Config) -> tuple[list[int], dict[str, Tensor], list[str]]:
    """Return the senders, the weights that this rank exports alone, and the calls that other stages see.

    The export is the second one, which needs no more metadata.
    """
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        call = getattr(dist, name)
        return lambda *args, **kwargs: (calls.append(name), call(*args, **kwargs))[1]

    with opened(cfg) as policy, pytest.MonkeyPatch.context() as patch:
        export = policy.export_hf()
        senders = export.senders
        for _ in export.of_stage():
            pass
        for name in ("broadcast", "all_gather_object"):
            patch.setattr(dist, name, counted(name))
        return senders, {name: tensor.clone() for name, tensor in export.of_stage()}, calls


def exported_names(cfg: Config, change_tower: bool) -> set[str]:
    """Return the names that a weight sync sends.

    Args:
        change_tower: whether the tower's weights differ from those of the folder, as after earlier training.
    """
    with opened(cfg) as policy:
        for chunk in map(unwrapped, policy.chunks):
            if change_tower and hasattr(chunk, "visual"):
                chunk.visual.patch_embed.proj.weight.data[0] += 1
        return {name for name, _ in policy.export_hf()}


def tower(cfg: Config, batch: TrainBatch, steps: int) -> dict[str, Any]:
    """Train, and return what this rank then has of the vision tower.

    ``weights`` has its parameters by name, {} on a stage without a tower. ``trained`` counts the parameters
    with a gradient buffer, and ``with_state`` those with optimizer state.
    """
    with opened(cfg) as policy:
        _steps(policy, policy.share(batch), steps)
        policy.model.finish_update()
        weights = {
            name: parameter
            for chunk in policy.chunks
            for name, parameter in chunk.named_parameters()
            if ".visual." in name
        }
        slots = {id(slot.parameter) for slot in optimizer_slots(policy.model.optimizer)}
        return {
            "weights": {name: parameter.detach().clone() for name, parameter in weights.items()},
            "trained": sum(hasattr(parameter, "main_grad") for parameter in weights.values()),
            "with_state": sum(id(parameter) in slots for parameter in weights.values()),
        }


def failure(cfg: Config, batch: TrainBatch) -> str:
    """Return the error message with which a training step stops."""
    with opened(cfg) as policy, pytest.raises(NonFiniteError) as error:
        _steps(policy, policy.share(batch), 1)
    return str(error.value)


def refusal(cfg: Config) -> str:
    """Return the error message when opening the policy is refused, or an empty string."""
    try:
        with opened(cfg):
            return ""
    except InputError as error:
        return str(error)


def steps_after_saving(cfg: Config, batch: TrainBatch, run_dir: Path, save: bool) -> list[dict[str, float]]:
    """Run two steps of a new policy and return their metrics; ``save`` adds a save before them."""
    with opened(cfg) as policy:
        if save:
            policy.start_save(run_dir, 0, records(), 1).finish()
        return _steps(policy, policy.share(batch), 2)


def memory(cfg: Config, batch: TrainBatch) -> dict[str, int]:
    """Return the bytes on this rank after a step, and the peaks of the next step.

    ``weights``, ``gradients``, ``optimizer`` and ``reference`` are sizes after the first step. In the next
    step, ``saved`` is the maximum that autograd keeps at the end of a forward pass, and ``peak`` is the
    maximum of allocated memory.
    """
    with opened(cfg) as policy:
        weights, share = _storages(_weights(policy.chunks)), policy.share(batch)
        _steps(policy, share, 1)  # creates the optimizer's moments
        saved = _SavedTensors(weights)
        for chunk in policy.chunks:
            chunk.register_forward_hook(saved.note)
        with saved:
            peak = peak_of_allocations(lambda: _steps(policy, share, 1))
        chunks: Any = policy.chunks
        buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        optimizers = getattr(policy.model.optimizer, "chained_optimizers", [policy.model.optimizer])
        torch_optimizers = [optimizer.optimizer for optimizer in optimizers]
        held = [param for one in torch_optimizers for group in one.param_groups for param in group["params"]]
        held += [
            value
            for one in torch_optimizers
            for state in one.state.values()
            for value in state.values()
            if torch.is_tensor(value)
        ]
        reference = policy.reference or []
        return {
            "weights": sum(weights.values()),
            "gradients": sum(_storages([buffer.grad_data for buffer in buffers]).values()),
            "optimizer": sum(size for key, size in _storages(held).items() if key not in weights),
            "reference": sum(_storages(_weights(reference)).values()),
            "saved": saved.most,
            "peak": peak,
        }


def _weights(chunks: list[torch.nn.Module]) -> list[Tensor]:
    return [tensor for chunk in chunks for tensor in (*chunk.parameters(), *torch.nn.Module.buffers(chunk))]


def _storages(tensors: list[Tensor]) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


class _Saved:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Count the bytes that autograd keeps for backward passes, each storage once.

    ``most`` is the maximum over the calls of ``note``.
    """

    def __init__(self, known: dict[int, int]) -> None:
        self._known, self._users, self._nbytes, self.most = known, Counter[int](), 0, 0
        super().__init__(self._pack, lambda kept: kept.tensor)

    def note(self, *_: Any) -> None:
        self.most = max(self.most, self._nbytes)

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        kept = _Saved(tensor)
        if key not in self._known:
            self._nbytes += size if not self._users[key] else 0
            self._users[key] += 1
            weakref.finalize(kept, self._drop, key, size)
        return kept

    def _drop(self, key: int, size: int) -> None:
        self._users[key] -= 1
        self._nbytes -= size if not self._users[key] else 0
