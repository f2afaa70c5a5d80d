"""Weights from the trainer to SGLang servers: through a folder, a process group, or memory that both map.

Every rank runs the policy's export, which is collective; the first one packs the tensors into buckets and speaks to the servers. While they
load one bucket it packs the next. The requests are those of SGLang 0.5.23 (sglang/srt/entrypoints/http_server.py).
"""

from __future__ import annotations

import base64
import io
import logging
import math
import os
import re
import shutil
import socket
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Protocol

import httpx
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from ....config import WeightSyncConfig
from ....distributed import all_gather_objects, broadcast_object, rank
from ....errors import InputError, NonFiniteError, RunError, ServerError
from ....models import fp8_blocks
from ....weights.safetensors_folder import SafetensorsFile
from ..servers import Server, address_towards
from .buckets import Bucket
from .session import FAREWELL_TIMEOUT_S, NoAnswerError, Session, SyncError

log = logging.getLogger(__name__)

INCOMPLETE = "incomplete"
"""Weight version of a server between the first and the last bucket: whatever it generates then belongs to no version."""
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class SyncReport:
    """What a sync did; equal on all ranks.

    Attributes:
        nbytes: size of the weights, counted once however many servers took them.
        seconds: from the first request to the last.
        failed: servers that refused, died or did not answer in time. They have weights of no version, or the ones they had.
    """

    nbytes: int
    seconds: float
    failed: tuple[Server, ...]


class WeightSync(Protocol):
    def update(
        self, servers: Sequence[Server], named_tensors: Iterable[tuple[str, Tensor]], version: str
    ) -> SyncReport:
        """Gives the servers new weights under the name ``version``. Collective: every rank iterates ``named_tensors`` to its end.

        Requests that a server is working on stop meanwhile, and go on as ``weight_sync.in_flight`` says.

        Args:
            servers: whom to update; looked at on the first rank only.
            named_tensors: the policy's export, under the names of its Hugging Face checkpoint. A server keeps its own dtype: fp32 tensors
                are rounded as it loads them. With quantisation, linear weights leave here in block-wise FP8 (see ``models.fp8_blocks``).
            version: what the servers call these weights in ``meta_info.weight_version`` from then on.

        Raises:
            InputError: no retry can mend it: a key that is refused, a folder that cannot be written, a tensor that the servers ignore.
                On every rank.
            NonFiniteError: a weight to be quantised is NaN or infinite. On every rank.
        """
        ...

    def close(self) -> None:
        """Removes what the syncs left in folders and process groups."""
        ...


def make_weight_sync(
    cfg: WeightSyncConfig,
    placement: Literal["disaggregated", "colocated"],
    device: torch.device,
    run_dir: Path,
    *,
    quantized: bool = False,
) -> WeightSync:
    """The route of ``cfg``; ``device`` is this rank's.

    Args:
        quantized: send block-wise FP8 to servers that were started for it.

    Raises:
        InputError: a route that cannot serve ``placement`` on GPUs.
    """
    if device.type == "cuda" and cfg.route == "tensor" and placement != "colocated":
        raise InputError(
            "weight_sync.route = 'tensor' needs rollout.placement = 'colocated': servers elsewhere cannot map a GPU's memory"
        )
    if device.type == "cuda" and cfg.route == "distributed" and placement == "colocated":
        raise InputError(
            "weight_sync.route = 'distributed' needs rollout.placement = 'disaggregated': NCCL wants one rank a GPU"
        )
    if cfg.route == "disk":
        base = Path(cfg.folder, *run_dir.absolute().parts[1:]) if cfg.folder else run_dir
        return _DiskSync(cfg, base / "weight_sync", quantized)
    if cfg.route == "distributed":
        return _DistributedSync(cfg, device, quantized)
    return (
        _CudaTensorSync(cfg, device, quantized)
        if device.type == "cuda"
        else _SharedMemorySync(cfg, device, quantized)
    )


def release_memory(servers: Sequence[Server], timeout_s: float) -> None:
    """Makes idle servers give back the memory of weights and cache; one that is not idle does not survive it.

    A server that has gone, or has not been synced since it started, is passed over.

    Raises:
        ServerError: a server refuses.
    """
    _answers(
        _synced(servers, timeout_s),
        "/release_memory_occupation",
        {"tags": ["kv_cache", "weights"]},
        timeout_s,
    )


def resume_memory(
    servers: Sequence[Server], tags: Sequence[Literal["weights", "kv_cache"]], timeout_s: float
) -> tuple[Server, ...]:
    """Makes servers take again what ``release_memory`` took; the weights' values are lost.

    Returns:
        Those that had released it: not the ones that have started since. Only these may resume further tags after a sync.

    Raises:
        ServerError: a server refuses.
    """
    asleep = _synced(servers, timeout_s)
    _answers(asleep, "/resume_memory_occupation", {"tags": list(tags)}, timeout_s)
    return asleep


def _synced(servers: Sequence[Server], timeout_s: float) -> tuple[Server, ...]:
    """Those with weights from a sync; the others still have what they started with."""
    replies = _answers(servers, "/model_info", None, timeout_s)
    return tuple(server for server, reply in replies.items() if reply.json()["weight_version"] != "default")


def _answers(
    servers: Sequence[Server], path: str, body: dict[str, Any] | None, timeout_s: float
) -> dict[Server, httpx.Response]:
    session = Session(servers, timeout_s)
    answers = {}
    try:
        for server, reply in session.start(path, body).items():
            try:
                answers[server] = reply.result()
            except NoAnswerError as error:
                log.warning("SGLang server %s %s", server.url, error)
            except SyncError as error:
                raise ServerError(f"SGLang server {server.url} {error}") from None
    finally:
        session.release()
    return answers


class _Route(ABC):
    """What the routes share: the buckets, and the course of a sync."""

    def __init__(self, cfg: WeightSyncConfig, device: torch.device, quantized: bool) -> None:
        self._cfg, self._device, self._quantized = cfg, device, quantized
        self._capacity = cfg.bucket_bytes // 2  # one bucket is packed while another is on its way
        self._buffers: list[Tensor] = []
        self._noise: dict[Server, list[dict[str, str]]] = {}
        self._verified: tuple[str, dict[int, list[Any]]] = ("", {})

    @torch.no_grad()
    def update(
        self, servers: Sequence[Server], named_tensors: Iterable[tuple[str, Tensor]], version: str
    ) -> SyncReport:
        tensors = iter(named_tensors)
        outcome = None
        try:
            outcome = self._lead(servers, tensors, version) if rank() == 0 else self._follow(tensors)
        except (InputError, NonFiniteError) as error:  # raised on every rank, once all have come to the end
            outcome = error
        for _ in tensors:
            pass
        outcome = broadcast_object(outcome)
        if isinstance(outcome, RunError):
            raise outcome
        return outcome

    def close(self) -> None:
        return

    def _lead(
        self, servers: Sequence[Server], tensors: Iterator[tuple[str, Tensor]], version: str
    ) -> SyncReport:
        started = time.monotonic()
        nbytes = 0
        session = Session(servers, self._cfg.timeout_s)
        try:
            working = session.run(self._open, session, version)
            for bucket, last in self._buckets(tensors):
                working.result()
                about = {
                    "weight_version": version if last else INCOMPLETE,
                    "flush_cache": last and self._cfg.in_flight != "in_place",
                }
                working = session.run(self._send, session, self._seal(bucket), about, last)
                nbytes += bucket.nbytes
            working.result()
            self._conclude(session, version)
        finally:
            session.close()
        if session.problem:
            raise session.problem
        return SyncReport(nbytes, time.monotonic() - started, session.failed)

    def _open(self, session: Session, version: str) -> None:
        session.ask("/pause_generation", {"mode": self._cfg.in_flight})
        self._noise = self._scramble(session) if self._cfg.verify else {}
        self._begin(session, version)

    def _conclude(self, session: Session, version: str) -> None:
        self._end(session, version)
        if self._cfg.in_flight == "in_place":
            session.attempt(
                session.servers, ("/flush_cache", {})
            )  # refused while unfinished responses need the cache
        for server, reply in session.ask("/model_info").items():
            if reply.json()["weight_version"] != version:
                session.drop(
                    server, f"has weights {reply.json()['weight_version']!r} after the sync, not {version!r}"
                )
        if self._cfg.verify:
            self._verify(session, version)
        session.ask("/continue_generation", {})

    def _follow(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """What the other ranks do beside iterating."""
        return

    def _begin(self, session: Session, version: str) -> None:
        session.ask("/begin_weight_update", {})

    def _seal(self, bucket: Bucket) -> Any:
        """What ``_send`` gets of a bucket; called where all ranks are in step."""
        return bucket

    @abstractmethod
    def _send(self, session: Session, bucket: Any, about: dict[str, Any], last: bool) -> None:
        """Brings a bucket to the servers, in a thread. It is packed again two buckets later."""

    def _end(self, session: Session, version: str) -> None:
        session.ask("/end_weight_update", {})

    def _allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def _buckets(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[Bucket, bool]]:
        """Full buckets, and whether each is the last. What is too large for a bucket is one by itself."""
        bucket, count = None, 0
        for unit in _loaded_together(tensors):
            if self._quantized:
                unit = sorted(
                    fp8_blocks.quantize_all(unit), key=lambda named: -named[1].itemsize
                )  # so that each is aligned
            if bucket is None or not bucket.takes(tensor for _, tensor in unit):
                if bucket:
                    yield bucket, False
                bucket = Bucket(self._buffer(count, sum(tensor.nbytes for _, tensor in unit)))
                count += 1
            for name, tensor in unit:
                bucket.add(name, tensor)
        if bucket:
            yield bucket, True

    def _buffer(self, count: int, nbytes: int) -> Tensor:
        """Memory for the bucket that comes after ``count`` others: two buffers in turn, which later syncs find warm."""
        if nbytes > self._capacity:
            return self._allocate(nbytes)
        while len(self._buffers) <= count % 2:  # a large bucket before this one took none
            self._buffers.append(self._allocate(self._capacity))
        return self._buffers[count % 2]

    def _scramble(self, session: Session) -> dict[Server, list[dict[str, str]]]:
        """Fills the servers' weights with noise, whose checksums are returned."""
        session.ask("/weights_checker", {"action": "reset_tensors"})
        return _checksums(session)

    def _verify(self, session: Session, version: str) -> None:
        """Every weight must have been replaced, and servers of one layout must agree: among themselves, and with those that took part in
        an earlier sync of this version."""
        checksums = _checksums(session)
        for server, ranks in checksums.items():
            same = {
                name
                for before, after in zip(self._noise[server], ranks, strict=True)
                for name in after
                if after[name] == before[name]
            }
            if same:
                names = ", ".join(sorted(same)[:8])
                problem = f"weight sync: {len(same)} weights of {server.url} are not among the tensors sent, or were ignored: {names}"
                return session.drop(server, InputError(problem))
        if self._verified[0] != version:
            self._verified = (version, {})
        for size in {server.tensor_parallel_size for server in checksums}:
            alike = {
                server: ranks for server, ranks in checksums.items() if server.tensor_parallel_size == size
            }
            agreed = self._verified[1].get(size) or _majority(list(alike.values()))
            for server in [server for server, ranks in alike.items() if ranks != agreed]:
                session.drop(server, "has other weights than its peers after the sync")
            if agreed:
                self._verified[1][size] = agreed


def _checksums(session: Session) -> dict[Server, list[dict[str, str]]]:
    """Checksum of every weight by the server's own name, for each tensor-parallel rank."""
    replies = session.ask("/weights_checker", {"action": "checksum"})
    return {
        server: [rank["checksums"] for rank in reply.json()["ranks"]] for server, reply in replies.items()
    }


def _loaded_together(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """The tensors one by one, but for two of latent attention. SGLang makes one parameter of those, and passes over either of them in a
    request that does not have both (models/deepseek_common/deepseek_weight_loader.py)."""
    waiting: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors:
        layer, *halves = re.split(r"\.(?:q_a_proj|kv_a_proj_with_mqa)\.", name)
        unit = [*waiting.pop(layer, []), (name, tensor)]
        if halves and len(unit) == 1:
            waiting[layer] = unit
        else:
            yield unit
    yield from waiting.values()  # of a model without a low rank for queries


def _majority(items: list[Any]) -> Any:
    """What more than half of the items are equal to, or None."""
    return next((item for item in items if 2 * items.count(item) > len(items)), None)


class _DiskSync(_Route):
    """A safetensors folder that both sides see under one name; a bucket is a file of it."""

    def __init__(self, cfg: WeightSyncConfig, folder: Path, quantized: bool) -> None:
        super().__init__(cfg, torch.device("cpu"), quantized)
        self._folder = folder.absolute()
        self._draft = self._current = self._folder / "none"
        self._files = 0

    def close(self) -> None:
        for folder in (self._draft, self._current):
            shutil.rmtree(folder, ignore_errors=True)

    def _begin(self, session: Session, version: str) -> None:
        with self._writing():
            for left in set(self._folder.glob("*")) - {
                self._current
            }:  # by a sync that broke off, or a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            self._draft, self._files = self._folder / f"{version}.incomplete", 0
            self._draft.mkdir(parents=True)

    def _send(self, session: Session, bucket: Bucket, about: dict[str, Any], last: bool) -> None:
        with self._writing():
            self._files += 1
            path = self._draft / f"model-{self._files:05}.safetensors"
            with SafetensorsFile(
                path, [(name, dtype, tuple(shape)) for name, dtype, shape, _ in bucket.contents]
            ) as file:
                for name, tensor in bucket.named_tensors():
                    file.write(name, tensor)
            if not last:
                return
            whole = self._folder / about["weight_version"]
            shutil.rmtree(whole, ignore_errors=True)
            self._draft.rename(whole)
        session.ask(
            "/update_weights_from_disk", {"model_path": str(whole), "load_format": "safetensors", **about}
        )

    def _end(self, session: Session, version: str) -> None:
        previous, self._current = self._current, self._folder / version
        if previous != self._current:
            shutil.rmtree(previous, ignore_errors=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"weight_sync.folder = {str(self._folder)!r} cannot be written ({error}): name another folder"
            ) from None


class _DistributedSync(_Route):
    """A broadcast from the first rank to all ranks of all servers, over NCCL or gloo.

    The group lasts from sync to sync, as long as its members do. When a server fails in the middle of a broadcast, the others wait for
    data or for that server. They are let go by closing our end, and join a new group without it, which gets the bucket again. What NCCL
    does has not been run.
    """

    _CONNECTION_WORDS = ("Failed to receive weights", "Failed to initialize custom process group")

    def __init__(self, cfg: WeightSyncConfig, device: torch.device, quantized: bool) -> None:
        super().__init__(cfg, device, quantized)
        self._members: tuple[Server, ...] = ()
        self._name = self._version = ""
        self._store: dist.Store | None = None
        self._group: Any = None

    def close(self) -> None:
        if self._members:
            session = Session(self._members, FAREWELL_TIMEOUT_S)
            self._disband(session)
            session.close()

    def _begin(self, session: Session, version: str) -> None:
        super()._begin(session, version)
        versions = {reply.json()["weight_version"] for reply in session.ask("/model_info").values()}
        if (self._members, {self._version}) != (
            tuple(session.servers),
            versions,
        ):  # one more, one less, or one that was restarted
            self._disband(session)

    def _end(self, session: Session, version: str) -> None:
        self._version = version
        super()._end(session, version)

    def _send(self, session: Session, bucket: Bucket, about: dict[str, Any], last: bool) -> None:
        body = {
            "names": [name for name, *_ in bucket.contents],
            "dtypes": [str(dtype).removeprefix("torch.") for _, dtype, *_ in bucket.contents],
            "shapes": [list(shape) for _, _, shape, _ in bucket.contents],
            "load_format": "flattened_bucket",
            **about,
        }
        while session.servers:
            if not self._members and not self._connect(session):
                continue
            replies = session.start("/update_weights_from_distributed", {"group_name": self._name, **body})
            if self._agreed(session, session.run(self._broadcast, bucket.data), replies):
                return

    def _connect(self, session: Session) -> bool:
        """Makes a group of this process and the servers' ranks, as SGLang's ``init_custom_process_group`` does (srt/utils/common.py)."""
        address = _address_for(session.servers)
        listener = socket.create_server((address, 0))
        port = listener.getsockname()[1]
        # the group has a store of its own, a client, so that this one can be closed while the group still waits for members
        self._store = dist.TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self._members, self._name = tuple(session.servers), f"weights-{uuid.uuid4().hex[:8]}"
        first_ranks, size = {}, 1
        for server in self._members:
            first_ranks[server] = size
            size += server.tensor_parallel_size
        replies = session.start(
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
        return self._agreed(session, session.run(self._join, address, port, size), replies)

    def _join(self, address: str, port: int, size: int) -> None:
        timeout = timedelta(seconds=self._cfg.timeout_s)
        store: dist.Store = dist.TCPStore(address, port, timeout=timeout, wait_for_workers=False)
        for prefix in (
            self._name,
            f"{self._name}/",
            f"{self._device.type}/",
        ):  # torch's _new_process_group_helper adds the last two
            store = dist.PrefixStore(prefix, store)
        try:
            if self._device.type == "cuda":
                options = dist.ProcessGroupNCCL.Options()  # pyright: ignore[reportAttributeAccessIssue]
                options._timeout = timeout
                self._group = dist.ProcessGroupNCCL(store, 0, size, options)  # pyright: ignore[reportAttributeAccessIssue]
            else:
                options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
                options._timeout = timeout
                options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
                self._group = dist.ProcessGroupGloo(store, 0, size, options)
        except RuntimeError as error:
            raise SyncError(str(error)) from None

    def _broadcast(self, data: Tensor) -> None:
        try:
            self._group.broadcast(
                data, 0
            ).wait()  # no variable: an exception would keep it, and with it the connections
        except RuntimeError as error:
            raise SyncError(str(error)) from None

    def _agreed(
        self, session: Session, ours: Future[None], replies: dict[Server, Future[httpx.Response]]
    ) -> bool:
        """Waits for what this process and all servers do together. If one fails it ends it for all, and drops who is to blame."""
        everything: list[Future[Any]] = [ours, *replies.values()]
        wait(everything, return_when=FIRST_EXCEPTION)
        failed = [server for server, reply in replies.items() if reply.done() and reply.exception()]
        if not failed and not (ours.done() and ours.exception()):
            return True
        session.attempt(
            failed, ("/destroy_weights_update_group", {"group_name": self._name})
        )  # ends our broadcast to them
        if self._group:
            self._group.abort()
        self._store = None  # ends the waits of those that still join
        wait([ours])
        self._group, self._members = None, ()  # ends the waits of those that receive
        errors = {server: reply.exception() for server, reply in replies.items()}
        errors = {server: error for server, error in errors.items() if error}
        to_blame = {
            server: error
            for server, error in errors.items()
            if not any(word in str(error) for word in self._CONNECTION_WORDS)
        }
        for server, error in (to_blame or errors or dict.fromkeys(replies, "is not connected")).items():
            session.drop(server, error)
        session.attempt(session.servers, ("/destroy_weights_update_group", {"group_name": self._name}))
        return False

    def _disband(self, session: Session) -> None:
        session.attempt(self._members, ("/destroy_weights_update_group", {"group_name": self._name}))
        self._group = self._store = None
        self._members = ()


def _address_for(servers: Iterable[Server]) -> str:
    """This machine's address as the servers see it: loopback only when all of them are here."""
    for server in servers:
        address = address_towards(httpx.URL(server.url).host)
        if not address.startswith("127."):
            return address
    return "127.0.0.1"


class _TensorSync(_Route):
    """Handles of memory that the servers map: only these cross HTTP.

    SGLang's ``MultiprocessingSerializer`` is torch's pickling for other processes. ``update_weights_from_tensor`` reads a
    ``flattened_bucket`` by its attributes (srt/model_executor/model_runner_components/weight_updater.py), so plain namespaces do.
    """

    def _send(self, session: Session, bucket: Any, about: dict[str, Any], last: bool) -> None:
        handles = {server: self._handles(bucket, server) for server in session.servers}
        session.ask(
            "/update_weights_from_tensor",
            lambda server: {
                "serialized_named_tensors": handles[server],
                "load_format": "flattened_bucket",
                **about,
            },
        )

    @abstractmethod
    def _handles(self, bucket: Any, server: Server) -> list[str]:
        """One for each rank of the server."""


class _SharedMemorySync(_TensorSync):
    """The first rank's buckets lie in /dev/shm, where every server of this machine maps them."""

    def _allocate(self, nbytes: int) -> Tensor:
        free = shutil.disk_usage(_SHARED_MEMORY).free
        if nbytes > free:
            raise InputError(
                f"weight_sync.bucket_bytes = {self._cfg.bucket_bytes} needs {nbytes} bytes in {_SHARED_MEMORY}, where {free} are free: "
                "lower it, enlarge that file system, or use another weight_sync.route"
            )
        with _sharing_by_name(), _stderr_to_nowhere():
            return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(nbytes))

    def _handles(self, bucket: Bucket, server: Server) -> list[str]:
        with _sharing_by_name():
            return [
                _serialize(bucket) for _ in range(server.tensor_parallel_size)
            ]  # each is read once, and counts as a reader


class _CudaTensorSync(_TensorSync):
    """CUDA IPC handles of each trainer rank's buckets for the server rank on its GPU. (Not run on a GPU yet.)

    The servers' ranks, in the order of the first sync's servers, lie on the GPUs of the trainer's ranks 0, 1, 2, and so on.
    """

    def __init__(self, cfg: WeightSyncConfig, device: torch.device, quantized: bool) -> None:
        super().__init__(cfg, device, quantized)
        self._places: dict[Server, int] = {}
        self._is_read = False

    def update(
        self, servers: Sequence[Server], named_tensors: Iterable[tuple[str, Tensor]], version: str
    ) -> SyncReport:
        for server in servers:
            self._places.setdefault(server, sum(s.tensor_parallel_size for s in self._places))
        read = [
            range(self._places[server], self._places[server] + server.tensor_parallel_size)
            for server in servers
        ]
        self._is_read = any(rank() in ranks for ranks in broadcast_object(read))
        return super().update(servers, named_tensors, version)

    def _follow(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        for bucket, _ in self._buckets(tensors):
            self._seal(bucket)

    def _buffer(self, count: int, nbytes: int) -> Tensor:
        return self._allocate(
            max(nbytes, self._capacity)
        )  # torch frees it once the last reader has let it go

    def _seal(self, bucket: Bucket) -> list[str]:
        return all_gather_objects(
            _serialize(bucket) if self._is_read else ""
        )  # what nobody opens would never be freed

    def _handles(self, bucket: list[str], server: Server) -> list[str]:
        place = self._places[server]
        return bucket[place : place + server.tensor_parallel_size]


class _Pickler(ForkingPickler):
    def reducer_override(self, obj: Any) -> Any:
        """Names GPUs by their UUID, since a server may count them differently; as SGLang does (srt/utils/patch_torch.py)."""
        if not (isinstance(obj, Tensor) and obj.is_cuda):
            return NotImplemented
        rebuild, args = reduce_tensor(obj)
        uuid = str(torch.cuda.get_device_properties(obj.device).uuid)
        return rebuild, (*args[:6], uuid, *args[7:])  # the seventh argument is the device


def _serialize(bucket: Bucket) -> str:
    metadata = [
        SimpleNamespace(
            name=name, shape=shape, dtype=dtype, start_idx=start, end_idx=start + size, numel=size
        )
        for name, dtype, shape, start in bucket.contents
        for size in [math.prod(shape) * dtype.itemsize]
    ]
    file = io.BytesIO()
    _Pickler(file).dump({"flattened_tensor": bucket.data, "metadata": metadata})
    return base64.b64encode(file.getvalue()).decode()


@contextmanager
def _sharing_by_name() -> Iterator[None]:
    """CPU memory is shared by file name: a process that is no relative cannot get a file descriptor."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


@contextmanager
def _stderr_to_nowhere() -> Iterator[None]:
    """The first shared file starts torch_shm_manager, which keeps the stderr of that moment for as long as a server runs: a pipe behind the
    trainer would not end with the trainer."""
    stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
