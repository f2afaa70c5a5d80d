"""The reward for mathematics: the final answer of a response, compared by value with the reference answer."""

from ..processes import ProcessReward


class MathReward(ProcessReward):
    r"""Score 1.0 if the final answer of a response equals the reference answer mathematically, else 0.0.

    docs/rewards.md says which part of a response is its final answer, and what equals what.
    """

    worker = "megatron_gmpo.rewards.math.worker"


__all__ = ["MathReward"]
