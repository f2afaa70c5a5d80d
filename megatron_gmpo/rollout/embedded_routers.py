"""Record the experts that a MoE's routers choose in the embedded engine, and add noise to the routers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class RoutedExperts:
    """Record the routing of a transformers MoE's latest forward pass, from the inputs of the experts."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self._shape = (config.num_hidden_layers, config.num_experts_per_tok)
        self._latest: dict[int, Tensor] = {}
        for number, layer in enumerate(model.get_decoder().layers):
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts.register_forward_pre_hook(partial(self._note, number))

    def _note(self, layer: int, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # in every family: hidden states, experts (B * T, topk), their weights
        self._latest[layer] = inputs[1]

    def latest(self, batch_size: int) -> Tensor:
        """Return (B, T, layers, topk) int32 expert ids, 0 in layers without experts."""
        layers, topk = self._shape
        some = next(iter(self._latest.values()))
        experts = some.new_zeros(len(some), layers, topk, dtype=torch.int32)
        for layer, chosen in self._latest.items():
            experts[:, layer] = chosen.int()
        return experts.view(batch_size, -1, layers, topk)


class RouterNoise(TorchFunctionMode):
    """Add Gaussian noise to the router logits of a transformers MoE.

    The noise changes the chosen experts and their weights. In every family a router computes its logits by
    the only ``linear`` call in its forward pass; the noise is added to its result.

    Attributes:
        std: standard deviation of the noise; 0 disables it.
        generator: random generator of the noise.
    """

    std: float = 0.0
    generator: torch.Generator | None = None

    def __init__(self, model: Any) -> None:
        super().__init__()
        for layer in model.get_decoder().layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.gate.forward = partial(self._route, layer.mlp.gate.forward)

    def _route(self, forward: Callable[[Tensor], Any], hidden_states: Tensor) -> Any:
        if self.std == 0:
            return forward(hidden_states)
        with self:
            return forward(hidden_states)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not F.linear:
            return out
        return out + self.std * torch.randn(
            out.shape, generator=self.generator, dtype=out.dtype, device=out.device
        )
