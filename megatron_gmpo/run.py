"""From a config to the parts of a run. Everything that can be refused is refused before the process group starts."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import tomli_w
import torch
import torch.distributed as dist
import transformers

from . import files
from .batch.samples import Prompt
from .checkpoint import check_model, checkpoint_size, latest_checkpoint, model_identity, read_state
from .config import Config, exit_with_one_line, load_config
from .data.prompts import load_prompts, load_tokenizer
from .distributed import rank
from .errors import Exit, InputError, RunError, StopRequest
from .metrics.logger import check_wandb
from .models.description import DTYPES, ModelDescription, describe_model, read_hf_config
from .platform import (
    check_deterministic,
    choose_device,
    prepare_megatron,
    seed_everything,
    start_process_group,
)
from .platform.capabilities import capabilities_of
from .policy.build import check_optimizer
from .policy.fp8 import check_fp8
from .policy.parallel import start_model_parallel
from .policy.policy import Policy
from .rewards import Reward, resolve_reward
from .rollout.embedded import EmbeddedEngine
from .rollout.engine import RolloutEngine
from .rollout.replay import check_groups
from .rollout.sglang.start import check_servers, start_sglang
from .weights.safetensors_folder import SafetensorsFolder


@dataclass
class Run:
    """A checked config, with what it names loaded, but no process group and no weights yet.

    Attributes:
        checkpoint: the newest one in the run folder, to go on from, or None.
        step: steps taken when it was written, 0 without one.
        checkpoint_bytes: about what one takes on the disk.
        prompts: training problems; empty when saved rollouts are replayed.
        eval_sets: benchmarks by name.
    """

    cfg: Config
    device: torch.device
    description: ModelDescription
    tokenizer: Any
    reward: Reward
    eval_sets: dict[str, list[Prompt]]
    prompts: list[Prompt]
    checkpoint: Path | None
    step: int
    checkpoint_bytes: int

    @property
    def run_dir(self) -> Path:
        return Path(self.cfg.run_dir)

    @property
    def checkpoint_dir(self) -> Path:
        return self.run_dir / "checkpoints"

    @property
    def transcripts(self) -> Path:
        return self.run_dir / "transcripts.jsonl"

    def start(self) -> None:
        """Joins the process group and seeds every generator."""
        start_process_group(self.device, self.cfg.distributed_timeout_s)
        seed_everything(self.cfg.seed)
        torch.use_deterministic_algorithms(self.description.transformer.deterministic_mode)

    def policy(self, *, trainable: bool = True) -> Policy:
        """The policy with the weights of ``model.path``; makes the model-parallel groups."""
        groups = start_model_parallel(self.cfg.parallel, self.cfg.seed, self.cfg.distributed_timeout_s)
        return Policy(self.cfg, self.description, groups, self.device, trainable)

    def engine(self) -> RolloutEngine:
        """The rollout engine; servers of ours are started and load while the policy is built, if on devices of their own."""
        if self.cfg.rollout.engine == "sglang":
            return start_sglang(self.cfg, self.description.hf, self.tokenizer, self.device)
        return EmbeddedEngine(
            self.cfg.model.path,
            self.tokenizer,
            device=self.device,
            dtype=DTYPES[self.cfg.rollout.dtype or self.cfg.model.dtype],
            batch_size=self.cfg.rollout.batch_size,
            seed=self.cfg.seed,
            routed_experts=self.cfg.rollout.routed_experts,
            quantized=self.cfg.rollout.quantization == "fp8",
        )

    def write_config(self) -> None:
        """Puts the resolved config into the run folder, as a file that ``load_config`` reads."""
        if rank() == 0:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            content = tomli_w.dumps(self.cfg.model_dump(mode="json", exclude_none=True))
            files.write(self.run_dir / "config.toml", content)


def prepare(cfg: Config, *, train: bool) -> Run:
    """Checks the config against the model, the data, the world size and the run folder.

    Args:
        train: whether training prompts are needed and the run folder will be written.

    Raises:
        InputError: see ``describe_model``, ``check_fp8``, ``check_optimizer``, ``check_deterministic``, ``load_prompts``,
            ``check_groups``, ``resolve_reward``; or a run folder that holds another run.
    """
    device = choose_device(cfg.device)
    prepare_megatron(device)
    description = describe_model(cfg, int(os.environ.get("WORLD_SIZE", "1")), device)
    machine = capabilities_of(device)
    check_fp8(cfg, description.transformer, machine)
    if train:
        check_optimizer(cfg.optimizer, machine)
    check_deterministic(description.transformer.deterministic_mode, device)
    weights = SafetensorsFolder(cfg.model.path)
    identity = model_identity(description.hf, cfg.model.dtype)
    if cfg.model.reference_path:
        reference = read_hf_config(cfg.model.reference_path, "model.reference_path")
        SafetensorsFolder(cfg.model.reference_path)
        if model_identity(reference, cfg.model.dtype) != identity:
            raise InputError(
                f"model.reference_path = {cfg.model.reference_path!r} is not of the shape of model.path: give one that is"
            )
    checkpoint = latest_checkpoint(Path(cfg.run_dir) / "checkpoints")
    if checkpoint:
        check_model(checkpoint, identity)
        if train and not cfg.checkpoint.resume:
            raise InputError(
                f"run_dir = {cfg.run_dir!r} already holds {checkpoint.name}: set checkpoint.resume = true or choose another run_dir"
            )
        if (
            train
            and read_state(checkpoint)["config"]["train"].get("freeze_router")
            and not cfg.train.freeze_router
        ):
            raise InputError(
                f"train.freeze_router = false, but {checkpoint} was written with true and has no optimizer state of the routers: "
                "set it to true or choose another run_dir"
            )
    check_wandb(cfg.log.wandb_project)
    generates = cfg.eval.sets or (train and not cfg.rollout.replay_path)
    if (
        cfg.rollout.engine == "sglang" and generates and os.environ.get("RANK", "0") == "0"
    ):  # the only rank that speaks to servers
        check_servers(cfg, description.hf, device)
    tokenizer = load_tokenizer(cfg.model.path)
    eval_sets = {
        name: load_prompts(data, tokenizer, f"eval.sets.{name}") for name, data in cfg.eval.sets.items()
    }
    step: int = read_state(checkpoint)["step"] if checkpoint else 0
    prompts: list[Prompt] = []
    if train and cfg.rollout.replay_path:
        check_groups(cfg.rollout.replay_path, range(step, cfg.train.num_steps))
    elif train:
        prompts = load_prompts(cfg.data, tokenizer)
    reward = resolve_reward(cfg.reward)
    checkpoint_bytes = checkpoint_size(
        sum(math.prod(weights.shape(name)) for name in weights.names), DTYPES[cfg.model.dtype]
    )
    return Run(
        cfg, device, description, tokenizer, reward, eval_sets, prompts, checkpoint, step, checkpoint_bytes
    )


def start_command(command: Callable[[Config], None]) -> None:
    """Runs a command line's function on the config of ``sys.argv``: one line for a ``RunError``, with its exit code."""
    _keep_children_light()
    _set_up_messages()
    code = Exit.DONE
    try:
        command(load_config(sys.argv[1:]))
    except StopRequest as stop:  # of every rank, each of which has done its part
        code = stop.exit
        if rank() == 0:
            print(stop, file=sys.stderr, flush=True)
    except RunError as error:
        exit_with_one_line(error, error.exit)
    # not after an error: the other ranks may stand in a collective, and NCCL would wait for them
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def _set_up_messages() -> None:
    """Our own log lines and the libraries' progress bars from the first rank only."""
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO if first else logging.WARNING)
    # Megatron and torch disagree on names inside torch.distributed.checkpoint
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\.core|torch\.distributed")
    if not first:
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


def closing_reward(reward: Reward) -> Any:
    """A context that stops a reward's processes, where it has some."""
    return closing(reward) if hasattr(reward, "close") else nullcontext()  # pyright: ignore[reportArgumentType]


def _keep_children_light() -> None:
    """Spares spawned processes (reward workers, Megatron's checkpoint writer) the import of this command with torch and Megatron.

    Each would re-import the main module (multiprocessing/spawn.py:get_preparation_data); nothing they run is defined there.
    """
    main: Any = sys.modules["__main__"]
    main.__spec__ = main.__file__ = None
