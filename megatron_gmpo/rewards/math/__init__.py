"""The reward for mathematics: the final answer of a response, compared by value with the reference answer."""

from ...batch.samples import Prompt
from ..processes import ProcessReward
from .final_answer import final_answer


class MathReward(ProcessReward):
    r"""Score 1.0 if the final answer of a response equals the reference answer mathematically, else 0.0.

    docs/rewards.md says which part of a response is its final answer, and what equals what.
    """

    worker = "megatron_gmpo.rewards.math.worker"

    def final_answer(self, response: str) -> str | None:
        """Return the final answer of a response as it is written, or None if there is none."""
        return final_answer(response)

    def same_answer(self, answer: str, response: str) -> bool:
        """Return whether the final answer of a response equals ``answer``; see ``__call__``."""
        return self(Prompt("", answer), response) == 1.0


__all__ = ["MathReward"]
