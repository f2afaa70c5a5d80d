"""Values of the auxiliary losses of a MoE, read from Megatron's tracker."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from ..metrics.figures import Metric


class AuxiliaryLosses:
    """Report the auxiliary losses of each optimizer step.

    Args:
        config: config with the losses and their coefficients.
        groups: process groups of the trained model.
        device: device of the model.
    """

    def __init__(
        self, config: TransformerConfig, groups: ProcessGroupCollection, device: torch.device
    ) -> None:
        self._device = device
        kinds: Any = config.moe_router_load_balancing_type
        coefficients: Any = config.moe_aux_loss_coeff
        by_kind: dict[str, float] = (
            {kinds: coefficients} if isinstance(kinds, str) else dict(zip(kinds, coefficients, strict=True))
        )
        on = {kind for kind, coefficient in by_kind.items() if coefficient and config.num_moe_experts}
        dp, dense = groups.dp.size(), groups.dp_cp.size() * groups.tp.size()
        z_loss = bool(config.num_moe_experts and config.moe_z_loss_coeff)
        named = {
            # the ranks of tp and cp hold summands
            "load_balancing_loss": ("aux_loss" in on, dp),
            "seq_load_balancing_loss": ("seq_aux_loss" in on, dp),
            # the ranks of tp, cp and dp hold summands
            "global_load_balancing_loss": ("global_aux_loss" in on, 1),
            # every rank holds a mean over its tokens
            "z_loss": (z_loss, dense),
        }
        self._divisors = {name: divisor for name, (used, divisor) in named.items() if used}
        _take_values()  # of an earlier policy of this process, which may have had fewer layers

    @property
    def used(self) -> bool:
        """Return whether there is an auxiliary loss."""
        return bool(self._divisors)

    def take(self) -> Tensor:
        """Return (losses,), this rank's share of the step's values, and clear Megatron's tracker."""
        values = _take_values() if self._divisors else {}
        taken = torch.zeros(len(self._divisors), device=self._device)
        for place, name in enumerate(self._divisors):
            if name in values:  # a pipeline stage without MoE layers records nothing
                taken[place] = values[name].sum()
        return taken

    def metrics(self, sums: Tensor, microbatches: int) -> dict[str, Metric]:
        """Return the losses in use, without their coefficients, from all ranks' sum of ``take``, on the host.

        The names are ``moe/load_balancing_loss``, ``moe/seq_load_balancing_loss``,
        ``moe/global_load_balancing_loss`` and ``moe/z_loss``. Each value is a sum over layers, averaged over
        the ``microbatches`` of the optimizer step.
        """
        totals = zip(self._divisors.items(), sums.tolist(), strict=True)
        return {f"moe/{name}": Metric(total / divisor / microbatches) for (name, divisor), total in totals}


def _take_values() -> dict[str, Tensor]:
    """Return the tracked values by loss, (layers,) each, and empty the tracker, which has no other user."""
    core: Any = moe_utils
    if hasattr(core, "get_moe_metrics_tracker"):  # since 0.18 (moe_logging.py)
        entries = core.get_moe_metrics_tracker().metrics
        values = {name: entry.values for name, entry in entries.items()}
    else:
        entries = core.get_moe_layer_wise_logging_tracker()
        values = {name: entry["values"] for name, entry in entries.items()}
    entries.clear()
    return values
