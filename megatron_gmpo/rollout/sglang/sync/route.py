"""The steps of a weight sync that all routes share.

Every rank iterates the policy's export, which is collective. Rank 0 packs the tensors into buckets and sends
requests to the servers. It packs the next bucket while the servers load the current bucket. The requests
follow the API of SGLang 0.5.23 (sglang/srt/entrypoints/http_server.py).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....config import WeightSyncConfig
from ....distributed import broadcast_object, rank
from ....errors import InputError, NonFiniteError, RunError
from ..servers import Server
from .buckets import Bucket, BucketPacker
from .session import Session
from .verification import Verification

INCOMPLETE = "incomplete"
"""Weight version of a server between the first and the last bucket.

Tokens with this version belong to no policy version."""


@dataclass(frozen=True)
class SyncReport:
    """The outcome of a sync, equal on all ranks.

    Attributes:
        nbytes: size of the weights, counted once for any number of servers.
        seconds: from the first request to the last.
        failed: servers that refused a request, died or timed out. Their weights are a mix of old and new
            weights, or the old weights.
    """

    nbytes: int
    seconds: float
    failed: tuple[Server, ...]


class WeightSync(ABC):
    """Send weights from the trainer to SGLang servers. Each subclass implements one route.

    Args:
        cfg: the ``weight_sync`` section.
        device: device on which the buckets are packed.
        quantized: send linear weights in block-wise FP8.
        reuse_buffers: see ``BucketPacker``.
    """

    def __init__(
        self, cfg: WeightSyncConfig, device: torch.device, quantized: bool, *, reuse_buffers: bool = True
    ) -> None:
        self._cfg, self._device = cfg, device
        # half of bucket_bytes, because one bucket is packed while another is sent
        self._packer = BucketPacker(
            cfg.bucket_bytes // 2, self._allocate, quantized=quantized, reuse_buffers=reuse_buffers
        )
        self._verification = Verification() if cfg.verify else None

    @torch.no_grad()
    def update(
        self, servers: Sequence[Server], named_tensors: Iterable[tuple[str, Tensor]], version: str
    ) -> SyncReport:
        """Load new weights into the servers. Collective: every rank iterates ``named_tensors`` to its end.

        The servers pause generation during the sync. ``weight_sync.in_flight`` determines how unfinished
        requests continue.

        Args:
            servers: the servers to update; only rank 0's value is used.
            named_tensors: the policy's export, by Hugging Face names. A server keeps its own dtype and rounds
                fp32 tensors when it loads them. With ``quantized``, linear weights are sent in block-wise FP8
                (``models.fp8_blocks``).
            version: version that the servers report as ``meta_info.weight_version`` after the sync.

        Raises:
            InputError: on every rank, for an error that a retry cannot fix: a refused API key, a folder that
                is not writable, a tensor that the servers ignore.
            NonFiniteError: on every rank, when a weight to be quantized is NaN or infinite.
        """
        tensors = iter(named_tensors)
        outcome = None
        try:
            outcome = self._lead(servers, tensors, version) if rank() == 0 else self._follow(tensors)
        except (InputError, NonFiniteError) as error:
            outcome = error
        for _ in tensors:  # the export is collective: the other ranks wait in it after an error on one rank
            pass
        outcome = broadcast_object(outcome)
        if isinstance(outcome, RunError):
            raise outcome
        return outcome

    def close(self) -> None:
        """Remove folders and process groups that the syncs created."""
        return

    def _lead(
        self, servers: Sequence[Server], tensors: Iterator[tuple[str, Tensor]], version: str
    ) -> SyncReport:
        """Run the sync on rank 0."""
        started = time.monotonic()
        nbytes = 0
        session = Session(servers, self._cfg.timeout_s)
        try:
            pending = session.submit(self._open, session, version)
            for bucket, last in self._packer.pack(tensors):
                pending.result()
                fields = {
                    "weight_version": version if last else INCOMPLETE,
                    "flush_cache": last and self._cfg.in_flight != "in_place",
                }
                pending = session.submit(self._send, session, self._payload(bucket), fields, last)
                nbytes += bucket.nbytes
            pending.result()
            self._conclude(session, version)
        finally:
            session.finish()
        if session.problem:
            raise session.problem
        return SyncReport(nbytes, time.monotonic() - started, session.failed)

    def _follow(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Take part in the sync on another rank; the caller iterates the remaining tensors."""
        return

    def _open(self, session: Session, version: str) -> None:
        session.request("/pause_generation", {"mode": self._cfg.in_flight})
        if self._verification:
            self._verification.scramble(session)
        self._begin(session, version)

    def _conclude(self, session: Session, version: str) -> None:
        self._end(session, version)
        if self._cfg.in_flight == "in_place":
            # the server refuses while unfinished requests use the cache
            session.attempt(session.servers, ("/flush_cache", {}))
        for server, reply in session.request("/model_info").items():
            if (found := reply.json()["weight_version"]) != version:
                session.drop(server, f"has weights {found!r} after the sync, not {version!r}")
        if self._verification:
            self._verification.check(session, version)
        session.request("/continue_generation", {})

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
