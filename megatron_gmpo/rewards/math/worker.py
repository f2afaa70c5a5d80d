"""The process that checks answers: ``python -m megatron_gmpo.rewards.math.worker``."""

from __future__ import annotations

from ..worker import serve
from .equality import is_correct

if __name__ == "__main__":
    serve(is_correct)
