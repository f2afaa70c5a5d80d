"""What the conversion commands share: processes, the progress bar, and logits of both sides on a text."""

from __future__ import annotations

import ctypes
import pickle
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import transformers
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_gmpo.config import Config, exit_with_one_line
from megatron_gmpo.distributed import rank, world_size
from megatron_gmpo.errors import InputError
from megatron_gmpo.models.attention import packing_of
from megatron_gmpo.models.description import DTYPES, ModelDescription, describe_model
from megatron_gmpo.platform import prepare_megatron, start_process_group
from megatron_gmpo.policy.build import build_chunks
from megatron_gmpo.policy.parallel import start_model_parallel, stop_model_parallel
from megatron_gmpo.weights.conversion import Conversion
from megatron_gmpo.weights.torch_dist import checkpoint_folder

TEXT = (
    "A train leaves at 9:40 and travels 126 km at 84 km/h. It arrives at 11:10, since 126 / 84 = 1.5 hours."
)
DIGITS = "12+34=46 90-17=73"  # for a tokenizer that knows no letters
_CPU = torch.device("cpu")
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_TIMEOUT_S = 4 * 3600  # of a collective: the ranks meet only before and after their shares


@contextmanager
def processes(*, alone: bool = False) -> Iterator[None]:
    """Joins the group of processes torchrun describes; bad input ends in one line and exit code 2.

    Args:
        alone: be a group of one instead.
    """
    _keep_freed_memory()
    # Megatron and torch disagree on names inside torch.distributed.checkpoint
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\.core|torch\.distributed")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        if alone:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        else:
            start_process_group(_CPU, _TIMEOUT_S)
        yield
    except InputError as error:
        exit_with_one_line(error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _keep_freed_memory() -> None:
    """Tells malloc to use the memory of one large tensor for the next; by default each gets new pages, which costs more than reading it."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**30)


def run_conversion(
    opened: Callable[[], Conversion],
    target: Path,
    *,
    dry_run: bool,
    verify: bool,
    compare: Callable[[], str],
) -> None:
    """Opens a conversion and prints its table, or carries it out and prints what was done.

    Args:
        opened: checks the source; its InputError ends the command.
        target: what is written.
        compare: the line on logits, for the first rank alone once the others are done.
    """
    with processes():
        conversion = opened()
        lines = list(conversion.lines()) if dry_run else []
        if not dry_run:
            with converting(conversion.nbytes) as advance:
                lines = [f"{target}: {conversion.convert(target, verify=verify, advance=advance)}"]
        first = rank() == 0
    if first:
        if verify and not dry_run:
            with processes(alone=True):
                print(compare())
        print(*lines, sep="\n")


@contextmanager
def converting(nbytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over the bytes of this rank's share, on the first rank where somebody watches."""
    console = Console(stderr=True)
    columns = [
        TextColumn("converting"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, disable=rank() > 0 or not console.is_terminal) as bar:
        task = bar.add_task("converting", total=nbytes / world_size())
        yield lambda done: bar.advance(task, done)


@torch.no_grad()
def compare_logits(hf: Path, megatron: Path, dtype: str | None = None) -> str:
    """How far apart the logits of both sides are on a text, in fp32, or why they were not compared. For a process alone.

    Args:
        dtype: to which the Hugging Face side's weights were rounded, and Megatron's are rounded here.

    Raises:
        InputError: they differ by more than rounding.
    """
    weights = sum(file.stat().st_size for file in hf.glob("*.safetensors"))
    if psutil.virtual_memory().available < 8 * weights:  # both models in fp32, twice the bytes of bf16
        return "logits: not compared, because both models in fp32 do not fit into memory"
    try:
        tokenizer = AutoTokenizer.from_pretrained(hf)
    except (ValueError, OSError, KeyError):
        return "logits: not compared, because there is no tokenizer"
    tokens = torch.tensor(_encode(tokenizer))
    transformers.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).float()  # FP8 weights come as bf16
    theirs = model(tokens[None]).logits[0]
    prepare_megatron(_CPU)
    cfg = Config.model_validate({"model": {"path": str(hf), "dtype": "fp32"}, "device": "cpu"})
    try:
        description = describe_model(cfg, 1, _CPU)
    except InputError as error:  # a model that converts need not be one that trains
        return f"logits: not compared, because {error}"
    try:
        ours = _megatron_logits(cfg, description, megatron, tokens, dtype)[:, : theirs.shape[1]]
    except pickle.UnpicklingError:  # in its common.pt
        return "logits: not compared, because the checkpoint holds objects that Megatron does not load"
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    line = f"logits: {len(tokens)} tokens, largest difference {difference:.1e} of the largest logit"
    if not difference < 1e-3:
        raise InputError(f"{line}: {megatron} is not the model transformers computes from {hf}")
    return line


def _encode(tokenizer: Any) -> list[int]:
    try:
        return tokenizer(TEXT)["input_ids"]
    except Exception:  # tokenizers raises nothing more special for a character it does not know
        return tokenizer(DIGITS)["input_ids"]


def _megatron_logits(
    cfg: Config, description: ModelDescription, megatron: Path, tokens: torch.Tensor, dtype: str | None
) -> torch.Tensor:
    groups = start_model_parallel(cfg.parallel, cfg.seed, cfg.distributed_timeout_s)
    try:
        (model,) = build_chunks(description, groups, _CPU)
        gpt: Any = model
        sharded = gpt.sharded_state_dict()
        weights = {
            name: tensor for name, tensor in sharded.items() if not isinstance(tensor, ShardedObject)
        }  # others are pickles
        gpt.load_state_dict(dist_checkpointing.load(weights, str(checkpoint_folder(megatron))), strict=False)
        for parameter in gpt.parameters() if dtype else ():
            parameter.copy_(parameter.to(DTYPES[dtype]))
        packing = packing_of(torch.tensor([0, len(tokens)], dtype=torch.int32))
        return gpt.eval()(tokens[None], torch.arange(len(tokens))[None], None, packed_seq_params=packing)[0]
    finally:
        stop_model_parallel()
