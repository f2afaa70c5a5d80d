"""What this machine has for FP8 and for Megatron's fused kernels."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata

import torch

from ..errors import InputError


@dataclass(frozen=True)
class Capabilities:
    """A GPU and the libraries beside it.

    Attributes:
        device: the GPU's name; empty for none.
        compute_capability: of the GPU, e.g. (9, 0) for an H100.
        cuda: version that torch was built with, e.g. (12, 9).
        transformer_engine: its version, e.g. (2, 11); None where it is not installed.
    """

    device: str = ""
    compute_capability: tuple[int, int] = (0, 0)
    cuda: tuple[int, ...] = ()
    transformer_engine: tuple[int, ...] | None = None


def capabilities_of(device: torch.device) -> Capabilities:
    """Of this machine as far as a run on ``device`` can use them."""
    if device.type != "cuda":
        return Capabilities()
    return Capabilities(
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_capability(device),
        _numbers(torch.version.cuda or ""),
        _numbers(metadata.version("transformer_engine"))
        if importlib.util.find_spec("transformer_engine")
        else None,
    )


def check_apex() -> None:
    """
    Raises:
        InputError: a package named apex is installed that Megatron would take for NVIDIA's.
    """
    if importlib.util.find_spec("apex") and not importlib.util.find_spec("amp_C"):
        raise InputError(
            "the installed package apex has no amp_C: it is PyPI's package of that name, or NVIDIA's built without its CUDA extensions; "
            "pip uninstall apex, or build NVIDIA's as docs/install_gpu.md says"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
