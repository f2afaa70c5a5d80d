"""The rollout engine over SGLang servers: one rank of each node sends requests, every rank syncs weights."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from ...batch.samples import Prompt, SampleGroup
from ...config import Config
from ...distributed import Nodes, agreed, barrier, broadcast_object, rank, sum_over_ranks
from ...errors import RunError, ServerError
from ...metrics.figures import Metric
from ..ending import Ending, end_token_ids
from ..engine import SamplingParams
from ..images import RunImages
from ..player import Player
from .agreement import News, Rounds, agree
from .batches import Sampled
from .client import RolloutClient
from .memory import release_memory, resume_memory
from .processes import LocalServers
from .prompt_queue import PromptQueue
from .servers import Server
from .sync import WeightSync

_LAST_S = 20.0
"""Seconds within which every client learns that a batch is finished on all nodes."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ticket:
    """A submitted batch, to be passed to ``wait``. The future exists on ranks with a client."""

    name: str
    prompts: list[Prompt]
    sampling: SamplingParams
    ending: Ending
    future: Future[Sampled[Any]] | None


class SGLangEngine:
    """A ``RolloutEngine`` over SGLang servers, which may generate while the trainer trains.

    The first rank of each node has a client of the node's servers. The clients share the prompts of a batch,
    and each keeps the groups that it samples.

    A restarted server does not have the current weights. All ranks sync it together while they wait for
    samples, so the weights must not change between ``update_weights`` and the ``generate`` or ``wait`` calls
    that belong to it.

    Args:
        cfg: config of the run.
        servers: on the first rank of each node, the servers of its client; there may be none.
        local: their processes there, if the run starts them.
        sync: the route of the weights.
        tokenizer: the model's tokenizer, to decode responses.
        nodes: the nodes of the ranks.
        routed_experts: (layers, topk) to record every token's experts, or None.
        player: plays episodes on ranks with a client; None samples single responses. The engine
            starts it there and closes it.
        images: the images of the run; None for a model without vision.
    """

    def __init__(
        self,
        cfg: Config,
        servers: list[Server],
        local: LocalServers | None,
        sync: WeightSync,
        tokenizer: Any,
        nodes: Nodes,
        routed_experts: tuple[int, int] | None = None,
        player: Player | None = None,
        images: RunImages | None = None,
    ) -> None:
        self.version = -1
        self._cfg, self._servers, self._sync, self._nodes = cfg, servers, sync, nodes
        self._tokenizer, self._player = tokenizer, player
        self._end_ids = _end_ids(cfg.model.path, tokenizer)
        self._nonce: str = broadcast_object(secrets.token_hex(4))
        self._store = dist.PrefixStore(f"rollout/{self._nonce}", _store())
        self._rounds = Rounds(nodes, self._store)
        self._client = None
        with agreed():  # every client has announced its servers
            if nodes.is_leader:
                if player:
                    player.start()
                self._client = RolloutClient(
                    servers, local, cfg.sglang, self._nonce, self._store, routed_experts, images
                )
        self._asleep = False
        self._batches = self._submits = 0
        self._figures: dict[str, Metric] = {}
        self._counted = self._counts()

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> dict[int, SampleGroup]:
        """See ``RolloutEngine.generate``.

        ``rollout_logprobs`` refer to the distribution after temperature and before top-k and top-p.

        Raises:
            ServerError: no server is left, or no server answers within the timeouts. Raised on every rank.
            InputError: the servers refuse a request. Raised on every rank.
        """
        return self.wait(self.submit(prompts, sampling))

    def submit(self, prompts: list[Prompt], sampling: SamplingParams) -> Ticket:
        """Start sampling and return at once.

        Seeds depend on ``cfg.seed``, the step of the weights and the number of ``submit`` calls since
        ``update_weights``, so a resumed run sends the same seeds as an uninterrupted run.
        """
        sampling = replace(sampling, seed=(self._cfg.seed, max(0, self.version), self._submits))
        self._submits += 1
        self._batches += 1
        name = f"batch/{self._batches}"
        ending = Ending(self._tokenizer, self._end_ids, sampling.stop)
        future = None
        if self._client and self._player:
            future = self._client.play(name, prompts, sampling, ending, self._player)
        elif self._client:
            future = self._client.submit(name, prompts, sampling, ending)
        return Ticket(name, prompts, sampling, ending, future)

    def wait(self, ticket: Ticket) -> dict[int, SampleGroup]:
        """Return the groups of a ticket that this rank sampled. See ``generate``."""
        self._until(ticket)
        groups: dict[int, SampleGroup] = {}
        with agreed():
            if ticket.future:
                for position, sampled in ticket.future.result(_LAST_S).items():
                    prompt = ticket.prompts[position]
                    if not self._player:
                        sampled = [each.to_sample(prompt, ticket.ending) for each in sampled]
                    groups[position] = SampleGroup(prompt, sampled)
        if rank() == 0:
            PromptQueue(self._store, ticket.name, 0).delete()
        return groups

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See ``RolloutEngine.update_weights``. ``named_tensors`` is kept for servers that restart.

        ``weight_sync.in_flight`` determines how unfinished responses continue. Does nothing if the servers
        already have ``version``.
        """
        self._submits = 0
        if version == self.version and not self._asleep:
            return
        self.version, self._named_tensors = version, named_tensors
        if self._client:
            self._client.expect(version)
        self._until(None)

    def sleep(self) -> None:
        """Release the memory of colocated servers; no request may be in flight."""
        if self._cfg.rollout.placement == "colocated" and not self._asleep:
            with agreed():  # other ranks must not allocate before the end of this block
                if self._client:
                    release_memory(self._servers, self._cfg.weight_sync.timeout_s)
            self._asleep = True

    def take_metrics(self) -> dict[str, Metric]:
        """See ``RolloutEngine.take_metrics``."""
        taken, self._figures = self._figures, {}
        before, self._counted = self._counted, self._counts()
        news = {name: sum_over_ranks(count - before[name]) for name, count in self._counted.items()}
        return taken | {name: Metric(count) for name, count in news.items()}

    def close(self) -> None:
        """End unfinished requests, environments and the servers started by the run. Not collective."""
        with ExitStack() as last_to_first:
            last_to_first.callback(self._sync.close)
            if self._player:
                last_to_first.callback(self._player.close)
            if self._client:
                last_to_first.callback(self._client.close)

    def _counts(self) -> dict[str, int]:
        """Return this rank's counts since its start, by the names of their metrics."""
        client = self._client
        counts = {
            "rollout/retries": client.retries if client else 0,
            "rollout/server_restarts": client.restarts if client else 0,
        }
        if self._cfg.weight_sync.in_flight == "in_place":
            counts["rollout/old_cache_tokens"] = client.old_cache_tokens if client else 0
        return counts

    def _until(self, ticket: Ticket | None) -> None:
        """Wait until a batch is finished; without a ticket, until a server has the current weights.

        Servers that need the current weights are synced in the meantime.
        """
        future = ticket and ticket.future
        told = None
        while True:
            look = partial(self._news, self._client, future) if self._client else None
            everyone = self._rounds.wait(look, told, future)
            told = self._client and everyone[self._nodes.here]
            found = agree(everyone)
            if found.outdated:
                self._sync_weights(found.outdated)
            elif found.sampled or (found.ready and not ticket):
                return

    def _news(self, client: RolloutClient, future: Future[Sampled[Any]] | None) -> News:
        try:
            standing = client.standing() if self._servers else None
            return News(standing, sampled=bool(future and future.done() and future.result() is not None))
        except RunError as error:
            return News(error=error)
        except Exception as error:  # all ranks must learn of it, because they wait for these news
            log.exception("the rollout client failed")
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return News(error=ServerError(f"the rollout client of rank {rank()} failed with {reason}"))

    def _sync_weights(self, servers: list[Server]) -> None:
        timeout_s = self._cfg.weight_sync.timeout_s
        here = [server for server in servers if server in self._servers]
        if self._client:
            self._client.start_sync(here)
        asleep, self._asleep = self._asleep, False
        resumed: tuple[Server, ...] = ()
        if asleep:
            _empty_cache()
            with agreed():
                if here:
                    resumed = resume_memory(here, ("weights",), timeout_s)
        report = self._sync.update(servers, self._named_tensors, f"{self._nonce}-{self.version}")
        if asleep:
            _empty_cache()
            with agreed():
                if resumed:
                    resume_memory(resumed, ("kv_cache",), timeout_s)
        self._figures["weight_sync/gigabytes_per_second"] = Metric(report.nbytes / 1e9, report.seconds)
        if self._client:
            self._client.synced(here, report.failed)


def _store() -> dist.Store:
    """Return a store that all ranks reach."""
    return dist.distributed_c10d._get_default_store() if dist.is_initialized() else dist.HashStore()


def _end_ids(model: str, tokenizer: Any) -> set[int]:
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    try:
        generation_config = GenerationConfig.from_pretrained(model)
    except OSError:  # as transformers does for a model without a generation config
        generation_config = GenerationConfig.from_model_config(config)
    return end_token_ids(config, generation_config, tokenizer)


def _empty_cache() -> None:
    """Return torch's cached memory to the GPU on every rank, before the servers allocate memory."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.ipc_collect()  # buckets that servers have read
        torch.cuda.empty_cache()
    barrier()
