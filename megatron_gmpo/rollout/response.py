"""What an engine returns for one response, or for one turn of an episode."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Response:
    """One sampled response, joined from all its requests.

    Attributes:
        tokens: R response token ids, including the end token.
        logprobs: R log probabilities, after temperature and before top-p and top-k.
        versions: R training steps, one per token: the step whose weights sampled the token.
        finish_reason: ``stop``, ``length``, or empty while the response is unfinished.
        routed_experts: uint8 or int16 expert ids, if requested: a row for each token of the prompt and the
            response but the last. A row is (layers * topk) at a server and (layers, topk) in an episode.
    """

    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    versions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    finish_reason: str = ""
    routed_experts: np.ndarray | None = None
