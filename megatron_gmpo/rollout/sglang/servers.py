"""SGLang servers: processes of this machine that are started, watched, restarted and stopped, or running ones by their URL."""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import shlex
import socket
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from ...config import SGLangConfig
from ...errors import Exit, InputError, ServerError

CONNECT_TIMEOUT_S = 10.0
KEEPALIVE_S = 2.0
"""An idle connection is given up before the server does it (after 5 s), so that no request meets that."""

_LAUNCHER = Path(__file__).with_name("launch.py")
_PORTS = range(
    20_000, 32_768
)  # below those the kernel gives to outgoing connections, so that a restart finds its port free
_KILL_TIMEOUT_S = 30.0
_REACH_TIMEOUT_S = 30.0
_POLL_S = 0.5
_HEADER = "=== started"
_ERROR_LINE = re.compile(r"[\w.]*(Error|Exception)\b|[\w. ]+: error:")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_OURS = {"model_path", "host", "port", "api_key", "admin_api_key"}


@dataclass(frozen=True)
class Server:
    """A server as its clients see it.

    Attributes:
        url: ``http://host:port``, without a slash at the end.
        api_key: what ``/generate`` and the other requests of users want; empty where the server wants none.
        admin_key: what weight updates, pauses, aborts and cache flushes want.
        tensor_parallel_size: its ranks, each with a shard of the weights.
    """

    url: str
    api_key: str = field(default="", repr=False)
    admin_key: str = field(default="", repr=False)
    tensor_parallel_size: int = 1

    @property
    def headers(self) -> dict[str, str]:
        return _bearer(self.api_key)

    @property
    def admin_headers(self) -> dict[str, str]:
        return _bearer(self.admin_key)

    def weight_version(self, timeout_s: float) -> str | None:
        """The label of its weights; None where not even the front of it answers within the limit."""
        try:
            reply = _get(f"{self.url}/model_info", self.headers, timeout_s)
        except httpx.TransportError:
            return None
        return str(reply.json().get("weight_version")) if reply.status_code == 200 else None

    def answers(self, timeout_s: float) -> bool:
        """Whether it makes a token within the limit. A server with work to do counts as healthy when any of it makes progress; one that
        is idle takes about a second."""
        try:
            return _get(f"{self.url}/health_generate", {}, timeout_s).status_code == 200
        except httpx.TransportError:
            return False


class LocalServers:
    """SGLang servers on this machine: one process group each, with a log file, a port and keys that stay over restarts.

    None of them outlives this process, whatever kills it: see ``launch_sglang.py``.

    Args:
        model_path: Hugging Face folder with weights and tokenizer.
        num_servers: how many; each takes ``cfg.tensor_parallel_size`` devices.
        log_dir: receives server_0.log and so on, to which every start appends.
        dtype: ``fp32`` or ``bf16``.
        seed: server i draws from ``seed + i``.
        device: where they run. (Not run on a GPU yet.)
        options: further options of ``sglang.launch_server``; ``cfg.args`` overrides them.
        first_gpu: index, among those this process sees, of the first server's first GPU.
        keys: what they want of users and of administrators; None draws them.

    Raises:
        InputError: a ``cfg.host`` that is not this machine's, or an option in ``cfg.args`` that is set here.
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
        first_gpu: int = 0,
        keys: tuple[str, str] | None = None,
    ) -> None:
        args = {name.replace("-", "_"): value for name, value in cfg.args.items()}
        for name in sorted(_OURS & args.keys()):
            raise InputError(f"sglang.args.{name} is set by the run itself: leave it out")
        self._cfg, self._log_dir = cfg, log_dir
        self._ports = [_hold_port(cfg.host) for _ in range(num_servers)]
        self._api_key, self._admin_key = keys or (secrets.token_hex(16), secrets.token_hex(16))
        address = "127.0.0.1" if cfg.host == "0.0.0.0" else cfg.host
        self.servers = [
            Server(
                f"http://{address}:{_number(port)}", self._api_key, self._admin_key, cfg.tensor_parallel_size
            )
            for port in self._ports
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
                **_device_options(device, first_gpu + i * cfg.tensor_parallel_size),
                **options,
                **args,
            }
            for i, port in enumerate(self._ports)
        ]
        self._environment = _server_environment(device)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._started: dict[int, float] = {}
        self._changing = threading.Lock()
        self._stopped = False

    def start(self) -> None:
        """Starts all of them and returns at once."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        for index in range(len(self.servers)):
            self._launch(index)

    def wait_ready(self, index: int | None = None) -> None:
        """Waits until one, or all, generate.

        Raises:
            ServerError: it died, or ``cfg.start_timeout_s`` is over since its start; with the reason that its log gives.
        """
        for i in range(len(self.servers)) if index is None else [index]:
            deadline = self._started[i] + self._cfg.start_timeout_s
            while not self.servers[i].answers(min(_REACH_TIMEOUT_S, max(1.0, deadline - time.monotonic()))):
                if not self.is_alive(i):
                    raise ServerError(
                        f"SGLang server {i} died before it was ready: {self._last_words(i)} (see {self._log(i)})"
                    )
                if time.monotonic() > deadline:
                    limit = f"sglang.start_timeout_s = {self._cfg.start_timeout_s:g}"
                    raise ServerError(
                        f"SGLang server {i} was not ready within {limit}; its last words: {self._last_words(i)} (see {self._log(i)})"
                    )
                time.sleep(_POLL_S)

    def is_alive(self, index: int) -> bool:
        """Whether its process exists, be it stopped or hung."""
        return self._processes[index].poll() is None

    def restart(self, index: int) -> None:
        """Kills its process group, stopped or not, starts it again with the weights of ``model_path``, and returns at once.

        A thread may still be at it when another calls ``stop``, after which nothing is started.
        """
        with self._changing:
            if not self._stopped:
                self._kill(index)
                self._launch(index)

    def stop(self) -> None:
        """Kills all of them; nothing is left when it returns."""
        with self._changing:
            self._stopped = True
            for process in self._processes.values():  # all of them before the first is waited for
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
        os.register_at_fork(
            after_in_child=process.stdin.close
        )  # a fork of this process must not keep the server alive
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
                f"SGLang server {index} (process {process.pid}) is still there {_KILL_TIMEOUT_S:g} s after its kill"
            ) from None

    def _log(self, index: int) -> Path:
        return self._log_dir / f"server_{index}.log"

    def _last_words(self, index: int) -> str:
        """The last line of its log, since its last start, that names an error, or else the last line."""
        lines = self._log(index).read_text(errors="replace").rpartition(_HEADER)[2].splitlines()[1:]
        lines = [line.strip() for line in lines if line.strip()] or ["none"]
        return next((line for line in reversed(lines) if _ERROR_LINE.match(line)), lines[-1])


def external_servers(urls: tuple[str, ...]) -> list[Server]:
    """Running servers, with the keys of the environment variables SGLANG_API_KEY and SGLANG_ADMIN_API_KEY.

    Raises:
        InputError: a bad URL, a server that does not answer, or a key it does not take.
    """
    api_key = os.environ.get("SGLANG_API_KEY", "")
    admin_key = (
        os.environ.get("SGLANG_ADMIN_API_KEY", "") or api_key
    )  # a server without an admin key wants the other
    return [_external_server(url.rstrip("/"), api_key, admin_key, "rollout.server_urls") for url in urls]


def published_servers(file: Path, timeout_s: float) -> list[Server]:
    """Servers of another step of the job, once it publishes them: ``[{"url", "node"}, ...]`` in ``file``, or ``{"error", "code"}``. Their
    keys, ``{"api_key", "admin_key"}``, are in ``server_keys.json`` beside it.

    Raises:
        ServerError: the file is not there within ``timeout_s``, says that they could not be started, or names one that does not answer.
        InputError: the file says that their settings are wrong.
    """
    deadline = time.monotonic() + timeout_s
    while not file.is_file():
        if time.monotonic() > deadline:
            raise ServerError(
                f"rollout.servers_file = {str(file)!r} was not there within sglang.start_timeout_s = {timeout_s:g}"
            )
        time.sleep(_POLL_S)
    published = json.loads(file.read_text())
    if isinstance(published, dict):
        kind = InputError if published["code"] == Exit.BAD_INPUT else ServerError
        raise kind(f"the rollout servers of the job were not started: {published['error']}")
    keys = json.loads(file.with_name("server_keys.json").read_text())
    try:
        return [
            _external_server(entry["url"], keys["api_key"], keys["admin_key"], "rollout.servers_file")
            for entry in published
        ]
    except InputError as error:  # nobody typed these
        raise ServerError(str(error)) from None


def _external_server(url: str, api_key: str, admin_key: str, field: str) -> Server:
    named = f"{field}: {url!r}"
    try:
        info = _get(f"{url}/server_info", _bearer(api_key), _REACH_TIMEOUT_S)
        # the key is looked at before the body, and an empty body changes nothing
        update = httpx.post(
            f"{url}/update_weight_version",
            headers=_bearer(admin_key),
            timeout=_REACH_TIMEOUT_S,
            trust_env=False,
        )
    except (httpx.UnsupportedProtocol, httpx.InvalidURL):
        raise InputError(f"{named} is not a URL: give http://HOST:PORT") from None
    except httpx.TransportError as error:
        raise InputError(
            f"{named} cannot be reached ({error}): start the server or correct the URL"
        ) from None
    for answer, name in ((info, "SGLANG_API_KEY"), (update, "SGLANG_ADMIN_API_KEY")):
        if answer.status_code in (401, 403):
            where = (
                "in server_keys.json"
                if field == "rollout.servers_file"
                else f"in the environment variable {name}"
            )
            raise InputError(f"{named} refuses the key {where}: set the one it was started with")
    if info.status_code != 200:
        raise InputError(
            f"{named} answers {info.status_code} to /server_info: give the URL of an SGLang server"
        )
    return Server(url, api_key, admin_key, info.json()["tp_size"])


def _get(url: str, headers: dict[str, str], timeout_s: float) -> httpx.Response:
    return httpx.get(
        url, headers=headers, timeout=timeout_s, trust_env=False
    )  # no proxy stands between trainer and servers


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def address_towards(host: str) -> str:
    """This machine's address on the way to ``host``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # finds the way, sends nothing
        return probe.getsockname()[0]


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
    """This process's, without torchrun's variables: SGLang would take itself for a rank of the trainer's job."""
    job = re.compile(r"TORCHELASTIC_|MASTER_|((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE))$")
    kept = {name: value for name, value in os.environ.items() if not job.match(name)}
    return kept | {"SGLANG_USE_CPU_ENGINE": "1"} if device.type == "cpu" else kept


def _command_line(options: dict[str, Any]) -> list[str]:
    """``{"port": 1, "sleep_on_idle": True, "x": [1, 2]}`` is ``["--port", "1", "--sleep-on-idle", "--x", "1", "2"]``."""
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
    """A socket on a free port that keeps it from everyone but a server that is told of it.

    The first bind is exclusive. With SO_REUSEADDR set afterwards, and no listening, the kernel lets a second socket bind that has it
    set too: uvicorn's. Other runs choose their ports as we do, and find this one taken.
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
