"""Set up the device, the communication backend and the seeds of a process, on CUDA or on the CPU."""

from __future__ import annotations

import os
import random
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from ..errors import InputError
from .capabilities import check_apex


def choose_device(name: str) -> torch.device:
    """Return the device for ``device = name``. ``auto`` means this process's GPU, or the CPU without a GPU.

    Raises:
        InputError: ``name`` is ``cuda`` and the machine has no usable GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device = 'cuda', but this machine has no usable GPU: set device = 'cpu'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def start_process_group(device: torch.device, timeout_s: float) -> None:
    """Join the process group that torchrun's environment describes, or create a group of one process.

    gloo carries CPU tensors and NCCL carries CUDA tensors. If every rank is on this host, gloo listens on
    loopback only.
    """
    timeout = timedelta(seconds=timeout_s)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def prepare_megatron(device: torch.device) -> None:
    """Prepare Megatron-Core to run on ``device``. On CUDA the CPU replacements are not imported.

    Raises:
        InputError: see ``check_apex``; or the CPU replacements were not tested with the installed
            megatron-core.
    """
    check_apex()
    if device.type == "cpu":
        from . import cpu

        cpu.install()


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


_DETERMINISTIC = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree"),
}
"""Environment variables of Transformer Engine, cuBLAS and NCCL, with deterministic values."""


def check_deterministic(wanted: bool, device: torch.device) -> None:
    """Check the environment variables that ``megatron.deterministic_mode`` needs on a GPU.

    The libraries read them at their start.

    Raises:
        InputError: a variable is not set, or its value is not deterministic.
    """
    missing = [
        f"{name}={values[0]}" for name, values in _DETERMINISTIC.items() if os.environ.get(name) not in values
    ]
    if wanted and device.type == "cuda" and missing:
        raise InputError(
            "megatron.deterministic_mode = true needs these environment variables, set before the start: "
            + " ".join(missing)
        )
