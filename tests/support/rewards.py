"""Rewards for tests, which configs name as ``module:function``.

``share_of_digits`` differs between the responses of a random model.
"""

from __future__ import annotations

import os
import time

from megatron_gmpo.batch.samples import Prompt


def share_of_digits(prompt: Prompt, response: str) -> float:
    return sum(character.isdigit() for character in response) / max(1, len(response))


def unhurried_share_of_digits(prompt: Prompt, response: str) -> float:
    """Return the share of digits slowly, so that a run can be interrupted.

    The function also waits while the file named by the environment variable HOLD exists.
    """
    time.sleep(0.2)
    while os.path.exists(os.environ.get("HOLD", "")):
        time.sleep(0.1)
    return share_of_digits(prompt, response)


def broken_on_rank_1(prompt: Prompt, response: str) -> float | None:
    return None if os.environ["RANK"] == "1" else 0.0


def crashes_on_rank_1(prompt: Prompt, response: str) -> float:
    return 1 / (1 - int(os.environ["RANK"]))


def sleeps_on_rank_1(prompt: Prompt, response: str) -> float:
    if os.environ["RANK"] == "1":
        time.sleep(600)
    return 0.0
