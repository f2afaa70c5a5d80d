"""Advantages of samples relative to the other samples of their prompt."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from ..batch.index import StepIndex
from ..errors import InputError
from ..plugins import check_callable, resolve

Advantage = Callable[[Tensor], Tensor]
"""Rewards of one group, (n,) float64 -> their advantages, (n,)."""


def _zero_for_equal_rewards(advantage: Advantage) -> Advantage:
    @functools.wraps(advantage)
    def checked(rewards: Tensor) -> Tensor:
        # The mean has a rounding error, which division by 1e-8 would enlarge.
        return torch.zeros_like(rewards) if (rewards == rewards[:1]).all() else advantage(rewards)

    return checked


@_zero_for_equal_rewards
def normalized(rewards: Tensor) -> Tensor:
    """Return (r - mean) / (std + 1e-8) with the unbiased std.

    Source: the official GMPO code. TRL uses the same std and epsilon 1e-4.
    """
    return (rewards - rewards.mean()) / (rewards.std() + 1e-8)


@_zero_for_equal_rewards
def mean(rewards: Tensor) -> Tensor:
    """Return r - mean (Dr. GRPO)."""
    return rewards - rewards.mean()


@_zero_for_equal_rewards
def leave_one_out(rewards: Tensor) -> Tensor:
    """Return r minus the mean of the OTHER samples (RLOO)."""
    return (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1)


ADVANTAGES: dict[str, Advantage] = {"normalized": normalized, "mean": mean, "leave_one_out": leave_one_out}
"""Built-in advantages by name. If all rewards of a group are equal, they return exactly 0."""


def resolve_advantage(name: str) -> Advantage:
    """Return the function that ``algorithm.advantage`` names: a built-in function, or ``module:function``.

    Raises:
        InputError: an unknown name, a module or attribute that cannot be imported, or a function that does
            not take one argument.
    """
    function = resolve("algorithm.advantage", name, ADVANTAGES)
    remedy = "give a function (rewards) -> advantages, both tensors of shape (n,)"
    check_callable("algorithm.advantage", name, function, remedy)
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"algorithm.advantage = {name!r} cannot be called with the rewards ({error}): {remedy}"
        ) from None
    return function


def group_advantages(index: StepIndex, name: str = "normalized") -> Tensor:
    """Return one advantage per sample, computed from the rewards of its group.

    Args:
        index: sequences in groups of any size.
        name: see ``resolve_advantage``.

    Returns:
        (S,) fp32.

    Raises:
        InputError: see ``resolve_advantage``; or the function returned something other than one finite number
            per sample.
    """
    advantage = resolve_advantage(name)
    found = [torch.empty(0, dtype=torch.float64)]
    for group in index.rewards_of_groups():
        rewards = torch.from_numpy(group.copy())  # a user's function may change it
        values = torch.as_tensor(advantage(rewards))
        if values.shape != rewards.shape or not values.isfinite().all():
            raise InputError(
                f"algorithm.advantage = {name!r} returned {values.tolist()} for the rewards "
                f"{group.tolist()}: return one finite number per reward"
            )
        found.append(values.double())
    return torch.cat(found).float()
