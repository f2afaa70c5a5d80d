"""Route ``distributed``: broadcast to all ranks of all servers, over NCCL or gloo.

One rank of each pipeline stage sends the tensors of its stage. Without stages rank 0 sends all.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from datetime import timedelta
from typing import Any

import httpx
import torch
import torch.distributed as dist
from torch import Tensor

from ....config import WeightSyncConfig
from ....distributed import rank
from ..servers import Server, address_towards
from .buckets import Bucket
from .route import INCOMPLETE, Sent, StagedWeights, WeightSync
from .session import BEST_EFFORT_TIMEOUT_S, Session, SyncError
from .turns import Turn, Turns

_CONNECTION_ERRORS = ("Failed to receive weights", "Failed to initialize custom process group")
"""SGLang's messages for an error in the group's communication, which another member may have caused."""


class BroadcastSync(WeightSync):
    """Broadcast every bucket over a process group of the sender and the servers' ranks.

    Each sender has a group of its own, and keeps it between syncs while its members stay the same. When a
    server fails during a broadcast, the other servers wait for data or for that server. The sender then
    closes its connections, which ends their waits, forms a new group without the failed server and sends the
    bucket again. This recovery was tested with gloo, not with NCCL.
    """

    def __init__(self, cfg: WeightSyncConfig, device: torch.device, quantized: bool) -> None:
        super().__init__(cfg, device, quantized)
        self._members: tuple[Server, ...] = ()
        self._name = self._version = ""
        self._store: dist.Store | None = None
        self._group: Any = None
        self._turns: Turns | None = None
        self._is_checked = False  # whether the group's members are known to be alive since the sync began

    def close(self) -> None:
        if self._members:
            session = Session(self._members, BEST_EFFORT_TIMEOUT_S)
            self._disband(session)
            session.finish()
        if self._turns:
            self._turns.close()

    def _share_of(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        staged = weights if isinstance(weights, StagedWeights) else None
        senders = staged.senders if staged else [0]
        if self._turns is None or self._turns.senders != senders:
            # a sender waits for one bucket of each other sender, for which a server may get four requests
            self._turns = Turns(senders, 4 * len(senders) * self._cfg.timeout_s)
        return staged.of_stage() if staged else weights

    def _total(self, nbytes: list[int]) -> int:
        return sum(nbytes)  # each sender has tensors of its own

    def _led(self, servers: Sequence[Server]) -> list[Server]:
        assert self._turns
        return list(servers) if self._turns.is_sender else []

    def _lead(self, session: Session, tensors: Iterator[tuple[str, Tensor]], version: str) -> Sent:
        assert self._turns
        self._turns.join()
        self._is_checked = False
        try:
            return super()._lead(session, tensors, version)
        finally:
            self._turns.leave()

    def _open(self, session: Session, version: str) -> None:
        assert self._turns
        if self._turns.is_first:
            super()._open(session, version)

    def _conclude(self, session: Session, version: str) -> dict[Server, str]:
        assert self._turns
        self._version = version
        if (turn := self._turns.leave()) is None:
            return {}
        _drop(session, turn.failed)
        if turn.is_over:
            session.servers.clear()  # their weights are a mix of old and new weights
            return {}
        return super()._conclude(session, version)

    def _send(self, session: Session, payload: Bucket, fields: dict[str, Any], last: bool) -> None:
        assert self._turns
        if self._turns.is_over:
            return
        with self._turns.turn(last=last) as turn:
            if self._turns.is_first and not self._is_checked:
                turn.versions = {
                    reply.json()["weight_version"] for reply in session.request("/model_info").values()
                }
            self._check_group(session, turn)
            if not (last and turn.waiting == [rank()]):
                fields = {"weight_version": INCOMPLETE, "flush_cache": False}
            if not turn.is_over:
                self._send_bucket(session, payload, fields)
            turn.failed, turn.is_over = session.failed, turn.is_over or session.problem is not None

    def _check_group(self, session: Session, turn: Turn) -> None:
        """Leave a group that has lost a member."""
        _drop(session, turn.failed)
        is_lost = not set(self._members) <= set(session.servers)
        # another version means that a server restarted since the last sync and left the group
        if not self._is_checked:
            is_lost |= (self._members, {self._version}) != (tuple(session.servers), turn.versions)
        if is_lost:
            self._disband(session)
        self._is_checked = True

    def _send_bucket(self, session: Session, payload: Bucket, fields: dict[str, Any]) -> None:
        body = {
            "names": [name for name, *_ in payload.contents],
            "dtypes": [str(dtype).removeprefix("torch.") for _, dtype, *_ in payload.contents],
            "shapes": [list(shape) for _, _, shape, _ in payload.contents],
            "load_format": "flattened_bucket",
            **fields,
        }
        while session.servers:
            if not self._members and not self._connect(session):
                continue
            replies = session.send("/update_weights_from_distributed", {"group_name": self._name, **body})
            if self._all_succeed(session, session.submit(self._broadcast, payload.data), replies):
                return

    def _connect(self, session: Session) -> bool:
        """Form a group of this rank and the servers' ranks, as SGLang's ``init_custom_process_group`` does.

        Source: srt/utils/common.py of SGLang. Returns whether all members joined.
        """
        address = _address_for(session.servers)
        listener = socket.create_server((address, 0))
        port = listener.getsockname()[1]
        # the group uses a second store, a client, so that this store can be closed while the group waits
        # for members
        self._store = dist.TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self._members, self._name = tuple(session.servers), f"weights-{uuid.uuid4().hex[:8]}"
        first_ranks, size = {}, 1
        for server in self._members:
            first_ranks[server] = size
            size += server.tensor_parallel_size
        replies = session.send(
            "/init_weights_update_group",
            lambda server: {
                "master_address": address,
                "master_port": port,
                "rank_offset": first_ranks[server],
                "world_size": size,
                "group_name": self._name,
                "backend": "nccl" if self._device.type == "cuda" else "gloo",
            },
        )
        return self._all_succeed(session, session.submit(self._join, address, port, size), replies)

    def _join(self, address: str, port: int, size: int) -> None:
        timeout = timedelta(seconds=self._cfg.timeout_s)
        store: dist.Store = dist.TCPStore(address, port, timeout=timeout, wait_for_workers=False)
        # torch's _new_process_group_helper adds the last two prefixes in the servers
        for prefix in (self._name, f"{self._name}/", f"{self._device.type}/"):
            store = dist.PrefixStore(prefix, store)
        try:
            if self._device.type == "cuda":
                options = dist.ProcessGroupNCCL.Options()  # pyright: ignore[reportAttributeAccessIssue]
                options._timeout = timeout
                make_nccl = dist.ProcessGroupNCCL  # pyright: ignore[reportAttributeAccessIssue]
                self._group = make_nccl(store, 0, size, options)
            else:
                options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
                options._timeout = timeout
                options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
                self._group = dist.ProcessGroupGloo(store, 0, size, options)
        except RuntimeError as error:
            raise SyncError(str(error)) from None

    def _broadcast(self, data: Tensor) -> None:
        try:
            # no local variable for the work object: a traceback would keep it and its connections
            self._group.broadcast(data, 0).wait()
        except RuntimeError as error:
            raise SyncError(str(error)) from None

    def _all_succeed(
        self, session: Session, ours: Future[None], replies: dict[Server, Future[httpx.Response]]
    ) -> bool:
        """Wait for a joint step of this process and all servers; return whether it succeeded everywhere.

        After a failure the group is closed on all members, and the servers that caused the failure are
        dropped.
        """
        everything: list[Future[Any]] = [ours, *replies.values()]
        wait(everything, return_when=FIRST_EXCEPTION)
        failed = [server for server, reply in replies.items() if reply.done() and reply.exception()]
        if not failed and not (ours.done() and ours.exception()):
            return True
        self._close_group(session, ours, failed)
        errors = {server: reply.exception() for server, reply in replies.items()}
        errors = {server: error for server, error in errors.items() if error}
        culprits = {
            server: error
            for server, error in errors.items()
            if not any(words in str(error) for words in _CONNECTION_ERRORS)
        }
        for server, error in (culprits or errors or dict.fromkeys(replies, "is not connected")).items():
            session.drop(server, error)
        self._destroy_group_on(session.servers, session)
        return False

    def _close_group(self, session: Session, ours: Future[None], failed: list[Server]) -> None:
        """Close this process's end of the group, so that no member waits any longer."""
        self._destroy_group_on(failed, session)  # ends our broadcast to them
        if self._group:
            self._group.abort()
        self._store = None  # ends the wait of members that are still joining
        wait([ours])
        self._group, self._members = None, ()  # ends the wait of members that are receiving

    def _disband(self, session: Session) -> None:
        self._destroy_group_on(self._members, session)
        self._group = self._store = None
        self._members = ()

    def _destroy_group_on(self, servers: Iterable[Server], session: Session) -> None:
        session.attempt(servers, ("/destroy_weights_update_group", {"group_name": self._name}))


def _drop(session: Session, servers: Iterable[Server]) -> None:
    for server in servers:
        if server in session.servers:
            session.drop(server, "failed while another rank sent to it")


def _address_for(servers: Iterable[Server]) -> str:
    """Return this machine's address as the servers see it: loopback only when all servers run here."""
    for server in servers:
        address = address_towards(httpx.URL(server.url).host)
        if not address.startswith("127."):
            return address
    return "127.0.0.1"
