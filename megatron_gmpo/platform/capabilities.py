"""Find the capabilities of this machine: GPU, CUDA, and libraries for FP8 and for fused kernels."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata

import torch

from ..errors import InputError


@dataclass(frozen=True)
class Capabilities:
    """A GPU and the libraries installed for it.

    Attributes:
        device: name of the GPU; empty without a GPU.
        compute_capability: compute capability of the GPU, such as (9, 0) for an H100.
        cuda: CUDA version that torch was built with, such as (12, 9).
        transformer_engine: version of Transformer Engine, such as (2, 11), or None if it is not installed.
    """

    device: str = ""
    compute_capability: tuple[int, int] = (0, 0)
    cuda: tuple[int, ...] = ()
    transformer_engine: tuple[int, ...] | None = None


def capabilities_of(device: torch.device) -> Capabilities:
    """Return the capabilities that a run on ``device`` can use; all are empty on a CPU."""
    if device.type != "cuda":
        return Capabilities()
    return Capabilities(
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_capability(device),
        _numbers(torch.version.cuda or ""),
        transformer_engine_version(),
    )


def transformer_engine_version() -> tuple[int, ...] | None:
    """Return major and minor version of Transformer Engine, or None if it is not installed.

    Raises:
        InputError: it has no metadata, without which it cannot be imported.
    """
    found = importlib.util.find_spec("transformer_engine")
    if found is None:
        return None
    try:
        return _numbers(metadata.version("transformer_engine"))
    except metadata.PackageNotFoundError:
        raise InputError(
            f"the package transformer_engine in {list(found.submodule_search_locations or [])} has no "
            "metadata (transformer_engine-*.dist-info): install it as docs/install_gpu.md says, or remove it"
        ) from None


def check_apex() -> None:
    """Check that an installed ``apex``, which Megatron imports if it exists, is NVIDIA's.

    Raises:
        InputError: it is another package, or was built without CUDA extensions.
    """
    if importlib.util.find_spec("apex") and not importlib.util.find_spec("amp_C"):
        raise InputError(
            "the installed package apex has no amp_C: it is PyPI's package of that name, or NVIDIA's built "
            "without its CUDA extensions; pip uninstall apex, or build NVIDIA's as docs/install_gpu.md says"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """Return the major and minor version."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
