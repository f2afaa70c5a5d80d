"""Request the log probabilities of given sequences from a running server."""

from __future__ import annotations

import httpx

from ...errors import ServerError
from .servers import Server, certificates


def sequence_logprobs(server: Server, tokens: list[int], timeout_s: float) -> list[float | None]:
    """Return the log probability of each token given the tokens before it, at temperature 1.

    The first token has None. The server prefills the whole sequence and generates one more token.

    Raises:
        ServerError: the server does not answer within ``timeout_s`` or answers with an error.
    """
    body = {
        "input_ids": tokens,
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    try:
        reply = httpx.post(
            f"{server.url}/generate",
            json=body,
            headers=server.headers,
            timeout=timeout_s,
            trust_env=False,
            verify=certificates(),
        )
        reply.raise_for_status()
    except httpx.HTTPError as error:
        raise ServerError(f"SGLang server {server.url} gave no log probabilities ({error})") from None
    return [logprob for logprob, *_ in reply.json()["meta_info"]["input_token_logprobs"]]
