"""Start, restart and stop SGLang servers as processes of this machine."""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import shlex
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import torch

from ...config import SGLangConfig
from ...errors import InputError, ServerError
from .servers import Server

_LAUNCHER = Path(__file__).with_name("launch.py")
_PORTS = range(20_000, 32_768)
"""Ports below the kernel's range for outgoing connections, so that a restarted server finds its port free."""
_KILL_TIMEOUT_S = 30.0
_GENERATE_TIMEOUT_S = 30.0
_POLL_S = 0.5
_HEADER = "=== started"
_ERROR_LINE = re.compile(
    r"[\w.]*(Error|Exception)\b|[\w. ]+: error:|.*: error while loading shared libraries:"
    r"|\[[^]]*\] Subprocess \S+ \(pid=\d+\) crashed"
)
_CONSEQUENCE = re.compile(r"RuntimeError: Rank \d+ scheduler died during initialization")
"""SGLang's guess at why a process ended. The process itself may have written the cause before."""
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_OURS = {"model_path", "host", "port", "api_key", "admin_api_key", "enable_fp32_lm_head"}


class LocalServers:
    """SGLang servers on this machine, each in its own process group.

    A server keeps its log file, port and keys over restarts. When this process ends for any reason, its
    servers end too (see ``launch.py``).

    Args:
        model_path: Hugging Face folder with weights and tokenizer.
        num_servers: number of servers; each takes ``cfg.tensor_parallel_size`` devices.
        log_dir: folder of server_0.log and so on; every start appends to them.
        dtype: ``fp32`` or ``bf16``.
        seed: server i samples with seed ``seed + i``.
        device: device type of the servers. GPUs have not been tested yet.
        options: additional options of ``sglang.launch_server``; ``cfg.args`` overrides them.
        environment: additional environment variables of the servers.
        first_gpu: index of the first server's first GPU among the GPUs that this process sees.
        keys: API key and admin key; None draws them at random.
        address: this machine's address in the URLs if ``cfg.host`` is 0.0.0.0; the default is 127.0.0.1.

    Attributes:
        servers: addresses and keys of the servers, known before they start.

    Raises:
        InputError: ``cfg.host`` is not an address of this machine, or ``cfg.args`` contains an option that
            this class sets.
    """

    def __init__(
        self,
        model_path: str,
        num_servers: int,
        cfg: SGLangConfig,
        log_dir: Path,
        *,
        dtype: str,
        seed: int,
        device: torch.device,
        options: dict[str, Any] = {},  # noqa: B006
        environment: dict[str, str] = {},  # noqa: B006
        first_gpu: int = 0,
        keys: tuple[str, str] | None = None,
        address: str | None = None,
    ) -> None:
        args = {name.replace("-", "_"): value for name, value in cfg.args.items()}
        for name in sorted(_OURS & args.keys()):
            raise InputError(f"sglang.args.{name} is set by the run itself: leave it out")
        self._cfg, self._log_dir = cfg, log_dir
        self._ports = [_hold_port(cfg.host) for _ in range(num_servers)]
        self._api_key, self._admin_key = keys or (secrets.token_hex(16), secrets.token_hex(16))
        address = address or "127.0.0.1" if cfg.host == "0.0.0.0" else cfg.host
        self.servers = [
            Server(
                f"http://{address}:{_number(port)}",
                self._api_key,
                self._admin_key,
                cfg.tensor_parallel_size,
                first_gpu=first_gpu + i * cfg.tensor_parallel_size,
            )
            for i, port in enumerate(self._ports)
        ]
        self._options = [
            {
                "model_path": model_path,
                "host": cfg.host,
                "port": _number(port),
                "tp_size": cfg.tensor_parallel_size,
                "dtype": _DTYPES[dtype],
                "random_seed": seed + i,
                "max_running_requests": cfg.max_concurrent_requests,
                "log_level_http": "warning",
                "skip_server_warmup": True,
                "sleep_on_idle": True,
                **_device_options(device, self.servers[i].first_gpu),
                **options,
                **args,
            }
            for i, port in enumerate(self._ports)
        ]
        self._environment = _server_environment(device) | environment
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._started: dict[int, float] = {}
        self._changing = threading.Lock()
        self._stopped = False

    def start(self) -> None:
        """Start all servers and return at once."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        for index in range(len(self.servers)):
            self._launch(index)

    def wait_ready(self, index: int | None = None) -> None:
        """Wait until the server ``index`` generates a token, or until every server does if it is None.

        Raises:
            ServerError: a server died, or was not ready within ``cfg.start_timeout_s`` after its start. The
                message quotes the reason from its log.
        """
        for i in range(len(self.servers)) if index is None else [index]:
            deadline = self._started[i] + self._cfg.start_timeout_s
            while not self.servers[i].answers(
                min(_GENERATE_TIMEOUT_S, max(1.0, deadline - time.monotonic()))
            ):
                if not self.is_alive(i):
                    raise ServerError(f"SGLang server {i} {self.end_of(i)} before it was ready{self._why(i)}")
                if time.monotonic() > deadline:
                    limit = f"sglang.start_timeout_s = {self._cfg.start_timeout_s:g}"
                    raise ServerError(f"SGLang server {i} was not ready within {limit}{self._why(i)}")
                time.sleep(_POLL_S)

    def is_alive(self, index: int) -> bool:
        """Return whether the server's process exists; it may be stopped or hung."""
        return self._processes[index].poll() is None

    def end_of(self, index: int) -> str:
        """Return how a server ended that is not alive, e.g. ``was killed by SIGKILL``."""
        code = self._processes[index].wait()
        number = -code if code < 0 else code - 128  # the launcher itself was killed, or reports the server's
        return (
            f"was killed by {signal.Signals(number).name}" if number > 0 else f"ended with exit code {code}"
        )

    def restart(self, index: int) -> None:
        """Kill the server's process group, start it again from ``model_path``, and return at once.

        A thread may call this while another thread calls ``stop``. No server starts after ``stop``.
        """
        with self._changing:
            if not self._stopped:
                self._kill(index)
                self._launch(index)

    def stop(self) -> None:
        """Kill all servers and wait until their processes have ended."""
        with self._changing:
            self._stopped = True
            for process in self._processes.values():  # kill all before waiting for the first
                assert process.stdin
                process.stdin.close()
            for index in self._processes:
                self._kill(index)

    def _launch(self, index: int) -> None:
        command = [
            str(Path(self._cfg.python).absolute()),
            "-I",
            str(_LAUNCHER),
            *_command_line(self._options[index]),
        ]
        with self._log(index).open("a") as log:
            log.write(f"{_HEADER} {time.strftime('%Y-%m-%d %H:%M:%S')}: {shlex.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                bufsize=0,
            )
        assert process.stdin
        # a fork of this process must not keep the server alive
        os.register_at_fork(after_in_child=process.stdin.close)
        keys = {"--api-key": self._api_key, "--admin-api-key": self._admin_key}
        process.stdin.write(json.dumps(keys).encode() + b"\n")
        self._processes[index], self._started[index] = process, time.monotonic()

    def _kill(self, index: int) -> None:
        process = self._processes[index]
        assert process.stdin
        process.stdin.close()
        try:
            process.wait(_KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise ServerError(
                f"SGLang server {index} (process {process.pid}) still exists {_KILL_TIMEOUT_S:g} s after "
                "it was killed"
            ) from None

    def _log(self, index: int) -> Path:
        return self._log_dir / f"server_{index}.log"

    def _why(self, index: int) -> str:
        """Return ``: LINE (see LOG)`` with the last error in the log since the last start, if any.

        Without an error, the line of a server that is alive is the last one, which shows how far it got.
        """
        lines = self._log(index).read_text(errors="replace").rpartition(_HEADER)[2].splitlines()[1:]
        lines = [line.strip() for line in lines if line.strip()]
        errors = [line for line in lines if _ERROR_LINE.match(line)]
        causes = [line for line in errors if not _CONSEQUENCE.match(line)] or errors
        quoted = causes[-1:] or (lines[-1:] if self.is_alive(index) else [])
        return f"{''.join(f': {line}' for line in quoted)} (see {self._log(index)})"


def _device_options(device: torch.device, first_gpu: int) -> dict[str, Any]:
    if device.type == "cuda":
        return {"base_gpu_id": first_gpu}
    return {
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "disable_cuda_graph": True,
        "mem_fraction_static": 0.8,
        "max_total_tokens": 32_768,
    }


def _server_environment(device: torch.device) -> dict[str, str]:
    """Return the environment without torchrun's variables, with which SGLang would join the trainer's job."""
    job = re.compile(r"TORCHELASTIC_|MASTER_|((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE))$")
    kept = {name: value for name, value in os.environ.items() if not job.match(name)}
    return kept | {"SGLANG_USE_CPU_ENGINE": "1"} if device.type == "cpu" else kept


def _command_line(options: dict[str, Any]) -> list[str]:
    """Return options as arguments: ``{"port": 1, "x": [1]}`` gives ``["--port", "1", "--x", "1"]``."""
    line: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        line.append(f"--{name.replace('_', '-')}")
        if isinstance(value, dict):
            line.append(json.dumps(value))
        elif isinstance(value, list):
            line += map(str, value)
        elif value is not True:
            line.append(str(value))
    return line


def _hold_port(host: str) -> socket.socket:
    """Return a socket that reserves a free port for a server.

    The first bind is exclusive. SO_REUSEADDR is set afterwards and the socket does not listen, so the kernel
    allows a second socket with SO_REUSEADDR, uvicorn's, to bind the port. Other runs reserve their ports in
    the same way, so their bind to this port fails.
    """
    taken: OSError | None = None
    for port in random.SystemRandom().sample(_PORTS, 100):
        holder = socket.socket()
        try:
            holder.bind((host, port))
        except OSError as error:
            holder.close()
            taken = error
            continue
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return holder
    raise InputError(
        f"sglang.host = {host!r} has no port to bind to ({taken}): give an address of this machine"
    )


def _number(port: socket.socket) -> int:
    return port.getsockname()[1]
