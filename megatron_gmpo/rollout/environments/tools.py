"""Functions that the policy may call, as an environment."""

from __future__ import annotations

from typing import Any

from ...config import RolloutConfig


def tool_schemas(cfg: RolloutConfig) -> list[dict[str, Any]]:
    """Return the JSON schemas of ``rollout.tools`` for the chat template's ``tools``; none without tools.

    Raises:
        InputError: a function cannot be imported or described.
    """
    if not cfg.tools:
        return []
    raise NotImplementedError
