"""The reward for mathematics: the final answer of a response, compared by value with the reference answer."""

from .reward import MathReward

__all__ = ["MathReward"]
