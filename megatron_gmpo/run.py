"""Make the parts of a run from its config, and refuse bad input before the process group starts."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
import torch.distributed as dist

from . import files
from .batch.exchange import Exchange, check_folder
from .batch.images import ImageTokens
from .batch.samples import Prompt
from .checkpoint import check_model, checkpoint_size, room_to_save
from .command_line import load_config, one_line_errors
from .config import Config
from .data.prompts import check_lengths, load_images, load_prompts, load_tokenizer
from .data.stream import PromptStream
from .distributed import Nodes, broadcast_object, rank, world_size
from .errors import Exit, InputError, StopRequest, printable
from .metrics.logger import check_wandb
from .metrics.messages import set_up_messages
from .models.description import DTYPES, ModelDescription, describe_model, read_hf_config
from .models.identity import model_identity
from .models.snapshot import with_local_models
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
from .rollout.embedded import make_embedded
from .rollout.embedded_model import check_embedded_fits
from .rollout.engine import RolloutEngine
from .rollout.environments.tools import tool_schemas
from .rollout.images import RunImages, run_images
from .rollout.player import Player, make_player
from .rollout.replay import check_groups, load_groups
from .rollout.sglang.start import check_servers, start_sglang
from .supervision import signals
from .supervision.records import node_name
from .weights.run_checkpoint import choose_whole, find_candidates, full_damage, read_state, step_of
from .weights.safetensors_folder import SafetensorsFolder

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A checked config with its tokenizer, data and reward loaded.

    The process group and the weights do not exist yet.

    Attributes:
        eval_sets: benchmarks by name.
        images: the images of the run; None for a model without vision.
        player: plays episodes, if the config has an environment or tools and samples.
        prompts: stream of training problems, where ``checkpoint`` left it; None when saved rollouts are
            replayed.
        checkpoint: newest checkpoint in the run folder, from which the run resumes, or None.
        damage: what is wrong with the checkpoint that should be the newest, if ``checkpoint`` replaces it.
        step: completed steps in ``checkpoint``; 0 without a checkpoint.
        checkpoint_bytes: estimated size of one checkpoint on disk.
    """

    cfg: Config
    device: torch.device
    description: ModelDescription
    tokenizer: Any
    reward: Reward
    eval_sets: dict[str, list[Prompt]]
    images: RunImages | None
    player: Player | None
    prompts: PromptStream | None
    checkpoint: Path | None
    damage: str
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

    def headline(self, loss: str) -> str:
        """Return one line that says what the run trains, with the description of its loss."""
        kind = "MoE" if self.description.is_moe else "dense"
        data = self.cfg.data.path or ", ".join(self.cfg.data.files)
        problems = f"replay of {self.cfg.rollout.replay_path}"
        if self.prompts:
            problems = f"{len(self.prompts)} problems of {data}"
        resumed = f"; resumed at step {self.step}" if self.step else ""
        fusions = f"; {self.description.fusions}" if self.description.fusions else ""
        return (
            f"{self.cfg.model.path} ({self.description.whole.model_type}, {kind}) on {world_size()} ranks; "
            f"{problems}; loss {loss}; "
            f"run_dir {self.run_dir}{resumed}{fusions}"
        )

    def start(self) -> None:
        """Join the process group and seed every random generator."""
        if not dist.is_initialized():
            start_process_group(self.device, self.cfg.distributed_timeout_s)
        seed_everything(self.cfg.seed)
        torch.use_deterministic_algorithms(self.description.transformer.deterministic_mode)

    def verify_checkpoint(self) -> None:
        """Read the checkpoint's files and compare checksums, if ``checkpoint.verify`` is true. Collective.

        With ``checkpoint.fall_back``, an older checkpoint replaces one that is damaged.

        Raises:
            InputError: the checkpoint is damaged; see ``choose_whole``. Raised on every rank.
        """
        settings, before = self.cfg.checkpoint, self.checkpoint
        if self.checkpoint and settings.verify:
            candidates = broadcast_object(find_candidates(self.checkpoint_dir))
            self.checkpoint, self.damage = choose_whole(
                candidates, fall_back=settings.fall_back, damage_of=full_damage
            )
            assert self.checkpoint
            self.step = step_of(self.checkpoint)
            if self.prompts and self.checkpoint != before:
                _move_to(self.checkpoint, self.prompts, self.cfg.data.allow_changed)
        if self.damage and rank() == 0:
            logger.warning(f"warning: {self.damage}; going on from {self.checkpoint}")

    def needed_space(self) -> tuple[int, str]:
        """Return the bytes that checkpoints will add to the run folder, and a phrase that states why."""
        checkpoint, last = self.cfg.checkpoint, self.cfg.train.num_steps
        saves = {last} if checkpoint.save_final else set[int]()
        if interval := checkpoint.save_interval:
            saves.update(range(self.step - self.step % interval + interval, last + 1, interval))
        count, why = room_to_save(self.checkpoint_dir, checkpoint.keep_last, len(saves))
        return count * self.checkpoint_bytes, f"{why}, {self.checkpoint_bytes / 1e9:.3g} GB each"

    def policy(self, *, trainable: bool = True) -> Policy:
        """Make the model-parallel groups and return the policy with the weights of ``model.path``."""
        groups = start_model_parallel(self.cfg.parallel, self.cfg.seed, self.cfg.distributed_timeout_s)
        pixels = self.images and self.images.pixels
        return Policy(self.cfg, self.description, groups, self.device, trainable, pixels)

    def exchange(self, replica: int) -> Exchange:
        """Return what moves a step's tokens to the ranks that train them. Collective."""
        cfg, timeout_s = self.cfg, self.cfg.distributed_timeout_s
        routing = self.description.routing if cfg.needs_rollout_routing else None
        nodes = Nodes(node_name(), timeout_s)
        return Exchange(nodes, replica, cfg.rollout.exchange_folder, timeout_s, routing)

    def engine(self) -> RolloutEngine:
        """Return the rollout engine.

        SGLang servers on their own devices load in the background while the policy is built.
        """
        if self.cfg.rollout.engine == "sglang":
            hf, images = self.description.hf, self.images
            return start_sglang(self.cfg, hf, self.tokenizer, self.device, self.player, images)
        return make_embedded(self.cfg, self.tokenizer, self.device, self.player, self.images)

    def write_config(self) -> None:
        """Write the resolved config to config.toml in the run folder. ``load_config`` can read that file."""
        if rank() == 0:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            content = tomli_w.dumps(self.cfg.model_dump(mode="json", exclude_none=True))
            files.write(self.run_dir / "config.toml", content)


def prepare(cfg: Config, *, train: bool) -> Run:
    """Check the config against the model, the data, the world size and the run folder.

    Args:
        train: whether to load the training prompts and check that the run folder can be written.

    Raises:
        InputError: the run folder contains another run, is not a folder or cannot be written; or see
            ``with_local_models``, ``describe_model``, ``check_fp8``, ``check_optimizer``, ``check_folder``,
            ``check_deterministic``, ``load_prompts``, ``check_lengths``, ``check_groups``, ``load_groups``,
            ``resolve_reward``, ``make_player``, ``Player.start``.
    """
    _check_run_dir(cfg.run_dir)
    device = choose_device(cfg.device)
    prepare_megatron(device)
    cfg = with_local_models(cfg, device)
    description = describe_model(cfg, int(os.environ.get("WORLD_SIZE", "1")), device)
    machine = capabilities_of(device)
    check_fp8(cfg, description.transformer, machine)
    if train:
        check_optimizer(cfg.optimizer, machine)
        check_folder(cfg.rollout.exchange_folder)
    check_deterministic(description.transformer.deterministic_mode, device)
    weights = SafetensorsFolder(cfg.model.path)
    identity = model_identity(description.whole, cfg.model.dtype)
    _check_reference(cfg, identity)
    candidates = find_candidates(Path(cfg.run_dir) / "checkpoints")
    checkpoint, damage = choose_whole(candidates, fall_back=cfg.checkpoint.fall_back)
    if checkpoint:
        check_model(checkpoint, identity)
        if train:
            _check_resume(cfg, checkpoint)
    check_wandb(cfg.log.wandb_project)
    generates = cfg.eval.sets or (train and not cfg.rollout.replay_path)
    on_rank_0 = os.environ.get("RANK", "0") == "0"  # the others would find the same
    if cfg.rollout.engine == "sglang" and generates and on_rank_0:
        check_servers(cfg, description.whole, device)
    parameters = sum(math.prod(weights.shape(name)) for name in weights.names)
    if cfg.rollout.engine == "embedded" and generates and device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        check_embedded_fits(cfg, parameters, int(os.environ.get("WORLD_SIZE", "1")), memory, train=train)
    tokenizer = load_tokenizer(cfg.model.path)
    _check_vocabulary(cfg.model.path, tokenizer, description.hf.vocab_size)
    positions, reason = _positions(cfg, description.hf)
    vision = description.vision
    frozen = vision.numel if vision and cfg.model.freeze_vision else 0
    images = run_images(cfg, vision)
    step = step_of(checkpoint) if checkpoint else 0
    if train and cfg.rollout.replay_path:
        check_groups(cfg.rollout.replay_path, range(step, cfg.train.num_steps))
        if on_rank_0 and step < cfg.train.num_steps:
            load_groups(cfg.rollout.replay_path, step, description.hf.vocab_size, slice(1), images)
    samples = train and not cfg.rollout.replay_path
    player = make_player(cfg, tokenizer, positions, images) if generates else None
    if player and on_rank_0:
        player.start()
    return Run(
        cfg=cfg,
        device=device,
        description=description,
        tokenizer=tokenizer,
        reward=resolve_reward(cfg.reward),
        eval_sets=_eval_sets(cfg, vision, tokenizer, positions, reason),
        images=images,
        player=player,
        prompts=_stream(cfg, vision, tokenizer, positions, reason, checkpoint) if samples else None,
        checkpoint=checkpoint,
        damage=damage,
        step=step,
        checkpoint_bytes=checkpoint_size(parameters, DTYPES[cfg.model.dtype], frozen),
    )


def _positions(cfg: Config, hf: Any) -> tuple[int, str]:
    """Return the maximum tokens of a prompt with what follows it, and a phrase that states why."""
    positions: int = hf.max_position_embeddings
    if cfg.rollout.engine == "embedded":
        return positions, f"max_position_embeddings = {positions}"
    # of context_length, a server leaves two free (scheduler.py, tp_worker.py)
    return positions - 2, f"max_position_embeddings = {positions}, of which SGLang needs 2"


def _eval_sets(
    cfg: Config, vision: ImageTokens | None, tokenizer: Any, positions: int, reason: str
) -> dict[str, list[Prompt]]:
    """Return the prompts of every benchmark. A prompt and its response have ``positions`` tokens at most."""
    field, limit = cfg.rollout.response_limit, cfg.rollout.max_response_tokens
    if cfg.eval.max_new_tokens and not cfg.rollout.has_episodes:
        field, limit = "eval.max_new_tokens", cfg.eval.max_new_tokens
    eval_sets: dict[str, list[Prompt]] = {}
    tools = tool_schemas(cfg.rollout)
    for name, data in cfg.eval.sets.items():
        section = f"eval.sets.{name}"
        images = load_images(cfg.model.path, data, section, vision)
        eval_sets[name] = load_prompts(data, tokenizer, section, tools, images)
        check_lengths(eval_sets[name], limit, positions, section, field, reason)
    return eval_sets


def _stream(
    cfg: Config,
    vision: ImageTokens | None,
    tokenizer: Any,
    positions: int,
    reason: str,
    checkpoint: Path | None,
) -> PromptStream:
    """Return the stream of training prompts, at the position in ``checkpoint``, if any."""
    images = load_images(cfg.model.path, cfg.data, "data", vision)
    prompts = load_prompts(cfg.data, tokenizer, "data", tool_schemas(cfg.rollout), images)
    stream = PromptStream(prompts, cfg.seed, cfg.data.shuffle)
    field, limit = cfg.rollout.response_limit, cfg.rollout.max_response_tokens
    check_lengths(stream.prompts, limit, positions, "data", field, reason)
    if checkpoint:
        _move_to(checkpoint, stream, cfg.data.allow_changed)
    return stream


def _move_to(checkpoint: Path, stream: PromptStream, allow_changed: bool) -> None:
    saved = read_state(checkpoint).prompts
    if saved and (changed := stream.load_state_dict(saved, allow_changed=allow_changed)):
        logger.info("%s; data.allow_changed = true accepts it", changed)


def _check_run_dir(run_dir: str) -> None:
    """Check that the run folder, or the folder in which it will be created, is a folder to write into."""
    path = Path(run_dir).absolute()
    existing = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not existing.is_dir():
        raise InputError(f"run_dir = {run_dir!r}: {existing} is not a folder: choose another run_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"run_dir = {run_dir!r}: {existing} cannot be written: choose another run_dir")


def _check_vocabulary(path: str, tokenizer: Any, vocab_size: int) -> None:
    """Check that the embedding has a row for every token, also for those added to the tokenizer."""
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if number >= vocab_size:
        raise InputError(
            f"model.path = {path!r}: the tokenizer gives {token!r} the number {number}, and vocab_size in "
            f"config.json is {vocab_size}: use the tokenizer of these weights, or resize the embedding"
        )


def _check_reference(cfg: Config, identity: dict[str, Any]) -> None:
    """Check that the reference policy's folder is complete and that its shape equals the policy's."""
    if not cfg.model.reference_path:
        return
    reference = read_hf_config(cfg.model.reference_path, "model.reference_path")
    SafetensorsFolder(cfg.model.reference_path)
    if model_identity(reference, cfg.model.dtype) != identity:
        raise InputError(
            f"model.reference_path = {cfg.model.reference_path!r} has another shape than model.path: "
            "give a model of the same shape"
        )


def _check_resume(cfg: Config, checkpoint: Path) -> None:
    """Check that the config allows resuming from ``checkpoint``, and that it has all required state."""
    if not cfg.checkpoint.resume:
        raise InputError(
            f"run_dir = {cfg.run_dir!r} already holds {checkpoint.name}: set checkpoint.resume = true or "
            "choose another run_dir"
        )
    if read_state(checkpoint).config.train.freeze_router and not cfg.train.freeze_router:
        raise InputError(
            f"train.freeze_router = false, but {checkpoint} was written with true and has no optimizer "
            "state of the routers: set it to true or choose another run_dir"
        )


def start_command(command: Callable[[Config], None]) -> None:
    """Run ``command`` on the config of ``sys.argv`` and exit.

    A ``RunError`` or SIGINT ends the process with one line and its exit code.
    """
    signals.interrupt_with_one_line()
    _skip_main_in_children()
    set_up_messages()
    code = Exit.DONE
    with one_line_errors():
        try:
            command(load_config(sys.argv[1:]))
        except StopRequest as stop:  # raised on every rank, after each has saved its part
            code = stop.exit
            if rank() == 0:
                print(printable(stop), file=sys.stderr, flush=True)
        except KeyboardInterrupt as interrupt:
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {interrupt or 'interrupted by SIGINT'}", file=sys.stderr, flush=True)
            os._exit(Exit.INTERRUPTED)  # sys.exit would wait for responses that are being scored
    # not after an error, because other ranks may be in a collective, and NCCL would wait for them
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def closing_reward(reward: Reward) -> Any:
    """Return a context that stops the reward's processes at its end, if the reward has ``close``."""
    closable: Any = reward
    return closing(closable) if hasattr(reward, "close") else nullcontext()


def _skip_main_in_children() -> None:
    """Prevent spawned processes, such as those of a user's reward, from importing the main module.

    Each process would import it, with torch and Megatron (multiprocessing/spawn.py:get_preparation_data).
    None of them runs code of that module.
    """
    main: Any = sys.modules["__main__"]
    main.__spec__ = main.__file__ = None
