"""The steps of a weight sync that all routes share.

Every rank iterates the policy's export, which is collective. A rank that leads servers packs the tensors into
buckets and sends requests to them: rank 0, with colocated servers the first rank of each node, and with the
route ``distributed`` one rank of each pipeline stage. It packs the next bucket while the servers load the
current bucket. The requests follow the API of SGLang 0.5.23 (sglang/srt/entrypoints/http_server.py).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ....config import WeightSyncConfig
from ....distributed import all_gather_objects, rank
from ....errors import InputError, NonFiniteError, RunError
from ..servers import Server
from .buckets import Bucket, BucketPacker
from .session import Session
from .verification import Verification

INCOMPLETE = "incomplete"
"""Weight version of a server between the first and the last bucket.

Tokens with this version belong to no policy version."""

BUCKET_BYTES = {"cuda": 4 * 2**30, "cpu": 512 * 2**20}
"""Default of ``weight_sync.bucket_bytes`` by the type of the policy's device."""


@runtime_checkable
class StagedWeights(Protocol):
    """Weights that the pipeline stages can send separately, see ``weights.export.Export``."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...

    def of_stage(self) -> Iterator[tuple[str, Tensor]]: ...

    @property
    def senders(self) -> list[int]: ...


@dataclass(frozen=True)
class SyncReport:
    """The outcome of a sync, equal on all ranks.

    Attributes:
        nbytes: size of the weights, counted once for any number of servers.
        seconds: from the start of the sync until generation goes on.
        failed: servers that refused a request, died or timed out. Their weights are a mix of old and new
            weights, or the old weights.
    """

    nbytes: int
    seconds: float
    failed: tuple[Server, ...]


@dataclass(frozen=True)
class Sent:
    """The bytes that a rank has sent, and a digest of the weights that each server holds now."""

    nbytes: int
    digests: dict[Server, str]


class WeightSync(ABC):
    """Send weights from the trainer to SGLang servers. Each subclass implements one route.

    Args:
        cfg: the ``weight_sync`` section.
        device: device on which the buckets are packed.
        quantized: send linear weights in block-wise FP8.
        reuse_buffers: see ``BucketPacker``.

    Attributes:
        verification: checks the servers' weights, if ``cfg.verify`` is set.
    """

    def __init__(
        self, cfg: WeightSyncConfig, device: torch.device, quantized: bool, *, reuse_buffers: bool = True
    ) -> None:
        self._cfg, self._device = cfg, device
        self._bucket_bytes = cfg.bucket_bytes or BUCKET_BYTES[device.type]
        # half of it, because one bucket is packed while another is sent
        self._packer = BucketPacker(
            self._bucket_bytes // 2, self._allocate, quantized=quantized, reuse_buffers=reuse_buffers
        )
        self.verification = Verification() if cfg.verify else None

    @torch.no_grad()
    def update(
        self, servers: Sequence[Server], named_tensors: Iterable[tuple[str, Tensor]], version: str
    ) -> SyncReport:
        """Load new weights into the servers. Collective: every rank iterates ``named_tensors`` to its end.

        The servers pause generation during the sync. ``weight_sync.in_flight`` determines how unfinished
        requests continue.

        Args:
            servers: the servers to update, equal on every rank.
            named_tensors: the policy's export, by Hugging Face names. A server keeps its own dtype and rounds
                fp32 tensors when it loads them. With ``quantized``, linear weights are sent in block-wise FP8
                (``models.fp8_blocks``).
            version: version that the servers report as ``meta_info.weight_version`` after the sync.

        Raises:
            InputError: on every rank, for an error that a retry cannot fix: a refused API key, a folder that
                is not writable, a tensor that the servers ignore, a server that ``check`` refuses.
            NonFiniteError: on every rank, when a weight to be quantized is NaN or infinite.
        """
        self.check(servers)
        started = time.monotonic()
        tensors = iter(self._share_of(named_tensors))
        led = self._led(servers)
        session = Session(led, self._cfg.timeout_s) if led else None
        try:
            try:
                sent = self._lead(session, tensors, version) if session else self._follow(servers, tensors)
            except (InputError, NonFiniteError) as error:
                sent = error
                if session:
                    session.servers.clear()  # their weights are a mix of old and new weights
            for _ in tensors:  # the export is collective: the other ranks wait in it after an error here
                pass
            everywhere = all_gather_objects(sent)
            for problem in everywhere:
                if isinstance(problem, RunError):
                    raise problem
            complete = [each for each in everywhere if each]
            differing: list[Server] = []
            if self.verification:
                digests = {server: digest for each in complete for server, digest in each.digests.items()}
                differing = self.verification.differing(digests, version)
            if session:
                for server in differing:
                    if server in session.servers:
                        session.drop(server, "has other weights than its peers after the sync")
                session.request("/continue_generation", {})
        finally:
            if session:
                session.finish()
        end = (session.failed, session.problem) if session else ((), None)
        ends = all_gather_objects((time.monotonic() - started, *end))
        for *_, problem in ends:
            if problem:
                raise problem
        return SyncReport(
            self._total([each.nbytes for each in complete]),
            max(seconds for seconds, *_ in ends),
            tuple(dict.fromkeys(server for _, failed, _ in ends for server in failed)),
        )

    def check(self, servers: Sequence[Server]) -> None:
        """Check that the route reaches these servers.

        Raises:
            InputError: it does not.
        """
        return

    def close(self) -> None:
        """Remove folders and process groups that the syncs created."""
        return

    def _share_of(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """Return the tensors that this rank iterates. Collective."""
        return weights

    def _total(self, nbytes: list[int]) -> int:
        """Return the size of the weights from the bytes that each leading rank has sent."""
        return max(nbytes)  # each node gets all tensors

    def _led(self, servers: Sequence[Server]) -> list[Server]:
        """Return the servers to which this rank sends requests."""
        return list(servers) if rank() == 0 else []

    def _lead(self, session: Session, tensors: Iterator[tuple[str, Tensor]], version: str) -> Sent:
        """Send the weights to the servers that this rank leads; generation stays paused."""
        nbytes = 0
        pending = session.submit(self._open, session, version)
        try:
            for bucket, last in self._packer.pack(tensors):
                pending.result()
                fields = {
                    "weight_version": version if last else INCOMPLETE,
                    "flush_cache": last and self._cfg.in_flight != "in_place",
                }
                pending = session.submit(self._send, session, self._payload(bucket), fields, last)
                nbytes += bucket.nbytes
        finally:
            wait([pending])
        pending.result()
        digests = self._conclude(session, version)
        if session.problem:
            raise session.problem
        return Sent(nbytes, digests)

    def _follow(self, servers: Sequence[Server], tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Take part in the sync on another rank; the caller iterates the tensors that this leaves."""
        return

    def _open(self, session: Session, version: str) -> None:
        session.request("/pause_generation", {"mode": self._cfg.in_flight})
        if self.verification:
            self.verification.scramble(session)
        self._begin(session, version)

    def _conclude(self, session: Session, version: str) -> dict[Server, str]:
        """Check the servers' weights; return the digests with which those of all nodes are compared."""
        self._end(session, version)
        if self._cfg.in_flight == "in_place":
            # the server refuses while unfinished requests use the cache
            session.attempt(session.servers, ("/flush_cache", {}))
        for server, reply in session.request("/model_info").items():
            if (found := reply.json()["weight_version"]) != version:
                session.drop(server, f"has weights {found!r} after the sync, not {version!r}")
        return self.verification.check(session) if self.verification else {}

    def _begin(self, session: Session, version: str) -> None:
        """Prepare the servers for the first bucket."""
        session.request("/begin_weight_update", {})

    def _payload(self, bucket: Bucket) -> Any:
        """Return ``_send``'s argument for a bucket. Runs in the main thread, where ranks may communicate."""
        return bucket

    @abstractmethod
    def _send(self, session: Session, payload: Any, fields: dict[str, Any], last: bool) -> None:
        """Send a bucket to the servers. Runs in a thread; the bucket's memory is reused two buckets later.

        Args:
            session: the servers of this sync.
            payload: the result of ``_payload``.
            fields: ``weight_version`` and ``flush_cache`` of the request.
            last: whether this is the last bucket of the sync.
        """

    def _end(self, session: Session, version: str) -> None:
        """Finish after the last bucket."""
        session.request("/end_weight_update", {})

    def _allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
