"""Route ``tensor``: the servers map the trainer's buckets into memory. HTTP carries only handles.

On CPU the buckets are POSIX shared memory, on a GPU they are CUDA IPC memory.
"""

from __future__ import annotations

import base64
import io
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
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from ....config import WeightSyncConfig
from ....distributed import all_gather_objects, broadcast_object, rank
from ....errors import InputError
from ..servers import Server
from .buckets import Bucket
from .route import SyncReport, WeightSync
from .session import Session

_SHARED_MEMORY = Path("/dev/shm")


class _SharedBucketSync(WeightSync):
    """Send serialized handles of the buckets with ``/update_weights_from_tensor``."""

    def _send(self, session: Session, payload: Any, fields: dict[str, Any], last: bool) -> None:
        handles = {server: self._handles(payload, server) for server in session.servers}
        session.request(
            "/update_weights_from_tensor",
            lambda server: {
                "serialized_named_tensors": handles[server],
                "load_format": "flattened_bucket",
                **fields,
            },
        )

    @abstractmethod
    def _handles(self, payload: Any, server: Server) -> list[str]:
        """Return a serialized handle for each rank of the server."""


class SharedMemorySync(_SharedBucketSync):
    """Keep rank 0's buckets in /dev/shm, where the servers of this machine map them."""

    def _allocate(self, nbytes: int) -> Tensor:
        free = shutil.disk_usage(_SHARED_MEMORY).free
        if nbytes > free:
            raise InputError(
                f"weight_sync.bucket_bytes = {self._cfg.bucket_bytes} needs {nbytes} bytes in "
                f"{_SHARED_MEMORY}, but only {free} are free: lower it, enlarge that file system, "
                "or use another weight_sync.route"
            )
        with _sharing_by_name(), _stderr_to_devnull():
            return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(nbytes))

    def _handles(self, payload: Bucket, server: Server) -> list[str]:
        # a handle counts as one reader and is opened once, so every rank needs its own handle
        with _sharing_by_name():
            return [_serialize(payload) for _ in range(server.tensor_parallel_size)]


class CudaIpcSync(_SharedBucketSync):
    """Send CUDA IPC handles of each trainer rank's buckets to the server rank on the same GPU.

    The servers' ranks, in the order of the first sync's servers, run on the GPUs of trainer ranks 0, 1, 2,
    and so on. This route has not been tested on GPUs yet.
    """

    def __init__(self, cfg: WeightSyncConfig, device: torch.device, quantized: bool) -> None:
        # torch frees a buffer after its last reader has closed it
        super().__init__(cfg, device, quantized, reuse_buffers=False)
        self._first_ranks: dict[Server, int] = {}
        self._is_read = False

    def update(
        self, servers: Sequence[Server], named_tensors: Iterable[tuple[str, Tensor]], version: str
    ) -> SyncReport:
        for server in servers:
            self._first_ranks.setdefault(server, sum(s.tensor_parallel_size for s in self._first_ranks))
        read = [
            range(first, first + server.tensor_parallel_size)
            for server in servers
            for first in [self._first_ranks[server]]
        ]
        self._is_read = any(rank() in ranks for ranks in broadcast_object(read))
        return super().update(servers, named_tensors, version)

    def _follow(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        for bucket, _ in self._packer.pack(tensors):
            self._payload(bucket)

    def _payload(self, bucket: Bucket) -> list[str]:
        """Return the handles of all ranks. A handle without a reader is empty, so that it leaks no bucket."""
        return all_gather_objects(_serialize(bucket) if self._is_read else "")

    def _handles(self, payload: list[str], server: Server) -> list[str]:
        first = self._first_ranks[server]
        return payload[first : first + server.tensor_parallel_size]


class _Pickler(ForkingPickler):
    def reducer_override(self, obj: Any) -> Any:
        """Identify GPUs by UUID, because a server may number them differently.

        SGLang does the same (srt/utils/patch_torch.py).
        """
        if not (isinstance(obj, Tensor) and obj.is_cuda):
            return NotImplemented
        rebuild, args = reduce_tensor(obj)
        uuid = str(torch.cuda.get_device_properties(obj.device).uuid)
        return rebuild, (*args[:6], uuid, *args[7:])  # argument 6 is the device


def _serialize(bucket: Bucket) -> str:
    """Return a bucket's handle and metadata, pickled for another process and base64-encoded.

    SGLang's ``MultiprocessingSerializer`` uses the same pickling. ``update_weights_from_tensor`` reads a
    ``flattened_bucket`` by attributes (srt/model_executor/model_runner_components/weight_updater.py), so
    plain namespaces suffice.
    """
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
