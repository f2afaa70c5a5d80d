"""Rewards for tests, which configs name as ``module:function``.

``share_of_digits`` differs between the responses of a random model.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time

from megatron_gmpo.batch.samples import Prompt

_closing = threading.Lock()


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


def raises_on_rank_1(prompt: Prompt, response: str) -> float:
    if os.environ["RANK"] == "1":
        raise ValueError("no\nverdict")
    return 0.0


def raises_when_a_file_exists(prompt: Prompt, response: str) -> float:
    """Raise when the file named by the environment variable RAISE_WHEN exists."""
    if os.path.exists(os.environ["RAISE_WHEN"]):
        raise ValueError("no verdict")
    return share_of_digits(prompt, response)


def exits(prompt: Prompt, response: str) -> float:
    sys.exit(0)


def huge(prompt: Prompt, response: str) -> int:
    return 10**400


def closes_stdout(prompt: Prompt, response: str) -> float:
    sys.stdout.close()
    return 0.0


def closes_the_descriptor_of_stdout(prompt: Prompt, response: str) -> float:
    """Close descriptor 1 once, and open another file, which gets the number."""
    if _closing.acquire(blocking=False):
        os.close(1)
        os.open(os.devnull, os.O_RDONLY)
    return 0.0


def removes_the_run_folder(prompt: Prompt, response: str) -> float:
    """Remove the folder named by the environment variable REMOVED."""
    shutil.rmtree(os.environ["REMOVED"], ignore_errors=True)
    return share_of_digits(prompt, response)


def sleeps(prompt: Prompt, response: str) -> float:
    """Say in the file named by the environment variable ASLEEP that it sleeps, and sleep for ten minutes."""
    with open(os.environ["ASLEEP"], "a"):
        time.sleep(600)
    return 0.0


def sleeps_on_rank_1(prompt: Prompt, response: str) -> float:
    if os.environ["RANK"] == "1":
        time.sleep(600)
    return 0.0
