"""Changes that make SGLang's wheel importable next to a CPU build of torch.

A .pth file loads this module in every process of SGLang's environment.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def _declare_torchvision_operators() -> None:
    """Declare the two operators for which torchvision's Python part registers fakes.

    The wheel's binary, which would declare them, links CUDA.
    """
    from torch import library as operators

    for name in ("nms", "qnms"):
        operators.define(
            f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )


def _leave_host_memory_unpinned(module: Any) -> None:
    """Disable the pinning through the CUDA runtime that --enable-return-routed-experts does."""
    import torch

    if not torch.cuda.is_available():
        module._cuda_host_register = lambda *_, **__: None


class _Finder(importlib.abc.MetaPathFinder):
    """Import hook that applies one fix before torchvision and one after the module that pins memory."""

    def __init__(self) -> None:
        self._before = {"torchvision": _declare_torchvision_operators}
        self._after = {"sglang.srt.mem_cache.pool_host.common": _leave_host_memory_unpinned}

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if before := self._before.pop(fullname, None):
            before()
        if not (after := self._after.pop(fullname, None)):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec and spec.loader:
            spec.loader = _Then(spec.loader, after)
        return spec


class _Then(importlib.abc.Loader):
    """Loader that calls ``after`` on the module after executing it."""

    def __init__(self, loader: Any, after: Callable[[Any], None]) -> None:
        self._loader, self._do_after = loader, after

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._do_after(module)


sys.meta_path.insert(0, _Finder())
