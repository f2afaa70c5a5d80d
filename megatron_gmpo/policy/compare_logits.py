"""Compare the logits of a Megatron checkpoint with the logits of transformers for the Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from transformers import AutoTokenizer

from ..config import Config
from ..errors import InputError
from ..models.attention import packing_of
from ..models.description import DTYPES, ModelDescription, auto_class, describe_model, read_hf_config
from ..platform import prepare_megatron
from ..weights.pickles import plain_records_only
from ..weights.torch_dist import checkpoint_folder
from .build import build_chunks
from .parallel import start_model_parallel, stop_model_parallel

TEXT = (
    "A train leaves at 9:40 and travels 126 km at 84 km/h. It arrives at 11:10, since 126 / 84 = 1.5 hours."
)
DIGITS = "12+34=46 90-17=73"
"""Text for a tokenizer without letters."""
TOLERANCE = 1e-3
"""Maximum difference that rounding can cause, relative to the largest logit."""
_CPU = torch.device("cpu")


@torch.no_grad()
def compare_logits(hf: Path, megatron: Path, dtype: str | None = None) -> str:
    """Return a line with the difference of both logits on a text, in fp32, or the reason for no comparison.

    The process must be the only one of its process group.

    Args:
        dtype: precision to which the Hugging Face weights were rounded; Megatron's are rounded to it for the
            comparison.

    Raises:
        InputError: the logits differ by more than ``TOLERANCE``.
    """
    weights = sum(file.stat().st_size for file in hf.glob("*.safetensors"))
    if psutil.virtual_memory().available < 8 * weights:  # both models in fp32, twice the bytes of bf16
        return "logits: not compared, because both models in fp32 do not fit into memory"
    try:
        tokenizer = AutoTokenizer.from_pretrained(hf, trust_remote_code=False)
    except (ValueError, OSError, KeyError):
        return "logits: not compared, because there is no tokenizer"
    tokens = torch.tensor(_encode(tokenizer))
    transformers.logging.disable_progress_bar()
    model = (
        auto_class(read_hf_config(str(hf), "--hf"))
        .from_pretrained(hf, dtype=torch.float32, trust_remote_code=False, attn_implementation="sdpa")
        .float()
    )  # FP8 weights come as bf16
    theirs = model(tokens[None]).logits[0]
    prepare_megatron(_CPU)
    cfg = Config.model_validate({"model": {"path": str(hf), "dtype": "fp32"}, "device": "cpu"})
    try:
        description = describe_model(cfg, 1, _CPU)
    except InputError as error:  # conversion supports models that training refuses
        return f"logits: not compared, because {error}"
    try:
        ours = _megatron_logits(cfg, description, megatron, tokens, dtype)[:, : theirs.shape[1]]
    except InputError as error:  # its common.pt holds objects
        return f"logits: not compared, because {error}"
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    line = f"logits: {len(tokens)} tokens, largest difference {difference:.1e} of the largest logit"
    if not difference < TOLERANCE:
        raise InputError(f"{line}: {megatron} is not the model transformers computes from {hf}")
    return line


def _encode(tokenizer: Any) -> list[int]:
    try:
        return tokenizer(TEXT)["input_ids"]
    except Exception:  # for an unknown character tokenizers raises a plain Exception
        return tokenizer(DIGITS)["input_ids"]


def _megatron_logits(
    cfg: Config, description: ModelDescription, megatron: Path, tokens: torch.Tensor, dtype: str | None
) -> torch.Tensor:
    groups = start_model_parallel(cfg.parallel, cfg.seed, cfg.distributed_timeout_s)
    try:
        (model,) = build_chunks(description, groups, _CPU)
        gpt: Any = model
        sharded = gpt.sharded_state_dict()
        # without ShardedObjects, which are pickles
        weights = {name: tensor for name, tensor in sharded.items() if not isinstance(tensor, ShardedObject)}
        folder = checkpoint_folder(megatron)
        with plain_records_only(folder):
            gpt.load_state_dict(dist_checkpointing.load(weights, str(folder)), strict=False)
        if dtype:
            for parameter in gpt.parameters():
                parameter.copy_(parameter.to(DTYPES[dtype]))
        packing = packing_of([0, len(tokens)])
        return gpt.eval()(tokens[None], torch.arange(len(tokens))[None], None, packed_seq_params=packing)[0]
    finally:
        stop_model_parallel()
