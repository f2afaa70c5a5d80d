"""An SGLang server without a model, which keeps the weights of ``/update_weights_from_tensor``."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import pickle
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from ..rollout.sglang.servers import Server


class WeightReceiver:
    """Server in a thread with the routes of a weight sync.

    Like SGLang, it maps the bucket whose handle a request carries, copies the tensors into its own and closes
    the bucket. A CUDA handle is opened on this process's GPU.

    Args:
        node, first_gpu, tensor_parallel_size: see ``Server``.

    Attributes:
        server: its address.
        weights: the tensors that each of its ranks has received, by name.
        status: HTTP status of the replies to updates; above 200 the update is refused.
        is_wrong: whether its checksums are those of other weights.
        paths: paths of the requests so far.
        bytes_per_second: speed that an update does not exceed; stands for a processor of its own.
    """

    def __init__(self, node: str = "", first_gpu: int = 0, tensor_parallel_size: int = 1) -> None:
        self.weights: list[dict[str, Tensor]] = [{} for _ in range(tensor_parallel_size)]
        self.status, self.is_wrong, self.paths = 200, False, list[str]()
        self.version = "default"
        self.bytes_per_second = float("inf")
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # one packet an answer: two would wait for the client's delayed acknowledgement

            def log_message(self, format: str, *args: Any) -> None:  # pyright: ignore[reportIncompatible]
                return

            def do_GET(self) -> None:
                self._reply(200, {"weight_version": receiver.version})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._reply(*receiver._answer(self.path, body))

            def _reply(self, status: int, answer: Any) -> None:
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        self.server = Server(
            f"http://127.0.0.1:{self._http.server_port}",
            tensor_parallel_size=tensor_parallel_size,
            node=node,
            first_gpu=first_gpu,
        )

    def close(self) -> None:
        """End the server."""
        self._http.shutdown()
        self._http.server_close()

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.paths.append(path)
        if path == "/weights_checker":
            if body["action"] == "reset_tensors":
                for weights in self.weights:
                    weights.clear()
            return 200, {"ranks": [{"checksums": self._checksums(weights)} for weights in self.weights]}
        if path != "/update_weights_from_tensor":
            return 200, {}
        started = time.monotonic()
        for weights, handle in zip(self.weights, body["serialized_named_tensors"], strict=True):
            bucket = _Unpickler(io.BytesIO(base64.b64decode(handle))).load()
            data: Tensor = bucket["flattened_tensor"]
            for about in bucket["metadata"]:
                tensor = data[about.start_idx : about.end_idx].view(about.dtype).view(about.shape)
                if about.name in weights:
                    weights[about.name].copy_(tensor)
                else:
                    weights[about.name] = tensor.clone()
            if data.is_cuda:
                torch.cuda.synchronize()
            # the time that a receiver of this speed needs
            time.sleep(max(0.0, started + len(data) / self.bytes_per_second - time.monotonic()))
        if self.status == 200:
            self.version = body["weight_version"]
        return self.status, {}

    def _checksums(self, weights: dict[str, Tensor]) -> dict[str, str]:
        """Return one checksum of all weights. Without any, it is that of noise."""
        content = b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in weights.values())
        return {"all weights": hashlib.sha256(content).hexdigest() + "x" * (self.is_wrong and bool(content))}


class _Unpickler(pickle.Unpickler):
    """Opens handles of ``rollout.sglang.sync.shared``, which come from a process of this program."""

    def find_class(self, module: str, name: str) -> Any:
        return _rebuild if name == "rebuild_cuda_tensor" else super().find_class(module, name)


def _rebuild(*args: Any) -> Tensor:
    """Open a CUDA IPC handle on this process's GPU; argument 6 is the GPU's UUID."""
    values = list(args)
    values[6] = torch.cuda.current_device()
    return rebuild_cuda_tensor(*values)
