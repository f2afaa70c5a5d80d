"""The rollout engine over SGLang servers: rank 0 sends requests, every rank syncs weights."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from ...batch.samples import Prompt, Sample, SampleGroup, version_spans_of
from ...config import Config
from ...distributed import barrier, broadcast_object, rank
from ...errors import InputError, ServerError
from ...metrics.figures import Metric
from ..ending import Ending, end_token_ids
from ..engine import SamplingParams
from .client import RolloutClient
from .memory import release_memory, resume_memory
from .processes import LocalServers
from .sampler import Response
from .servers import Server
from .sync import WeightSync

_POLL_S = 0.2
"""Interval at which rank 0's client is polled for samples, servers that need a sync, and errors."""
_NEWS_S = 20.0
"""Maximum seconds between broadcasts of rank 0, so that the waiting ranks' collective does not time out."""


@dataclass(frozen=True)
class Ticket:
    """A submitted batch, to be passed to ``wait``. The future exists on rank 0 only."""

    prompts: list[Prompt]
    sampling: SamplingParams
    ending: Ending
    future: Future[list[list[Response]]] | None


class SGLangEngine:
    """A ``RolloutEngine`` over SGLang servers, which may generate while the trainer trains.

    A restarted server does not have the current weights. All ranks sync it together while they wait for
    samples, so the weights must not change between ``update_weights`` and the ``generate`` or ``wait`` calls
    that belong to it.

    Args:
        cfg: config of the run.
        servers: the servers to use.
        local: their processes, on rank 0, if the run starts them.
        sync: the route of the weights.
        tokenizer: the model's tokenizer, to decode responses.
        routed_experts: (layers, topk) to record every token's experts, or None.
    """

    def __init__(
        self,
        cfg: Config,
        servers: list[Server],
        local: LocalServers | None,
        sync: WeightSync,
        tokenizer: Any,
        routed_experts: tuple[int, int] | None = None,
    ) -> None:
        self.version = -1
        self._cfg, self._servers, self._sync = cfg, servers, sync
        self._tokenizer, self._routed_experts = tokenizer, routed_experts
        self._end_ids = _end_ids(cfg.model.path, tokenizer)
        self._nonce = secrets.token_hex(4)
        self._client = None
        if rank() == 0:
            self._client = RolloutClient(servers, local, cfg.sglang, self._nonce, bool(routed_experts))
        self._asleep = False
        self._submits = 0
        self._figures: dict[str, Metric] = {}
        self._counted = dict.fromkeys(self._counts(), 0)

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
        ending = Ending(self._tokenizer, self._end_ids, sampling.stop)
        future = self._client and self._client.submit([p.input_ids for p in prompts], sampling, ending)
        return Ticket(prompts, sampling, ending, future)

    def wait(self, ticket: Ticket) -> dict[int, SampleGroup]:
        """Return the groups of a ticket that this rank sampled: all on rank 0. See ``generate``."""
        groups: dict[int, SampleGroup] = {}

        def finished() -> bool:
            if not (ticket.future and ticket.future.done()):
                return False
            for i, (prompt, responses) in enumerate(zip(ticket.prompts, ticket.future.result(), strict=True)):
                samples = [self._sample_of(prompt.input_ids, response, ticket) for response in responses]
                groups[i] = SampleGroup(prompt, samples)
            return True

        self._until(finished)
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
        self._until(lambda: self._client and self._client.any_ready() and not self._client.servers_to_sync())

    def sleep(self) -> None:
        """Release the memory of colocated servers; no request may be in flight."""
        if self._cfg.rollout.placement == "colocated" and not self._asleep:
            if self._client:
                release_memory(self._servers, self._cfg.weight_sync.timeout_s)
            broadcast_object(None)  # other ranks must not allocate before this
            self._asleep = True

    def take_metrics(self) -> dict[str, Metric]:
        """See ``RolloutEngine.take_metrics``."""
        taken, self._figures = self._figures, {}
        before, self._counted = self._counted, self._counts()
        return taken | {name: Metric(count - before[name]) for name, count in self._counted.items()}

    def close(self) -> None:
        """End unfinished requests and the servers started by the run."""
        if self._client:
            self._client.close()
        self._sync.close()

    def _counts(self) -> dict[str, int]:
        """Return the client's counts since its start, by the names of their metrics."""
        if not self._client:
            return {}
        counts = {"rollout/retries": self._client.retries, "rollout/server_restarts": self._client.restarts}
        if self._cfg.weight_sync.in_flight == "in_place":
            counts["rollout/old_cache_tokens"] = self._client.old_cache_tokens
        return counts

    def _until(self, finished: Callable[[], Any]) -> Any:
        """Wait until ``finished`` returns a true value on rank 0, and return it on every rank.

        Servers that need the current weights are synced in the meantime.
        """
        while True:
            news, result = broadcast_object(self._news(finished) if self._client else None)
            if news == "finished":
                return result
            if news == "failed":
                raise result
            if news == "sync":
                self._sync_weights(result)

    def _news(self, finished: Callable[[], Any]) -> tuple[str, Any]:
        assert self._client
        deadline = time.monotonic() + _NEWS_S
        try:
            while time.monotonic() < deadline:
                if servers := self._client.servers_to_sync():
                    return "sync", servers
                if result := finished():
                    return "finished", result
                time.sleep(_POLL_S)
        except (InputError, ServerError) as error:  # raised on every rank: the others wait for a broadcast
            return "failed", error
        return "waiting", None

    def _sync_weights(self, servers: list[Server]) -> None:
        asleep, self._asleep = self._asleep, False
        resumed: tuple[Server, ...] = ()
        if asleep:
            _empty_cache()
            if self._client:
                resumed = resume_memory(servers, ("weights",), self._cfg.weight_sync.timeout_s)
            broadcast_object(None)
        report = self._sync.update(servers, self._named_tensors, f"{self._nonce}-{self.version}")
        if asleep:
            _empty_cache()
        if resumed:
            resume_memory(resumed, ("kv_cache",), self._cfg.weight_sync.timeout_s)
        self._figures["weight_sync/gigabytes_per_second"] = Metric(report.nbytes / 1e9, report.seconds)
        if self._client:
            self._client.synced(servers, report.failed)

    def _sample_of(self, prompt: list[int], response: Response, ticket: Ticket) -> Sample:
        limit = ticket.sampling.max_new_tokens
        if response.finish_reason == "length" and len(response.tokens) < limit:
            # SGLang lowers the limit without a word (scheduler.py)
            raise InputError(
                f"the SGLang servers end responses after {len(response.tokens)} of {limit} tokens: "
                "raise context_length or max_total_tokens in [sglang.args], or lower max_new_tokens"
            )
        return Sample.from_response(
            prompt,
            response.tokens,
            response.logprobs,
            text=ticket.ending.text(response.tokens),
            finish_reason="stop" if response.finish_reason == "stop" else "length",
            policy_version=int(response.versions.min()),
            version_spans=version_spans_of(response.versions, start=len(prompt)),
            routed_experts=self._routing(response, len(prompt)),
        )

    def _routing(self, response: Response, prompt_length: int) -> np.ndarray | None:
        if not self._routed_experts:
            return None
        layers, topk = self._routed_experts
        expected = (prompt_length + len(response.tokens) - 1, layers * topk)
        if response.routed_experts is None or response.routed_experts.shape != expected:
            found = None if response.routed_experts is None else response.routed_experts.shape
            raise ServerError(
                f"SGLang recorded routed experts of shape {found}, expected {expected}: "
                "check that it serves model.path"
            )
        return response.routed_experts.reshape(-1, layers, topk)


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
