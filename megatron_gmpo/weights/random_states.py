"""The states of a rank's random-number generators in a checkpoint."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors import SafetensorError

from ..distributed import rank, world_size
from ..errors import InputError
from .run_checkpoint import read_state


def random_file(checkpoint: Path) -> Path:
    """Return the path of this rank's states in a checkpoint."""
    return checkpoint / "random" / f"rank_{rank():05d}.safetensors"


def random_states() -> bytes:
    """Return the states of this rank's generators as a safetensors file."""
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
    states |= {f"megatron.{name}": state.clone() for name, state in tracker.get_states().items()}
    return safetensors.torch.save(states)


def restore_random_states(checkpoint: Path) -> None:
    """Restore this rank's random-number states if the checkpoint has the current number of ranks.

    Raises:
        InputError: its file is missing or damaged.
    """
    if read_state(checkpoint).world_size != world_size():
        return
    try:
        states = safetensors.torch.load_file(random_file(checkpoint))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{random_file(checkpoint)} cannot be read ({error}): use another checkpoint"
        ) from None
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
