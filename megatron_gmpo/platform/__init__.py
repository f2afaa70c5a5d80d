"""What differs between CUDA and CPU: the device, the communication backend, seeds."""

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
    """``auto`` is this process's GPU where there is one, else the CPU.

    Raises:
        InputError: ``cuda`` was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device = 'cuda', but this machine has no usable GPU: set device = 'cpu'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def start_process_group(device: torch.device, timeout_s: float) -> None:
    """Joins the process group torchrun describes, or makes a group of one.

    CPU tensors always travel over gloo, CUDA tensors over NCCL. With every rank on this host, gloo listens on loopback only.
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
    """Makes Megatron-Core run on ``device``. On CUDA nothing needs doing, and nothing of the CPU shim is imported.

    Raises:
        InputError: see ``check_apex``; or a megatron-core that the CPU shim was not tested with.
    """
    check_apex()
    if device.type == "cpu":
        from . import cpu

        cpu.install()


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


_DETERMINISTIC = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree"),
}
"""Variables of Transformer Engine, cuBLAS and NCCL, and the values that make them deterministic."""


def check_deterministic(wanted: bool, device: torch.device) -> None:
    """
    Raises:
        InputError: ``megatron.deterministic_mode`` on a GPU without the environment that Transformer Engine, cuBLAS and NCCL want for it;
            libraries read it as they start.
    """
    lacking = [
        f"{name}={values[0]}" for name, values in _DETERMINISTIC.items() if os.environ.get(name) not in values
    ]
    if wanted and device.type == "cuda" and lacking:
        raise InputError(
            f"megatron.deterministic_mode = true needs these set in the environment before the start: {' '.join(lacking)}"
        )
