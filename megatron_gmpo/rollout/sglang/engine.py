"""The rollout engine that asks SGLang servers. The first rank speaks to them; every rank takes part in the weight syncs."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.cuda.nccl as nccl
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from ...batch.samples import Prompt, Sample, SampleGroup, version_spans_of
from ...config import Config
from ...distributed import barrier, broadcast_object, rank, world_size
from ...errors import InputError, ServerError
from ...metrics.figures import Metric
from ...models import fp8_blocks
from ...weights.companions import copy_companions
from ..engine import SamplingParams, end_token_ids, response_text
from .client import Response, RolloutClient
from .memory import release_memory, resume_memory
from .servers import LocalServers, Server, external_servers, published_servers
from .sync import WeightSync, make_weight_sync

_POLL_S = 0.2  # three things may end a wait (samples, a server that came back, a problem), so they are looked at in turn
_IMPORT_TIMEOUT_S = 300.0
_SIGN_OF_LIFE_S = 20.0
"""The other ranks wait in a collective for the first one's news; it never takes longer than this."""


@dataclass(frozen=True)
class Ticket:
    """Samples on their way: ``SGLangEngine.submit`` gives it, ``wait`` redeems it. The future is on the first rank only."""

    prompts: list[Prompt]
    sampling: SamplingParams
    future: Future[list[list[Response]]] | None


def check_servers(cfg: Config, hf: Any, device: torch.device) -> None:
    """
    Args:
        hf: the model's Hugging Face config.

    Raises:
        InputError: no environment to start servers from, one of ``rollout.server_urls`` that cannot be used, a model in FP8 that the
            servers would start with and the weight sync would not send, or another NCCL than the trainer's for a sync that uses it.
    """
    if getattr(hf, "quantization_config", None) and cfg.rollout.quantization == "none":
        raise InputError(
            f"model.path = {cfg.model.path!r} is in FP8: set rollout.quantization = 'fp8', or give the model in bf16"
        )
    if cfg.rollout.server_urls:
        external_servers(cfg.rollout.server_urls)
    elif not cfg.rollout.servers_file and not Path(cfg.sglang.python).is_file():
        raise InputError(
            f"sglang.python = {cfg.sglang.python!r} is not there: run make sglang, or give rollout.server_urls or servers_file"
        )
    if cfg.weight_sync.route == "distributed" and device.type == "cuda" and not cfg.rollout.server_urls:
        _check_nccl(cfg.sglang.python)


def _check_nccl(python: str) -> None:
    """NCCL joins only processes of its own version (its init.cc)."""
    question = "import torch.cuda.nccl as nccl; print(*nccl.version(), sep='.')"
    try:
        theirs = subprocess.run(
            [python, "-I", "-c", question], capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        theirs = ""  # it is on other nodes, or for the servers to say
    ours = ".".join(map(str, nccl.version()))
    if theirs and theirs != ours:
        raise InputError(
            f"weight_sync.route = 'distributed' needs one NCCL, but the trainer's torch has {ours} and that of sglang.python {theirs}: "
            "choose 'disk', or install a torch with the same one"
        )


def start_sglang(cfg: Config, hf: Any, tokenizer: Any, device: torch.device) -> SGLangEngine:
    """The engine of ``cfg``, on the first rank with its servers starting, or up where they share the trainer's GPUs; collective.

    Raises:
        InputError: as ``LocalServers`` and ``make_weight_sync``; or colocated servers that take more GPUs than the trainer has.
        ServerError: as ``published_servers``; or colocated servers do not start.

    Args:
        hf: the model's Hugging Face config.
        tokenizer: the model's.
        device: where the policy lives.
    """
    rollout, run_dir = cfg.rollout, Path(cfg.run_dir)
    gpus = rollout.num_servers * cfg.sglang.tensor_parallel_size
    if device.type == "cuda" and rollout.placement == "colocated" and gpus > world_size():
        raise InputError(
            f"rollout.num_servers = {rollout.num_servers} take {gpus} GPUs, the trainer has {world_size()}: start fewer"
        )
    servers: list[Server] = []
    local = None
    if rank() == 0 and rollout.server_urls:
        servers = external_servers(rollout.server_urls)
    elif rank() == 0 and rollout.servers_file:
        servers = published_servers(Path(rollout.servers_file), cfg.sglang.start_timeout_s)
    elif rank() == 0:
        first_gpu = 0 if rollout.placement == "colocated" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        local = local_servers(cfg, device, run_dir / "servers", first_gpu=first_gpu)
        servers = local.servers
    weight_sync = cfg.weight_sync
    if (
        not rollout.max_staleness
    ):  # nothing is ever in flight, and a server that is paused to retract spins on a core
        weight_sync = weight_sync.model_copy(update={"in_flight": "abort"})
    sync = make_weight_sync(
        weight_sync, rollout.placement, device, run_dir, quantized=rollout.quantization == "fp8"
    )
    routed_experts = (hf.num_hidden_layers, hf.num_experts_per_tok) if rollout.routed_experts else None
    engine = SGLangEngine(cfg, servers, local, sync, tokenizer, routed_experts)
    if device.type == "cuda" and rollout.placement == "colocated":
        problem = None
        try:
            if local:
                local.wait_ready()
        except ServerError as error:
            problem = error
        if problem := broadcast_object(
            problem
        ):  # SGLang sizes its cache by what is free: nobody allocates before
            engine.close()
            raise problem
    return engine


def local_servers(
    cfg: Config,
    device: torch.device,
    log_dir: Path,
    *,
    first_gpu: int = 0,
    keys: tuple[str, str] | None = None,
) -> LocalServers:
    """``rollout.num_servers`` servers of the model of ``cfg`` on this machine, not started yet; see ``LocalServers``."""
    model_path, dtype = cfg.model.path, cfg.model.dtype
    options: dict[str, Any] = {}
    if cfg.rollout.quantization == "fp8":
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0):
            # deep_gemm_wrapper/configurer.py, fp8_utils.py:requant_weight_ue8m0_inplace
            raise InputError(
                "rollout.quantization = 'fp8' needs Hopper GPUs: on newer ones SGLang packs the scales that it loads, and takes no others "
                "afterwards; set it to 'none'"
            )
        model_path, dtype = (
            str(fp8_start_folder(Path(model_path), log_dir / "fp8_model")),
            "bf16",
        )  # which FP8 kernels give
        options["load_format"] = "dummy"
    if cfg.rollout.routed_experts:
        options["enable_return_routed_experts"] = True
    if cfg.rollout.placement == "colocated":
        options["enable_memory_saver"] = True
    return LocalServers(
        model_path,
        cfg.rollout.num_servers,
        cfg.sglang,
        log_dir,
        dtype=dtype,
        seed=cfg.seed,
        device=device,
        options=options,
        first_gpu=first_gpu,
        keys=keys,
    )


def fp8_start_folder(model: Path, folder: Path) -> Path:
    """What a server starts from whose FP8 weights come with the first sync: the model's folder, but for the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    copy_companions(model, folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": fp8_blocks.QUANTIZATION_CONFIG}, indent=2)
    )
    return folder


def _generation_config(model: str) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:  # as transformers does for a model without one
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(model))


def _make_room() -> None:
    """Gives the GPU what torch holds ready for later, on every rank: servers are about to take it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.ipc_collect()  # buckets that servers have read
        torch.cuda.empty_cache()
    barrier()


class SGLangEngine:
    """A ``RolloutEngine`` over SGLang servers, which may generate while the trainer trains.

    A server that was lost comes back without the current weights. As long as samples are waited for, all ranks then sync it together,
    so the weights must not change between ``update_weights`` and the ``generate`` or ``wait`` calls that belong to it.

    Args:
        cfg: the run's config.
        servers: whom to ask.
        local: the processes behind them, on the first rank, when they are ours.
        sync: the route of the weights.
        tokenizer: of the model, to decode responses.
        routed_experts: (layers, topk) to record every token's experts, or None.
    """

    def __init__(
        self,
        cfg: Config,
        servers: list[Server],
        local: LocalServers | None,
        sync: WeightSync,
        tokenizer: Any,
        routed_experts: tuple[int, int] | None = None,
    ) -> None:
        self.version = -1
        self._cfg, self._servers, self._sync, self._tokenizer, self._routed_experts = (
            cfg,
            servers,
            sync,
            tokenizer,
            routed_experts,
        )
        self._end_ids = end_token_ids(_generation_config(cfg.model.path), tokenizer)
        self._nonce = secrets.token_hex(4)
        self._client = (
            RolloutClient(servers, local, cfg.sglang, self._nonce, bool(routed_experts))
            if rank() == 0
            else None
        )
        self._asleep = False
        self._figures: dict[str, Metric] = {}
        self._counted = (0, 0)

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> list[SampleGroup]:
        """See ``RolloutEngine.generate``.

        ``rollout_logprobs`` belong to the distribution after temperature, before top-k and top-p.

        Raises:
            ServerError: no server is left, or none gives an answer within its limits; on every rank.
            InputError: the servers refuse a request; on every rank.
        """
        return self.wait(self.submit(prompts, sampling))

    def submit(self, prompts: list[Prompt], sampling: SamplingParams) -> Ticket:
        """Starts sampling and returns at once."""
        future = self._client and self._client.submit(
            [p.input_ids for p in prompts], sampling, sorted(self._end_ids)
        )
        return Ticket(prompts, sampling, future)

    def wait(self, ticket: Ticket) -> list[SampleGroup]:
        """The groups of a ticket, on every rank; raises as ``generate``."""

        def finished() -> list[list[Sample]] | None:
            if not (ticket.future and ticket.future.done()):
                return None
            rows = zip(ticket.prompts, ticket.future.result(), strict=True)
            return [
                [self._sample_of(p.input_ids, r, ticket.sampling) for r in responses] for p, responses in rows
            ]

        return [
            SampleGroup(prompt, samples)
            for prompt, samples in zip(ticket.prompts, self._until(finished), strict=True)
        ]

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See ``RolloutEngine.update_weights``. ``named_tensors`` is kept, to be iterated again for a server that comes back.

        Unfinished responses go on as ``weight_sync.in_flight`` says. Does nothing when ``version`` is what the servers have.
        """
        if version == self.version and not self._asleep:
            return
        self.version, self._named_tensors = version, named_tensors
        if self._client:
            self._client.expect(version)
        self._until(lambda: self._client and self._client.any_ready() and not self._client.servers_to_sync())

    def sleep(self) -> None:
        """See ``RolloutEngine.sleep``: with colocated placement the servers give back their memory, all responses being in."""
        if self._cfg.rollout.placement == "colocated" and not self._asleep:
            if self._client:
                release_memory(self._servers, self._cfg.weight_sync.timeout_s)
            broadcast_object(None)  # nobody allocates before
            self._asleep = True

    def take_metrics(self) -> dict[str, Metric]:
        """See ``RolloutEngine.take_metrics``."""
        taken, self._figures = self._figures, {}
        if self._client:
            now = (self._client.retries, self._client.restarts)
            retries, restarts = (new - old for new, old in zip(now, self._counted, strict=True))
            self._counted = now
            taken |= {"rollout/retries": Metric(retries), "rollout/server_restarts": Metric(restarts)}
        return taken

    def close(self) -> None:
        """Ends unfinished requests and our servers."""
        if self._client:
            self._client.close()
        self._sync.close()

    def _until(self, finished: Callable[[], Any]) -> Any:
        """Waits for the first rank to have something true from ``finished``, and gives it to every rank. Servers that come back
        meanwhile are synced."""
        while True:
            news, result = broadcast_object(self._news(finished) if self._client else None)
            if news == "finished":
                return result
            if news == "failed":
                raise result
            if news == "sync":
                self._sync_weights(result)

    def _news(self, finished: Callable[[], Any]) -> tuple[str, Any]:
        assert self._client
        until = time.monotonic() + _SIGN_OF_LIFE_S
        try:
            while time.monotonic() < until:
                if servers := self._client.servers_to_sync():
                    return "sync", servers
                if result := finished():
                    return "finished", result
                time.sleep(_POLL_S)
        except (
            InputError,
            ServerError,
        ) as error:  # raised again on every rank, which would else wait for this one
            return "failed", error
        return "waiting", None

    def _sync_weights(self, servers: list[Server]) -> None:
        asleep, self._asleep = self._asleep, False
        waking: tuple[Server, ...] = ()
        if asleep:
            _make_room()
            if self._client:
                waking = resume_memory(servers, ("weights",), self._cfg.weight_sync.timeout_s)
            broadcast_object(None)
        report = self._sync.update(servers, self._named_tensors, f"{self._nonce}-{self.version}")
        if asleep:
            _make_room()
        if waking:
            resume_memory(waking, ("kv_cache",), self._cfg.weight_sync.timeout_s)
        self._figures["weight_sync/gigabytes_per_second"] = Metric(report.nbytes / 1e9, report.seconds)
        if self._client:
            self._client.synced(servers, report.failed)

    def _sample_of(self, prompt: list[int], response: Response, sampling: SamplingParams) -> Sample:
        return Sample.from_response(
            prompt,
            response.tokens,
            response.logprobs,
            text=response_text(self._tokenizer, response.tokens.tolist(), self._end_ids, sampling.stop),
            finish_reason="stop" if response.finish_reason == "stop" else "length",
            policy_version=int(response.versions.min()),
            version_spans=version_spans_of(response.versions, start=len(prompt)),
            routed_experts=self._routing(response, len(prompt)),
        )

    def _routing(self, response: Response, prompt_length: int) -> np.ndarray | None:
        if not self._routed_experts:
            return None
        layers, topk = self._routed_experts
        expected = (prompt_length + len(response.tokens) - 1, layers * topk)
        if response.routed_experts is None or response.routed_experts.shape != expected:
            found = None if response.routed_experts is None else response.routed_experts.shape
            raise ServerError(
                f"SGLang recorded routed experts of shape {found}, not {expected}: does it serve the model of model.path?"
            )
        return response.routed_experts.reshape(-1, layers, topk)
