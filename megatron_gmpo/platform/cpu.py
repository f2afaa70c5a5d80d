"""Run Megatron-Core on a machine without a GPU. No other module replaces parts of Megatron.

Megatron-Core refers to CUDA in three ways. This module gives each of them a CPU meaning:

- It calls ``torch.cuda`` (current device, streams, events, RNG state) and uses the literal ``"cuda"`` as the
  device of new tensors. Only Megatron's modules receive a copy of the ``torch`` module in which both refer to
  the CPU.
- It calls ``Tensor.cuda()`` and ``Module.cuda()``, which here return the object unchanged.
- It compares ``tensor.type()`` with ``"torch.cuda.FloatTensor"``. Here ``type()`` returns CUDA names.

Three functions of Megatron assume a GPU library and are replaced: gradient clipping (clip_grads.py), the
token counts that the MoE dispatcher passes to all-to-all (moe_utils.py), and gathers of unequal parts, which
gloo does not support (mappings.py). The replacements were written for and tested with ``SUPPORTED_VERSIONS``.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

SUPPORTED_VERSIONS = ("0.16.1", "0.19.2")
"""Tested versions of megatron-core. 0.16.1 is the newest for Python 3.11, 0.19.2 needs Python 3.12."""

_CPU = torch.device("cpu")
_device = _CPU  # the device that "cuda" refers to
_installed = False


def install() -> None:
    """Install the replacements in this process. Later calls do nothing.

    Raises:
        InputError: the version of megatron-core is not in ``SUPPORTED_VERSIONS``.
    """
    global _installed
    if _installed:
        return
    import megatron.core

    # 0.19 appends the commit of the enclosing repository after a "+"
    version = megatron.core.__version__.partition("+")[0]
    if version not in SUPPORTED_VERSIONS:
        raise InputError(
            f"megatron-core {version} is not tested on CPUs: install one of the tested versions, "
            f"{SUPPORTED_VERSIONS[0]} (Python 3.11) or {SUPPORTED_VERSIONS[1]} (Python 3.12), or run on a GPU"
        )
    _redirect_tensors()
    _patch_megatron()
    # Megatron compiles small functions with torch.compile (jit.py), e.g. in routers. On a CPU, this takes
    # longer than it saves, and needs a C++ compiler.
    torch.compiler.set_stance("force_eager")
    _installed = True


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Let Megatron's "cuda" refer to the meta device inside the context.

    Meta tensors have shapes but no memory. Dry runs use them.
    """
    global _device
    _device = torch.device("meta")
    try:
        yield
    finally:
        _device = _CPU


class _Stream:
    """A stream without pending work."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> _Event:
        return _Event()


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _torch_on_cpu() -> ModuleType:
    """Return a copy of the torch module whose ``cuda`` and whose tensor factories use the CPU."""
    cuda = _copy(torch.cuda)
    cuda.current_device = lambda: _device
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *_: _Stream()
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.synchronize = lambda *_: None
    cuda.empty_cache = lambda: None
    cuda.memory_allocated = lambda *_: 0
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

    def on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(make)
        def made(*args: Any, **kwargs: Any) -> Tensor:
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = _device
            kwargs.pop("pin_memory", None)  # pinning needs a GPU driver
            return make(*args, **kwargs)

        return made

    copy = _copy(torch)
    copy.cuda = cuda
    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
        setattr(copy, name, on_cpu(getattr(torch, name)))
    return copy


def _copy(module: ModuleType) -> Any:
    copy = ModuleType(module.__name__)
    copy.__dict__.update(module.__dict__)
    copy.__getattr__ = lambda name: getattr(module, name)  # lazily loaded attributes
    return copy


def _redirect_tensors() -> None:
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self

    tensor_type = torch.Tensor.type

    def type_with_cuda_name(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = tensor_type(self, *args, **kwargs)
        return (
            answer.replace("torch.meta.", "torch.").replace("torch.", "torch.cuda.", 1)
            if isinstance(answer, str)
            else answer
        )

    torch.Tensor.type = type_with_cuda_name


def _names_cuda(device: Any) -> bool:
    return str(device).startswith("cuda")


def _patch_megatron() -> None:
    # Megatron 0.19 imports these lazily. They must be loaded before their ``torch`` is replaced below.
    import megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader
    import megatron.core.dist_checkpointing.strategies.filesystem_async
    import megatron.core.dist_checkpointing.strategies.state_dict_saver
    import megatron.core.dist_checkpointing.strategies.torch
    import megatron.core.models.gpt
    import megatron.core.pipeline_parallel  # noqa: F401
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.post_training.modelopt.layers import Linear
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    on_cpu = _torch_on_cpu()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = on_cpu  # pyright: ignore[reportAttributeAccessIssue]

    patched: Any = random
    patched._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    patched._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    patched = mappings
    patched._gather_along_first_dim = functools.partial(
        _gather_along_first_dim, mappings._gather_along_first_dim
    )
    patched._reduce_scatter_along_first_dim = functools.partial(
        _reduce_scatter_along_first_dim, mappings._reduce_scatter_along_first_dim
    )
    for patched in (clip_grads, optimizer):
        patched.clip_grad_by_total_norm_fp32 = _clip_grad_by_total_norm_fp32
    for patched in (moe_utils, token_dispatcher):
        patched.maybe_move_tensor_to_cpu = _maybe_move_tensor_to_cpu
    # Without Transformer Engine, 0.16 wrongly sets HAVE_TE, and 0.19 leaves ``Linear`` None.
    multi_latent_attention.HAVE_TE, multi_latent_attention.Linear = HAVE_TE, Linear
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 defines the name only with Transformer Engine
        moe_utils.te_general_gemm = None  # pyright: ignore[reportAttributeAccessIssue]


def _clip_grad_by_total_norm_fp32(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    total_norm: float,
    use_decoupled_grad: bool = False,
) -> None:
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [getattr(p, "decoupled_grad", None) if use_decoupled_grad else p.grad for p in parameters]
    grads = [grad.detach() for grad in grads if grad is not None]
    scale = max_norm / (total_norm + 1.0e-6)
    if scale < 1.0 and grads:
        torch._foreach_mul_(grads, scale)


def _gather_along_first_dim(
    of_equal_parts: Callable[..., Tensor],
    x: Tensor,
    group: Any,
    sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    if sizes is None or group.size() == 1:
        return of_equal_parts(x, group, sizes, use_global_buffer)
    whole = x.new_zeros(sum(sizes), *x.shape[1:])
    whole.split(sizes)[group.rank()].copy_(x)
    torch.distributed.all_reduce(whole, group=group)
    return whole


def _reduce_scatter_along_first_dim(
    to_equal_parts: Callable[..., Tensor],
    x: Tensor,
    group: Any,
    sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    if sizes is None or group.size() == 1:
        return to_equal_parts(x, group, sizes, use_global_buffer)
    total = x.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=group)
    return total.split(sizes)[group.rank()]


def _maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    # gloo's all_to_all_single takes plain integers. The original function returns numpy arrays on CUDA too.
    return tensor.numpy() if isinstance(tensor, Tensor) and as_numpy else tensor
