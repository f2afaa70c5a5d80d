"""Checkpoints of a training run: tensors in Megatron's dist_checkpointing format, all other state in JSON.

A run's checkpoint folder has Megatron-LM's names::

    latest_checkpointed_iteration.txt                  step of the newest complete checkpoint
    hf/                                                config.json, tokenizer and chat template of the model
    iter_0000010/
      common.pt, metadata.json, .metadata, *.distcp    tensors: weights under GPTModel's keys, optimizer state
                                                       under "optimizer.*" (no common.pt from Megatron 0.19)
      state.json                                       step, prompt cursor, updates, config, model identity
      random/rank_00000.safetensors                    random-number states of one rank

A checkpoint is written to ``.partial_iter_0000010``, flushed, and renamed. The text file is updated last. A
kill at any time leaves the older checkpoints intact. ``policy.optimizer_state`` makes the sharded tensors.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed._shard.sharded_tensor.api as sharded_tensor
import torch.distributed._shard.sharding_spec.api as sharding_spec
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from . import files
from .distributed import agreed, folder_written_by_all, rank, world_size
from .errors import InputError
from .weights.companions import copy_companions
from .weights.torch_dist import LATEST

_IDENTITY = [
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "first_k_dense_replace",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "tie_word_embeddings",
]


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run's checkpoint folder, or None.

    Raises:
        InputError: latest_checkpointed_iteration.txt names a checkpoint that is missing or incomplete.
    """
    pointer = folder / LATEST
    if not pointer.is_file():
        return None
    checkpoint = folder / f"iter_{int(pointer.read_text()):07d}"
    if not (checkpoint / "state.json").is_file():
        raise InputError(
            f"{pointer} names {checkpoint.name}, which is missing or incomplete: "
            "write an older iteration into it"
        )
    return checkpoint


def checkpoint_before(folder: Path, step: int) -> Path | None:
    """Return the newest complete checkpoint written before ``step``, or None."""
    complete = [checkpoint for checkpoint in folder.glob("iter_*") if (checkpoint / "state.json").is_file()]
    return max((checkpoint for checkpoint in complete if read_state(checkpoint)["step"] < step), default=None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the JSON state given to ``save_checkpoint``, with ``step`` and ``world_size``."""
    return json.loads((checkpoint / "state.json").read_text())


def model_identity(hf: Any, dtype: str) -> dict[str, Any]:
    """Return the fields of a Hugging Face config that determine the weights' shapes, and the dtype."""
    return {**{field: getattr(hf, field, None) for field in _IDENTITY}, "dtype": dtype}


def check_model(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Check that a checkpoint belongs to the model with this ``model_identity``.

    Raises:
        InputError: a field differs; the message names the first such field.
    """
    saved = read_state(checkpoint)["model"]
    for field, value in identity.items():
        if saved.get(field) != value:
            raise InputError(
                f"{checkpoint} is of another model ({field} = {saved.get(field)!r}, this run has {value!r}): "
                "choose another run_dir"
            )


def checkpoint_size(num_parameters: int, dtype: torch.dtype) -> int:
    """Return the bytes of weights, Adam moments in fp32 and, if ``dtype`` is not fp32, fp32 main weights."""
    return num_parameters * (3 * 4 if dtype is torch.float32 else dtype.itemsize + 3 * 4)


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Any], state: dict[str, Any], keep_last: int, hf: Path
) -> Path:
    """Write the checkpoint of ``step``, then remove all except the newest ``keep_last``. Collective.

    Args:
        folder: folder of the ``iter_*`` folders, the same on every rank.
        tensors: a sharded state dict; see ``policy.optimizer_state.tensors_to_save``.
        state: JSON-serializable state that ``read_state`` returns.
        hf: the model's Hugging Face folder, whose config and tokenizer are copied with the first checkpoint.

    Returns:
        The new checkpoint.
    """
    with agreed():
        if rank() == 0:
            for stale in folder.glob(".partial_*"):  # a killed save leaves them
                files.clear(stale)
            _save_companions(hf, folder)
    force_all_tensors_to_non_fp8(tensors)
    final = folder / f"iter_{step:07d}"
    with folder_written_by_all(final) as partial:
        with _overlap_check_off():
            dist_checkpointing.save(tensors, str(partial))
        (partial / "random").mkdir(exist_ok=True)
        safetensors.torch.save_file(_random_states(), _random_file(partial))
        if rank() == 0:
            content = {"step": step, "world_size": world_size(), **state}
            (partial / "state.json").write_text(json.dumps(content, indent=1))
            if final.exists():  # a kill before the update of the text file leaves it
                files.remove(final)
    with agreed():
        if rank() == 0:
            files.write(folder / LATEST, str(step))
            # such a kill may also leave a later checkpoint, which must not count for keep_last
            up_to_this = sorted(found for found in folder.glob("iter_*") if found.name <= final.name)
            for old in up_to_this[:-keep_last]:
                files.remove(old)
    return final


def go_back(checkpoint: Path, state: dict[str, Any]) -> None:
    """Update a checkpoint's JSON state, make it the newest, and remove later checkpoints. Collective."""
    with agreed():
        if rank() == 0:
            folder, content = checkpoint.parent, read_state(checkpoint) | state
            files.write(checkpoint / "state.json", json.dumps(content, indent=1))
            files.write(folder / LATEST, str(content["step"]))
            for later in [found for found in folder.glob("iter_*") if found.name > checkpoint.name]:
                files.remove(later)


def load_tensors(checkpoint: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors that the sharded state dict ``tensors`` describes, from any layout. Collective."""
    with _overlap_check_off():
        loaded: Any = dist_checkpointing.load(tensors, str(checkpoint), validate_access_integrity=False)
    return loaded


def restore_random_states(checkpoint: Path) -> None:
    """Restore this rank's random-number states if the checkpoint has the current number of ranks."""
    if read_state(checkpoint)["world_size"] != world_size():
        return
    states = safetensors.torch.load_file(_random_file(checkpoint))
    random.setstate((3, tuple(int(x) for x in states["python"].numpy().view(np.uint64)), None))
    *keys, position = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, 0, 0.0))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    prefix = "megatron."
    tracked = {name: value for name, value in states.items() if name.startswith(prefix)}
    tracker: Any = get_cuda_rng_tracker()
    tracker.set_states({name.removeprefix(prefix): value for name, value in tracked.items()})


def _random_states() -> dict[str, Tensor]:
    python = np.array(random.getstate()[1], dtype=np.uint64)
    _, keys, position, *_ = np.random.get_state()
    states = {
        "python": torch.from_numpy(python.view(np.uint8).copy()),
        "numpy": torch.from_numpy(np.append(keys, position).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    tracker: Any = get_cuda_rng_tracker()
    return states | {f"megatron.{name}": state.clone() for name, state in tracker.get_states().items()}


def _random_file(checkpoint: Path) -> Path:
    return checkpoint / "random" / f"rank_{rank():05d}.safetensors"


def _save_companions(hf: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "hf").exists():
        with files.written_aside(folder / "hf") as partial:
            copy_companions(hf, partial)


@contextmanager
def _overlap_check_off() -> Iterator[None]:
    """Disable torch's check for overlapping shards, which compares all pieces of a tensor with each other.

    Qwen3-30B-A3B has layers x experts x 2 = 12,288 pieces. The check took 0.8 s for 3,072 pieces and 2.8 s
    for 6,144 pieces, and a save runs it eight times. Megatron checks for overlaps when it saves
    (dist_checkpointing/validation.py).
    """
    modules: tuple[Any, ...] = (sharding_spec, sharded_tensor)
    check = sharding_spec.validate_non_overlapping_shards_metadata
    for module in modules:
        module.validate_non_overlapping_shards_metadata = lambda shards: None
    try:
        yield
    finally:
        for module in modules:
            module.validate_non_overlapping_shards_metadata = check
