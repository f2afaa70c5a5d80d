"""Route ``tensor``: servers map the buckets of their own node's ranks. HTTP carries only handles.

On CPU the buckets are POSIX shared memory, on a GPU they are CUDA IPC memory.
"""

from __future__ import annotations

import base64
import math
import os
import shutil
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from ....config import WeightSyncConfig
from ....distributed import Nodes, rank
from ....errors import InputError
from ..servers import Server
from .buckets import Bucket
from .places import check_places
from .route import SyncReport, WeightSync
from .session import Session

_SHARED_MEMORY = Path("/dev/shm")

Metadata = list[SimpleNamespace]


class _SharedBucketSync(WeightSync):
    """Send serialized handles of the buckets with ``/update_weights_from_tensor``.

    The first rank of each node sends requests to the servers of its node. All nodes send in parallel.
    """

    def __init__(
        self,
        cfg: WeightSyncConfig,
        device: torch.device,
        quantized: bool,
        nodes: Nodes,
        *,
        reuse_buffers: bool,
    ) -> None:
        super().__init__(cfg, device, quantized, reuse_buffers=reuse_buffers)
        self._nodes = nodes

    def _led(self, servers: Sequence[Server]) -> list[Server]:
        return self._here(servers) if self._nodes.is_leader else []

    def _here(self, servers: Sequence[Server]) -> list[Server]:
        return [server for server in servers if server.node == self._nodes.name]

    def _send(self, session: Session, payload: Any, fields: dict[str, Any], last: bool) -> None:
        session.request(
            "/update_weights_from_tensor",
            lambda server: {
                "serialized_named_tensors": self._handles(payload, server),
                "load_format": "flattened_bucket",
                **fields,
            },
        )

    @abstractmethod
    def _handles(self, payload: Any, server: Server) -> list[str]:
        """Return a serialized handle for each rank of the server."""


class SharedMemorySync(_SharedBucketSync):
    """Keep the buckets of each node's first rank in /dev/shm, where the servers of the node map them."""

    def __init__(self, cfg: WeightSyncConfig, device: torch.device, quantized: bool, nodes: Nodes) -> None:
        super().__init__(cfg, device, quantized, nodes, reuse_buffers=True)

    def check(self, servers: Sequence[Server]) -> None:
        check_places(servers, self._nodes, gpus=False)

    def _allocate(self, nbytes: int) -> Tensor:
        free = shutil.disk_usage(_SHARED_MEMORY).free
        if nbytes > free:
            raise InputError(
                f"weight_sync.bucket_bytes = {self._bucket_bytes} needs {nbytes} bytes in "
                f"{_SHARED_MEMORY}, but only {free} are free: lower it, enlarge that file system, "
                "or use another weight_sync.route"
            )
        with _sharing_by_name(), _stderr_to_devnull():
            return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(nbytes))

    def _payload(self, bucket: Bucket) -> tuple[Metadata, Tensor]:
        return _metadata(bucket), bucket.data

    def _handles(self, payload: tuple[Metadata, Tensor], server: Server) -> list[str]:
        # a handle counts as one reader and is opened once, so every rank needs its own handle
        with _sharing_by_name():
            return [_serialize(*payload) for _ in range(server.tensor_parallel_size)]


class CudaIpcSync(_SharedBucketSync):
    """Send CUDA IPC handles of each rank's buckets to the server rank on the same GPU of its node.

    The ranks of a node pack the same buckets, each on its own GPU, and the first one collects their handles.
    This route has not been tested on GPUs yet.
    """

    def __init__(self, cfg: WeightSyncConfig, device: torch.device, quantized: bool, nodes: Nodes) -> None:
        # torch frees a buffer after its last reader has closed it
        super().__init__(cfg, device, quantized, nodes, reuse_buffers=False)
        self._node_group = nodes.group  # made here, where all ranks meet
        self._is_read = False

    def check(self, servers: Sequence[Server]) -> None:
        check_places(servers, self._nodes, gpus=True)

    def update(
        self, servers: Sequence[Server], named_tensors: Iterable[tuple[str, Tensor]], version: str
    ) -> SyncReport:
        gpu = self._nodes.local_ranks.index(rank())
        self._is_read = any(gpu in server.gpus for server in self._here(servers))
        return super().update(servers, named_tensors, version)

    def _follow(self, servers: Sequence[Server], tensors: Iterator[tuple[str, Tensor]]) -> None:
        if self._here(servers):
            for bucket, _ in self._packer.pack(tensors):
                self._gather_handles(bucket)

    def _payload(self, bucket: Bucket) -> tuple[Metadata, list[Any]]:
        return _metadata(bucket), self._gather_handles(bucket)

    def _gather_handles(self, bucket: Bucket) -> list[Any]:
        """Return the handle of each rank's copy of the bucket, on the node's first rank.

        A handle without a reader would keep its bucket's memory, so such a rank gives None.
        """
        handle = _handle(bucket.data) if self._is_read else None
        if self._node_group is None:
            return [handle]
        handles: list[Any] = [None] * len(self._nodes.local_ranks)
        dist.gather_object(
            handle,
            handles if self._nodes.is_leader else None,
            dst=self._nodes.leader,
            group=self._node_group,
        )
        return handles

    def _handles(self, payload: tuple[Metadata, list[Any]], server: Server) -> list[str]:
        metadata, handles = payload
        return [_serialize(metadata, _Opened(handles[gpu])) for gpu in server.gpus]


def _handle(tensor: Tensor) -> tuple[Any, ...]:
    """Return the function that opens a tensor in another process, and its arguments.

    They identify a GPU by its UUID, because a server may number it differently. SGLang does the same
    (srt/utils/patch_torch.py).
    """
    rebuild, args = reduce_tensor(tensor)
    if tensor.is_cuda:
        uuid = str(torch.cuda.get_device_properties(tensor.device).uuid)
        args = (*args[:6], uuid, *args[7:])  # argument 6 is the device
    return rebuild, args


class _Opened:
    """Stands for the tensor of a handle: who unpickles it gets the tensor."""

    def __init__(self, handle: tuple[Any, ...]) -> None:
        self._handle = handle

    def __reduce__(self) -> tuple[Any, ...]:
        return self._handle


def _metadata(bucket: Bucket) -> Metadata:
    """Return what a server must know of each tensor in the bucket.

    ``update_weights_from_tensor`` reads a ``flattened_bucket`` by attributes
    (srt/model_executor/model_runner_components/weight_updater.py), so plain namespaces suffice. A ``tuple``
    is pickled in half the time of a ``torch.Size``.
    """
    return [
        SimpleNamespace(
            name=name, shape=tuple(shape), dtype=dtype, start_idx=start, end_idx=start + size, numel=size
        )
        for name, dtype, shape, start in bucket.contents
        for size in [math.prod(shape) * dtype.itemsize]
    ]


def _serialize(metadata: Metadata, data: Tensor | _Opened) -> str:
    """Return a bucket's metadata and its bytes' handle, pickled for another process and base64-encoded.

    SGLang's ``MultiprocessingSerializer`` uses the same pickling.
    """
    return base64.b64encode(ForkingPickler.dumps({"flattened_tensor": data, "metadata": metadata})).decode()


@contextmanager
def _sharing_by_name() -> Iterator[None]:
    """Share CPU memory by file name. File descriptors can only be passed to child processes."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


@contextmanager
def _stderr_to_devnull() -> Iterator[None]:
    """Redirect stderr while torch starts torch_shm_manager, which keeps stderr open while a server runs.

    If stderr is a pipe, its reader would not see the end of the stream when the trainer exits.
    """
    stderr = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)
