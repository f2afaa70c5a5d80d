"""Weight syncs to real SGLang servers: every route, failing servers, unfinished requests."""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_gmpo.config import WeightSyncConfig
from megatron_gmpo.errors import InputError
from megatron_gmpo.rollout.sglang.memory import release_memory, resume_memory
from megatron_gmpo.rollout.sglang.processes import LocalServers
from megatron_gmpo.rollout.sglang.servers import Server
from megatron_gmpo.rollout.sglang.sync import WeightSync, make_weight_sync
from megatron_gmpo.rollout.sglang.sync.route import INCOMPLETE
from megatron_gmpo.weights.safetensors_folder import SafetensorsFolder

from ..support.ranks import RankPool
from ..support.sglang_servers import LONG, generate, local_servers, needs_sglang, process_group, wait_for

pytestmark = needs_sglang

ROUTES = ("disk", "distributed", "tensor")
CPU = torch.device("cpu")
PROMPT = [5, 6, 7, 8, 9, 10]
BUCKET_BYTES = 40_000  # makes many buckets, and some tensors are larger than a bucket
NamedTensors = list[tuple[str, Tensor]]


@pytest.fixture(scope="module")
def dense(tiny_model: Callable[..., Path]) -> tuple[Path, Path]:
    """Return two models of the same shape; the servers start with the first."""
    return tiny_model("qwen3", num_layers=2), tiny_model("qwen3", num_layers=2, seed=1)


@pytest.fixture(scope="module")
def pair(dense: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServers]:
    """Yield two bf16 servers with the weights and versions of the previous test.

    A test that kills a server restarts it.
    """
    with local_servers(dense[0], tmp_path_factory.mktemp("pair"), num_servers=2, dtype="bf16") as servers:
        servers.start()
        servers.wait_ready()
        yield servers


@pytest.fixture
def weight_sync(tmp_path: Path) -> Iterator[Callable[..., WeightSync]]:
    """Return ``weight_sync(route, **fields of WeightSyncConfig)``; the syncs are closed after the test."""
    made: list[WeightSync] = []

    def make(route: str, **fields: Any) -> WeightSync:
        cfg = WeightSyncConfig.model_validate(
            {"route": route, "bucket_bytes": BUCKET_BYTES, "timeout_s": 60.0} | fields
        )
        made.append(make_weight_sync(cfg, "disaggregated", CPU, tmp_path))
        return made[-1]

    yield make
    for sync in made:
        sync.close()


def tensors_of(model: Path) -> NamedTensors:
    folder = SafetensorsFolder(model)
    return [(name, folder.get(name)) for name in folder.names]


def version_of(server: Server) -> str:
    return httpx.get(f"{server.url}/model_info", headers=server.headers, timeout=60).json()["weight_version"]


def post(server: Server, path: str, **body: Any) -> None:
    httpx.post(f"{server.url}/{path}", json=body, headers=server.admin_headers, timeout=60).raise_for_status()


def logprob_error(model: Path, input_ids: list[int], response: list[int], logprobs: list[float]) -> float:
    """Return the largest difference from transformers in fp32."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = reference(torch.tensor([input_ids + response])).logits[0, len(input_ids) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
    return (torch.tensor(logprobs) - expected).abs().max().item()


def assert_serves(server: Server, new: Path, old: Path, version: str, prompt: list[int] = PROMPT) -> None:
    answer = generate(server, prompt, max_new_tokens=8).json()
    logprobs = [logprob for logprob, *_ in answer["meta_info"]["output_token_logprobs"]]
    assert logprob_error(new, prompt, answer["output_ids"], logprobs) < 0.05
    assert logprob_error(old, prompt, answer["output_ids"], logprobs) > 0.05
    assert answer["meta_info"]["weight_version"] == version == version_of(server)


@pytest.mark.parametrize("route", ROUTES)
def test_dense_in_fp32_to_servers_in_bf16(
    route: str,
    pair: LocalServers,
    dense: tuple[Path, Path],
    weight_sync: Callable[..., WeightSync],
    tmp_path: Path,
) -> None:
    sync = weight_sync(route)
    for step in range(3):
        old, new = dense[step % 2], dense[(step + 1) % 2]
        report = sync.update(pair.servers, tensors_of(new), f"{route}-{step}")
        assert report.failed == ()
        assert report.nbytes == sum(tensor.nbytes for _, tensor in tensors_of(new))
        assert report.seconds > 0
        for server in pair.servers:
            assert_serves(server, new, old, f"{route}-{step}")
    if route == "disk":
        assert [path.name for path in (tmp_path / "weight_sync").iterdir()] == ["disk-2"]
        files = list((tmp_path / "weight_sync/disk-2").iterdir())
        assert len(files) > 1
        for file in files:
            sizes = [tensor.nbytes for tensor in load_file(file).values()]
            assert sum(sizes) <= BUCKET_BYTES // 2 or len(sizes) == 1
    sync.close()
    assert not list((tmp_path / "weight_sync").glob("*"))


@pytest.mark.parametrize("route", ROUTES)
def test_moe(
    route: str,
    sglang_server: LocalServers,
    sglang_model: Path,
    tiny_model: Callable[..., Path],
    weight_sync: Callable[..., WeightSync],
) -> None:
    other = tiny_model("qwen3_moe", num_layers=2, seed=1)
    (server,) = sglang_server.servers
    sync = weight_sync(route, verify=True)
    for step, (new, old) in enumerate([(other, sglang_model), (sglang_model, other)]):
        report = sync.update([server], tensors_of(new), f"{route}-{step}")
        assert report.failed == ()
        assert_serves(server, new, old, f"{route}-{step}")


@pytest.mark.parametrize("route", ["disk", "tensor"])
def test_verification_names_a_weight_that_was_not_sent(
    route: str, pair: LocalServers, dense: tuple[Path, Path], weight_sync: Callable[..., WeightSync]
) -> None:
    sync = weight_sync(route, verify=True)
    some = [(name, tensor) for name, tensor in tensors_of(dense[1]) if "layers.1.mlp.down_proj" not in name]
    with pytest.raises(
        InputError, match=r"1 weights of .* were ignored: model\.layers\.1\.mlp\.down_proj\.weight"
    ):
        sync.update(pair.servers, some, "verify-0")
    assert sync.update(pair.servers, tensors_of(dense[1]), "verify-1").failed == ()
    for server in pair.servers:
        assert_serves(server, dense[1], dense[0], "verify-1")


def test_verification_finds_the_server_with_a_wrong_tensor(
    pair: LocalServers, dense: tuple[Path, Path], weight_sync: Callable[..., WeightSync]
) -> None:
    sync = weight_sync("tensor", verify=True)
    right, wrong = pair.servers
    assert sync.update([right], tensors_of(dense[1]), "wrong-0").failed == ()

    def export() -> Iterator[tuple[str, Tensor]]:
        *most, last = tensors_of(dense[1])
        yield from most
        wait_for(lambda: version_of(wrong) == INCOMPLETE)
        post(wrong, "weights_checker", action="reset_tensors")
        yield last

    assert sync.update([wrong], export(), "wrong-0").failed == (wrong,)
    assert sync.update([wrong], tensors_of(dense[1]), "wrong-0").failed == ()


def long_response(server: Server, sync: Callable[[], None]) -> dict[str, Any]:
    """Stream a response of ``LONG`` tokens, call ``sync`` after the tenth, return the last message."""
    body = {
        "input_ids": PROMPT,
        "sampling_params": {"temperature": 0, "ignore_eos": True, "max_new_tokens": LONG},
        "return_logprob": True,
        "stream": True,
    }
    message: dict[str, Any] = {}
    syncing = threading.Thread(target=sync)
    with httpx.stream(
        "POST", f"{server.url}/generate", json=body, headers=server.headers, timeout=120
    ) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                message = json.loads(line.removeprefix("data: "))
                if message["meta_info"]["completion_tokens"] >= 10 and not syncing.ident:
                    syncing.start()
    syncing.join()
    return message


@pytest.mark.parametrize("in_flight", ["retract", "in_place", "abort"])
def test_an_unfinished_response(
    in_flight: str, pair: LocalServers, dense: tuple[Path, Path], weight_sync: Callable[..., WeightSync]
) -> None:
    sync = weight_sync("tensor", in_flight=in_flight)
    server = pair.servers[0]
    assert sync.update([server], tensors_of(dense[0]), "flight-0").failed == ()
    failed: list[Any] = []
    answer = long_response(
        server, lambda: failed.append(sync.update([server], tensors_of(dense[1]), "flight-1").failed)
    )
    assert failed == [()]
    about = answer["meta_info"]
    if in_flight == "abort":
        assert about["finish_reason"]["type"] == "abort"
        assert 10 <= about["completion_tokens"] < LONG
    else:
        assert about["finish_reason"]["type"] == "length"
        first, second = about["weight_versions"]
        assert (first["version"], second["version"]) == ("flight-0", "flight-1")
        assert first["start"] == 0 < first["end"] == second["start"] < second["end"] == LONG
    if in_flight == "retract":
        # The remaining tokens are sampled from the new weights, with a new cache.
        cut, tokens = about["weight_versions"][1]["start"], answer["output_ids"]
        logprobs = [logprob for logprob, *_ in about["output_token_logprobs"]]
        assert logprob_error(dense[1], PROMPT + tokens[:cut], tokens[cut:], logprobs[cut:]) < 0.05
    # in_place keeps the old cache, which later requests with the same prefix and the same extra_key also use.
    assert_serves(server, dense[1], dense[0], "flight-1", PROMPT[::-1] if in_flight == "in_place" else PROMPT)


@pytest.mark.parametrize("route", ["distributed", "tensor"])
def test_a_server_that_refuses_a_bucket(
    route: str, pair: LocalServers, dense: tuple[Path, Path], weight_sync: Callable[..., WeightSync]
) -> None:
    """The other server, which takes part in the same broadcast, gets the weights."""
    sync = weight_sync(route)
    good, bad = pair.servers
    assert sync.update(pair.servers, tensors_of(dense[0]), "refusal-0").failed == ()

    def export() -> Iterator[tuple[str, Tensor]]:
        for i, item in enumerate(tensors_of(dense[1])):
            if i == 5:
                wait_for(lambda: version_of(bad) == INCOMPLETE)
                post(bad, "end_weight_update")
            yield item

    start = time.monotonic()
    assert sync.update(pair.servers, export(), "refusal-1").failed == (bad,)
    assert time.monotonic() - start < 60
    assert_serves(good, dense[1], dense[0], "refusal-1")
    assert version_of(bad) == INCOMPLETE
    assert sync.update(pair.servers, tensors_of(dense[1]), "refusal-2").failed == ()
    assert_serves(bad, dense[1], dense[0], "refusal-2")


def test_a_wrong_key_is_the_users_error(
    pair: LocalServers, dense: tuple[Path, Path], weight_sync: Callable[..., WeightSync]
) -> None:
    servers = [replace(server, admin_key="wrong") for server in pair.servers]
    with pytest.raises(InputError, match=r"refuses the API key .* set SGLANG_ADMIN_API_KEY to the server's"):
        weight_sync("tensor").update(servers, tensors_of(dense[1]), "key-0")


def test_a_folder_that_cannot_be_written(
    pair: LocalServers, dense: tuple[Path, Path], weight_sync: Callable[..., WeightSync], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"weight_sync.folder = .*/file/.*' cannot be written"):
        weight_sync("disk", folder=str(tmp_path / "file")).update(
            pair.servers, tensors_of(dense[1]), "folder-0"
        )
    assert generate(pair.servers[0], PROMPT, max_new_tokens=1).status_code == 200


def test_folders_of_a_killed_run_are_removed(
    pair: LocalServers, dense: tuple[Path, Path], weight_sync: Callable[..., WeightSync], tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    ours, others = (shared / str(run)[1:].replace("/", "%2F") for run in (tmp_path, tmp_path / "another"))
    for folder in (ours / "killed-3", ours / "killed-4.incomplete", others / "alive-5"):
        folder.mkdir(parents=True)
    assert (
        not weight_sync("disk", folder=str(shared))
        .update(pair.servers, tensors_of(dense[1]), "left-0")
        .failed
    )
    assert [path.name for path in ours.iterdir()] == ["left-0"]
    assert stat.S_IMODE(ours.stat().st_mode) == 0o700
    assert [path.name for path in others.iterdir()] == ["alive-5"]


def test_memory_is_released_and_resumed(
    sglang_server: LocalServers,
    sglang_model: Path,
    tiny_model: Callable[..., Path],
    weight_sync: Callable[..., WeightSync],
) -> None:
    other = tiny_model("qwen3_moe", num_layers=2, seed=1)
    (server,) = sglang_server.servers
    sync = weight_sync("tensor")
    assert sync.update([server], tensors_of(sglang_model), "memory-0").failed == ()
    release_memory([server], 60)
    assert resume_memory([server], ("weights",), 60) == (server,)
    assert sync.update([server], tensors_of(other), "memory-1").failed == ()
    assert resume_memory([server], ("kv_cache",), 60) == (server,)
    assert_serves(server, other, sglang_model, "memory-1")


def test_memory_of_a_restarted_server_is_not_touched(pair: LocalServers) -> None:
    """Release and resume skip a server that has not been synced since its restart.

    SGLang dies when it resumes memory that it has not released.
    """
    pair.restart(1)
    pair.wait_ready(1)
    release_memory(pair.servers[1:], 60)
    assert resume_memory(pair.servers[1:], ("weights", "kv_cache"), 60) == ()
    assert generate(pair.servers[1], PROMPT, max_new_tokens=1).status_code == 200


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


def gathered(tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors on two ranks that hold half of each."""
    for name, tensor in tensors:
        shards = [torch.empty_like(tensor.view(2, -1)[0]) for _ in range(2)]
        dist.all_gather(shards, tensor.view(2, -1)[dist.get_rank()])
        yield name, torch.stack(shards).view(tensor.shape)


def sync_on_a_rank(server: Server, model: Path, folder: Path) -> list[Any]:
    """Sync by every route on one of two ranks, first with a wrong key."""
    tensors = tensors_of(model)
    done = 0

    def export() -> Iterator[tuple[str, Tensor]]:
        nonlocal done
        for named in gathered(tensors):
            done += 1
            yield named

    results: list[Any] = []
    for route in ROUTES:
        sync = make_weight_sync(
            WeightSyncConfig(route=route, bucket_bytes=BUCKET_BYTES, timeout_s=60.0),
            "disaggregated",
            CPU,
            folder,
        )
        for target in (replace(server, admin_key="wrong"), server):
            try:
                results.append(sync.update([target], export(), f"ranks-{route}"))
            except InputError as error:
                results.append(str(error))
            assert done == len(tensors)
            done = 0
        sync.close()
    return results


def test_two_ranks_iterate_the_whole_export(
    two_ranks: RankPool, pair: LocalServers, dense: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = two_ranks.run(2, sync_on_a_rank, pair.servers[0], dense[1], tmp_path)
    assert first == second
    for refused, report in zip(first[::2], first[1::2], strict=True):
        assert "SGLANG_ADMIN_API_KEY" in refused
        assert report.failed == ()
    assert_serves(pair.servers[0], dense[1], dense[0], "ranks-tensor")


def sync_to_colocated_servers(servers: list[Server], models: tuple[Path, Path]) -> list[Any]:
    """Sync on one of two nodes of one rank, first to the second node's server alone, then to both."""
    os.environ["SLURMD_NODENAME"] = f"node{dist.get_rank()}"
    try:
        cfg = WeightSyncConfig(bucket_bytes=BUCKET_BYTES, timeout_s=60.0, verify=True)
        sync = make_weight_sync(cfg, "colocated", CPU, Path("unused"))
        return [
            sync.update(servers[1:], gathered(tensors_of(models[0])), "nodes-0"),
            sync.update(servers, gathered(tensors_of(models[1])), "nodes-1"),
        ]
    finally:
        del os.environ["SLURMD_NODENAME"]


def test_each_node_sends_to_its_own_servers(
    two_ranks: RankPool, pair: LocalServers, dense: tuple[Path, Path]
) -> None:
    servers = [replace(server, node=f"node{i}") for i, server in enumerate(pair.servers)]
    first, second = two_ranks.run(2, sync_to_colocated_servers, servers, dense)
    assert first == second
    assert [report.failed for report in first] == [(), ()]
    for server in servers:
        assert_serves(server, dense[1], dense[0], "nodes-1")


@pytest.mark.parametrize("route", ["distributed", "tensor"])
def test_a_server_dies_between_buckets_and_comes_back(
    route: str, pair: LocalServers, dense: tuple[Path, Path], weight_sync: Callable[..., WeightSync]
) -> None:
    sync = weight_sync(route)
    alive, dead = pair.servers
    assert sync.update(pair.servers, tensors_of(dense[0]), "death-0").failed == ()

    def export() -> Iterator[tuple[str, Tensor]]:
        for i, item in enumerate(tensors_of(dense[1])):
            if i == 5:
                wait_for(lambda: version_of(dead) == INCOMPLETE)
                os.killpg(process_group(pair, 1), signal.SIGKILL)
            yield item

    start = time.monotonic()
    assert sync.update(pair.servers, export(), "death-1").failed == (dead,)
    assert time.monotonic() - start < 60
    assert_serves(alive, dense[1], dense[0], "death-1")

    pair.restart(1)
    pair.wait_ready(1)
    assert version_of(dead) == "default"
    assert sync.update([dead], tensors_of(dense[1]), "death-1").failed == ()
    assert sync.update(pair.servers, tensors_of(dense[1]), "death-2").failed == ()
    for server in pair.servers:
        assert_serves(server, dense[1], dense[0], "death-2")


@pytest.mark.parametrize("route", ["distributed", "tensor"])
def test_a_server_that_hangs_times_out(
    route: str, pair: LocalServers, dense: tuple[Path, Path], weight_sync: Callable[..., WeightSync]
) -> None:
    alive, hung = pair.servers
    sync = weight_sync(route, timeout_s=10.0)
    os.killpg(process_group(pair, 1), signal.SIGSTOP)
    try:
        start = time.monotonic()
        assert sync.update(pair.servers, tensors_of(dense[1]), "hung-0").failed == (hung,)
        assert time.monotonic() - start < 40
    finally:
        os.killpg(process_group(pair, 1), signal.SIGCONT)
    assert_serves(alive, dense[1], dense[0], "hung-0")


class Halves:
    """Weights of two pipeline stages: each of two ranks has every second tensor, and sends it itself.

    The second stage calls ``interrupt`` when it has exported five tensors.
    """

    senders = (0, 1)

    def __init__(self, model: Path, interrupt: Callable[[], None] = lambda: None) -> None:
        self._tensors, self._interrupt = tensors_of(model), interrupt

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        raise AssertionError("a stage exports the tensors of all stages")

    def of_stage(self) -> Iterator[tuple[str, Tensor]]:
        for i, named in enumerate(self._tensors[dist.get_rank() :: 2]):
            if i == 5 and dist.get_rank() == 1:
                self._interrupt()
            yield named


def sync_from_two_stages(servers: list[Server], models: tuple[Path, Path]) -> list[Any]:
    """Sync from one of two ranks; a server leaves the update in the third sync, an error ends the fifth."""
    cfg = WeightSyncConfig(bucket_bytes=BUCKET_BYTES, timeout_s=60.0)
    sync = make_weight_sync(cfg, "disaggregated", CPU, Path("unused"))

    def end_update() -> None:
        wait_for(lambda: version_of(servers[1]) == INCOMPLETE)
        post(servers[1], "end_weight_update")

    def fail() -> None:
        raise InputError("an error of the second stage")

    old, new = models
    results: list[Any] = []
    for i, weights in enumerate(
        [Halves(old), Halves(new), Halves(old, end_update), Halves(new), Halves(old, fail), Halves(new)]
    ):
        try:
            results.append(sync.update(servers, weights, f"stages-{i}"))
        except InputError as error:
            results.append(str(error))
    sync.close()
    return results


def test_each_stage_sends_its_own_tensors(
    two_ranks: RankPool, pair: LocalServers, dense: tuple[Path, Path]
) -> None:
    """Two senders with a group each, whose buckets arrive in turns; all senders drop a server that fails."""
    first, second = two_ranks.run(2, sync_from_two_stages, pair.servers, dense)
    assert first == second
    refused, error = first.pop(2), first.pop(3)
    assert refused.failed == (pair.servers[1],)
    assert error == "an error of the second stage"
    for report in first:
        assert report.failed == ()
        assert report.nbytes == sum(tensor.nbytes for _, tensor in tensors_of(dense[1]))
    for server in pair.servers:
        assert_serves(server, dense[1], dense[0], "stages-5")
