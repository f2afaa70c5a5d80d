"""Real SGLang servers: start, restart, death, and the keys that requests need."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_gmpo.config import Config, SGLangConfig
from megatron_gmpo.errors import InputError, ServerError
from megatron_gmpo.rollout.sglang import start
from megatron_gmpo.rollout.sglang.processes import LocalServers
from megatron_gmpo.rollout.sglang.servers import (
    Server,
    external_servers,
    published_addresses,
    published_servers,
)
from megatron_gmpo.supervision.records import node_name

from ..support.commands import CONFIG, ROOT, command_line, error_lines, options
from ..support.sglang_servers import (
    CPU,
    PYTHON,
    files_of,
    folder_of,
    generate,
    local_servers,
    members,
    needs_sglang,
    process_group,
    wait_for,
    wait_until_gone,
)

PROMPT = [5, 6, 7, 8]


@needs_sglang
def test_generates_what_transformers_does(sglang_server: LocalServers, sglang_model: Path) -> None:
    answer = generate(sglang_server.servers[0], PROMPT, max_new_tokens=6).json()
    model = AutoModelForCausalLM.from_pretrained(sglang_model, dtype=torch.float32)
    with torch.no_grad():
        logprobs = model(torch.tensor([PROMPT + answer["output_ids"]])).logits[0].log_softmax(-1)
    for step, token in enumerate(answer["output_ids"], start=len(PROMPT) - 1):
        assert token == logprobs[step].argmax()
    ours = [logprob for logprob, *_ in answer["meta_info"]["output_token_logprobs"]]
    theirs = [logprobs[len(PROMPT) - 1 + i, token].item() for i, token in enumerate(answer["output_ids"])]
    assert ours == pytest.approx(theirs, abs=1e-4)


@needs_sglang
def test_keys_open_and_stay_secret(sglang_server: LocalServers) -> None:
    server = sglang_server.servers[0]
    assert generate(server, PROMPT, max_new_tokens=1).status_code == 200
    for wrong in ({}, {"Authorization": "Bearer wrong"}, server.admin_headers):
        assert generate(server, PROMPT, headers=wrong, max_new_tokens=1).status_code == 401
    for headers, code in (({}, 401), (server.headers, 401), (server.admin_headers, 200)):
        assert httpx.post(f"{server.url}/flush_cache", headers=headers, timeout=60).status_code == code

    log = sglang_server._log(0).read_text()
    assert "'api_key': '***'" in log
    processes = members(process_group(sglang_server))
    assert len(processes) >= 3  # HTTP, scheduler, detokenizer
    shown = [
        *(" ".join(p.cmdline()) + str(p.environ()) for p in psutil.process_iter(["pid"]) if p in processes),
        log,
        repr(server),
    ]
    for key in (server.api_key, server.admin_key):
        assert len(key) == 32
        assert not [text for text in shown if key in text]


@needs_sglang
def test_external_servers(sglang_server: LocalServers, monkeypatch: pytest.MonkeyPatch) -> None:
    server = sglang_server.servers[0]
    monkeypatch.setenv("SGLANG_API_KEY", server.api_key)
    monkeypatch.setenv("SGLANG_ADMIN_API_KEY", server.admin_key)
    assert external_servers((server.url + "/",)) == [server]
    version = httpx.get(f"{server.url}/model_info", headers=server.headers, timeout=60).json()[
        "weight_version"
    ]
    assert version == "default"  # the check changed nothing

    for name in ("SGLANG_API_KEY", "SGLANG_ADMIN_API_KEY"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "wrong")
            with pytest.raises(
                InputError, match=rf"rollout.server_urls: '{server.url}' refuses the key .* {name}: "
            ):
                external_servers((server.url,))


def test_external_servers_that_are_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(
        InputError, match=rf"'http://127.0.0.1:{port}' cannot be reached \(.*refused\): start the server"
    ):
        external_servers((f"http://127.0.0.1:{port}",))
    for url in ("127.0.0.1:30000", "http://host:port", ""):
        with pytest.raises(InputError, match="is not a URL: give http://HOST:PORT"):
            external_servers((url,))


@needs_sglang
def test_a_stopped_and_a_killed_server_come_back(sglang_server: LocalServers) -> None:
    """A stopped server does not answer, a killed one is known to be dead, and a restart reuses the URL.

    No life of a server leaves a file behind.
    """
    servers, before = sglang_server, list(sglang_server.servers)
    assert servers.servers[0].answers(20)
    stopped = process_group(servers)
    folder = folder_of(stopped)
    names = [re.sub(r"-\w+$", "", file.name.replace(folder.name, "NAME")) for file in files_of(folder)]
    assert {"sem.NAME", "NAME"} < set(names)
    assert [name for name in names if re.fullmatch(r"sglang_loads_NAME_\w+\.shm", name)]
    os.killpg(stopped, signal.SIGSTOP)
    assert not before[0].answers(timeout_s=2.0)
    assert servers.is_alive(0)

    servers.restart(0)
    assert not wait_until_gone(stopped)
    assert files_of(folder) == []
    os.kill(process_group(servers), signal.SIGKILL)
    with pytest.raises(
        ServerError,
        match=r"^SGLang server 0 was killed by SIGKILL before it was ready \(see .*server_0.log\)$",
    ):
        servers.wait_ready(0)
    assert not servers.is_alive(0)
    assert not servers.servers[0].answers(20)

    servers.restart(0)
    servers.wait_ready(0)
    assert servers.servers[0].answers(20)
    assert servers.servers == before
    assert generate(before[0], PROMPT, max_new_tokens=1).status_code == 200
    assert servers._log(0).read_text().count("=== started") == 3


@needs_sglang
def test_the_next_start_removes_what_a_kill_left(sglang_server: LocalServers) -> None:
    """A server dies with its launcher, which then cannot remove its files. Those of a living server stay."""
    servers = sglang_server
    running = process_group(servers)
    folder = folder_of(running)
    foreign = Path("/dev/shm", f"sem.{folder.name}x-1")
    foreign.touch()
    try:
        with local_servers("no model", Path(servers._log_dir, "other")) as other:
            other.start()
            process_group(other)  # exists once the launcher has removed files
        assert len(files_of(folder)) > 6
        servers._processes[0].kill()
        assert not wait_until_gone(running)
        assert servers.end_of(0) == "was killed by SIGKILL"
        assert len(files_of(folder)) > 6
        servers.restart(0)
        wait_for(lambda: files_of(folder) == [foreign])
        servers.wait_ready(0)
    finally:
        foreign.unlink()


@needs_sglang
def test_the_reason_of_a_start_that_fails(tmp_path: Path) -> None:
    cases: dict[str, tuple[str, dict[str, Any], int, str]] = {
        "option": ("no model", {"no_such_option": 3}, 2, "error: unrecognized arguments: --no-such-option 3"),
        "model": (str(tmp_path / "no_model"), {}, 1, "OSError: .*no_model"),
    }
    for name, (model, args, code, reason) in cases.items():
        with local_servers(model, tmp_path / name, args=args) as servers:
            servers.start()
            with pytest.raises(
                ServerError,
                match=rf"^SGLang server 0 ended with exit code {code} before it was ready: "
                rf".*{reason}.*\(see .*server_0.log\)$",
            ):
                servers.wait_ready()


DIED = "RuntimeError: Rank 0 scheduler died during initialization (exit code: {}). If exit code is -9"
LIBCUDA = "python: error while loading shared libraries: libcuda.so.1: cannot open shared object file"
CRASHED = "[2026-01-02 03:04:05] Subprocess scheduler_0 (pid=7) crashed with exit code -9. Triggering SIGQUIT"


@pytest.mark.parametrize(
    ("log", "exit_command", "end", "error"),
    [
        (["[2026-01-02 03:04:05] Load weight begin."], "kill -SEGV $$", "was killed by SIGSEGV", ""),
        (["[2026-01-02 03:04:05] Load weight end."], "exit 137", "was killed by SIGKILL", ""),
        ([], "exit 0", "ended with exit code 0", ""),
        (["ValueError: odd", "[2026-01-02] bye"], "exit 1", "ended with exit code 1", "ValueError: odd"),
        ([LIBCUDA, DIED.format(127)], "exit 137", "was killed by SIGKILL", LIBCUDA),
        ([DIED.format(-9)], "exit 1", "ended with exit code 1", DIED.format(-9)),
        ([CRASHED, "[2026-01-02] SIGQUIT received."], "exit 137", "was killed by SIGKILL", CRASHED),
    ],
)
def test_the_end_of_a_server_and_the_error_in_its_log(
    log: list[str], exit_command: str, end: str, error: str, tmp_path: Path
) -> None:
    """The launcher exits with 128 + n after signal n, as a shell does."""
    (tmp_path / "log").write_text("".join(line + "\n" for line in log))
    stub = tmp_path / "python"
    stub.write_text(f"#!/bin/sh\nread keys\ncat {tmp_path}/log\n{exit_command}\n")
    stub.chmod(0o700)
    with local_servers("no model", tmp_path, python=str(stub)) as servers:
        servers.start()
        servers._processes[0].wait(20)
        with pytest.raises(ServerError) as raised:
            servers.wait_ready()
    quoted = f": {error}" if error else ""
    line = f"SGLang server 0 {end} before it was ready{quoted} (see {tmp_path}/server_0.log)"
    assert str(raised.value) == line


@needs_sglang
def test_start_timeout_and_stop(tmp_path: Path) -> None:
    with local_servers("no model", tmp_path, num_servers=2, start_timeout_s=0.1) as servers:
        servers.start()
        groups = [process_group(servers, i) for i in range(2)]
        with pytest.raises(
            ServerError,
            match=r"^SGLang server 0 was not ready within sglang.start_timeout_s = 0.1.* \(see .*_0.log\)$",
        ):
            servers.wait_ready()
        assert all(servers.is_alive(i) for i in range(2))
        servers.stop()
        assert [members(group) for group in groups] == [[], []]
        assert not any(servers.is_alive(i) for i in range(2))
        servers.stop()


@needs_sglang
def test_no_server_outlives_a_killed_trainer(tmp_path: Path) -> None:
    """Running and stopped servers both end, although a fork of the trainer survives."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.sglang_servers", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as trainer:
        assert trainer.stdout
        started = json.loads(trainer.stdout.readline())
        try:
            running, stopped = started["servers"]
            os.killpg(stopped, signal.SIGSTOP)
            assert members(running)
            assert members(stopped)
            trainer.kill()
            trainer.wait(30)
            assert psutil.pid_exists(started["fork"])
            assert not wait_until_gone(running)
            assert not wait_until_gone(stopped)
        finally:
            os.kill(started["fork"], signal.SIGKILL)


def test_ports_are_held(tmp_path: Path) -> None:
    """Only the server can bind a port that was chosen for it."""
    servers = LocalServers("no model", 3, SGLangConfig(), tmp_path, dtype="fp32", seed=1, device=CPU)
    ports = [httpx.URL(server.url).port for server in servers.servers]
    assert len(set(ports)) == 3
    for port in ports:
        with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
            other.bind(("127.0.0.1", port))
        socket.create_server(("127.0.0.1", port)).close()  # sets SO_REUSEADDR, as uvicorn does


def test_refuses_settings_it_cannot_use(tmp_path: Path) -> None:
    for settings, message in (
        (
            {"host": "192.0.2.1"},
            r"sglang.host = '192.0.2.1' has no port to bind to \(.*\): give an address of this machine",
        ),
        (
            {"args": {"admin-api-key": "k"}},
            r"sglang.args.admin_api_key is set by the run itself: leave it out",
        ),
        (
            {"args": {"enable_fp32_lm_head": True}},
            r"sglang.args.enable_fp32_lm_head is set by the run itself: leave it out",
        ),
    ):
        with pytest.raises(InputError, match=f"^{message}$"):
            LocalServers("no model", 1, SGLangConfig(**settings), tmp_path, dtype="fp32", seed=1, device=CPU)


@pytest.mark.parametrize(
    ("model", "fp32_head"),
    [
        ({"dtype": "bf16"}, True),
        ({"dtype": "bf16", "fp32_head": False}, False),
        ({"dtype": "fp32"}, False),  # the logits are fp32 anyway
        ({"dtype": "fp32", "fp32_head": True}, False),
    ],
)
def test_servers_keep_the_logits_like_the_policy(
    model: dict[str, Any], fp32_head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = Config.model_validate({"model": {"path": "no model"} | model, "rollout": {"engine": "sglang"}})
    # no machine has and lacks AMX
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    (options,) = start.local_servers(cfg, CPU, tmp_path)._options
    assert options.get("enable_fp32_lm_head", False) is fp32_head
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert start.local_servers(cfg, torch.device("cuda"), tmp_path)._options
    if fp32_head:  # SGLang would multiply fp32 hidden states with a reordered matrix
        with pytest.raises(InputError, match=r"model.fp32_head needs .* set it to false"):
            start.local_servers(cfg, CPU, tmp_path)
    else:
        assert start.local_servers(cfg, CPU, tmp_path)._options


def test_keys_are_not_printed() -> None:
    assert "secret" not in repr(Server("http://127.0.0.1:1", "secret1", "secret2"))


@needs_sglang
def test_a_rollout_node_starts_again_what_hangs_and_says_when_nothing_is_left(
    sglang_model: Path, tmp_path: Path
) -> None:
    limits = options(
        sglang__python=PYTHON,
        sglang__health_interval_s=1,
        sglang__hang_timeout_s=15,
        sglang__max_restarts=1,
        weight_sync__timeout_s=5,
    )
    command = command_line(
        "megatron_gmpo.rollout.sglang.serve",
        CONFIG,
        *options(model__path=sglang_model, run_dir=tmp_path),
        *limits,
    )
    (tmp_path / "server_keys.json").write_text('{"api_key": "user", "admin_key": "admin"}')
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "1", "MASTER_ADDR": "127.0.0.1"}
    with subprocess.Popen(
        [*command, "--rollout.engine", "sglang"], cwd=ROOT, env=os.environ | slurm, stderr=subprocess.PIPE
    ) as node:
        try:
            file = tmp_path / "servers.json"
            (server,) = published_servers(file, published_addresses(file, 300))
            ((log,),) = [list(tmp_path.glob("servers/*/server_0.log"))]
            hung = psutil.Process(node.pid).children()[0].children()[0].pid
            os.killpg(hung, signal.SIGSTOP)
            wait_for(lambda: log.read_text().count("=== started") == 2)
            assert not wait_until_gone(hung)
            wait_for(lambda: server.answers(20), timeout_s=300)
            os.killpg(psutil.Process(node.pid).children()[0].children()[0].pid, signal.SIGKILL)
            _, said = node.communicate(timeout=60)
        finally:
            node.terminate()
    assert node.returncode == 1
    assert error_lines(said.decode()) == [
        f"error: every SGLang server of {node_name()} was lost 2 times in a row: see its log"
    ]
    with pytest.raises(
        ServerError, match="the rollout servers of the job did not start: every SGLang server of"
    ):
        published_addresses(tmp_path / "servers.json", 1)


def test_published_servers_are_not_the_users_to_correct(tmp_path: Path) -> None:
    file = tmp_path / "servers.json"
    (tmp_path / "server_keys.json").write_text('{"api_key": "user", "admin_key": "admin"}')
    with pytest.raises(
        ServerError, match=r"rollout\.servers_file = .* did not appear within sglang\.start_timeout_s = 0\.1"
    ):
        published_addresses(file, 0.1)
    file.write_text('[{"url": "http://127.0.0.1:9", "node": "node2"}]')
    addresses = published_addresses(file, 1)
    assert addresses == [("http://127.0.0.1:9", "node2")]
    with pytest.raises(
        ServerError, match=r"rollout\.servers_file: 'http://127\.0\.0\.1:9' cannot be reached"
    ):
        published_servers(file, addresses)
    file.write_text(
        '{"error": "rollout.num_servers = 3 cannot be divided among 2 nodes: choose a multiple", "code": 2}'
    )
    with pytest.raises(InputError, match=r"rollout\.num_servers = 3 cannot be divided"):
        published_addresses(file, 1)
