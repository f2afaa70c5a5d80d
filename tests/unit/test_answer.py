"""Answers of servers become columns."""

from __future__ import annotations

import base64
import json
import tracemalloc
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gmpo.batch.samples import Sample, version_spans_of
from megatron_gmpo.config import SGLangConfig
from megatron_gmpo.rollout.ending import Ending
from megatron_gmpo.rollout.response import Context, Response
from megatron_gmpo.rollout.sglang.answer import parse_answer
from megatron_gmpo.rollout.sglang.sampler import Sampler
from megatron_gmpo.testing.tiny_tokenizers import text_tokenizer

from ..support.fake_sglang import answer_of

NONCE = "run"
PROMPT = [5, 6, 7]
TEXT = text_tokenizer()


def test_versions_of_an_answer() -> None:
    spans = [{"version": "run-3", "start": 0, "end": 2}, {"version": "other-4", "start": 2, "end": 3}]
    for about, count, versions in (
        ({"weight_versions": spans, "weight_version": "other-4"}, 3, [3, 3, -1]),
        ({"weight_version": "run-12"}, 2, [12, 12]),
        ({"weight_version": "run-12"}, 0, [12]),
        (
            {"weight_versions": [{"version": "run-1", "start": 0, "end": 0}], "weight_version": "run-2"},
            0,
            [2],
        ),
        ({"weight_version": "default"}, 1, [-1]),
        ({"weight_version": "run-x"}, 1, [-1]),
    ):
        answer = {"output_ids": [0] * count, "meta_info": {"finish_reason": {"type": "stop"}} | about}
        assert parse_answer(json.dumps(answer).encode(), NONCE).versions.tolist() == versions


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.lists(
        st.tuples(
            st.integers(0, 2**31 - 1),
            # what a server sends: float32, written as the same float64; null if it is not finite
            st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
        ),
        max_size=5,
    ),
    experts=st.lists(st.integers(0, 2**15 - 1), max_size=6),
    text=st.text() | st.sampled_from(['"output_ids":[1]', '"output_token_logprobs":[[1,2,null]]']),
    order=st.permutations(range(3)),
)
def test_an_answer_is_read_as_a_json_parser_reads_it(
    separators: tuple[str, str],
    tokens: list[tuple[int, float | None]],
    experts: list[int],
    text: str,
    order: list[int],
) -> None:
    """Whatever the text says, and in whatever order the keys come."""
    about = {
        "output_token_logprobs": [[logprob, token, None] for token, logprob in tokens],
        "routed_experts": base64.b64encode(np.array(experts, "<i4").tobytes()).decode(),
        "finish_reason": {"type": "stop", "matched": text},
    }
    about = {list(about)[i]: about[list(about)[i]] for i in order}
    content = {"text": text, "output_ids": [token for token, _ in tokens]}
    content["meta_info"] = about | {"prompt_tokens": 7, "weight_version": "run-1"}
    parsed = parse_answer(json.dumps(content, separators=separators).encode(), NONCE)
    logprobs = np.array([logprob for _, logprob in tokens], np.float32)
    assert [c.dtype for c in (parsed.tokens, parsed.logprobs, parsed.versions)] == ["i4", "f4", "i4"]
    assert parsed.tokens.tolist() == [token for token, _ in tokens]
    assert np.array_equal(parsed.logprobs, logprobs, equal_nan=True)
    assert parsed.routed_experts.tolist() == experts
    assert parsed.routed_experts.dtype == ("i2" if max(experts, default=0) > 255 else "u1")
    assert (parsed.finish_reason, parsed.prompt_tokens) == ("stop", 7)


def test_the_objects_of_a_response_do_not_grow_with_its_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the bytes of an answer to the sample. A list of the tokens would have an object for each."""
    parsed: list[int] = []
    loads = orjson.loads
    # the real parser, which also notes the size of its input
    monkeypatch.setattr(orjson, "loads", lambda content: (parsed.append(len(content)), loads(content))[1])
    no_servers: Any = None
    sampler = Sampler(no_servers, no_servers, SGLangConfig(), NONCE, routed_experts=(2, 2))
    ending = Ending(TEXT, {2}, ("END",))

    def objects(count: int) -> int:
        """Return the number of objects that ``count`` tokens leave."""
        tokens = [300 + i % 100 for i in range(count)]  # Python keeps integers up to 256
        answer = answer_of({"input_ids": PROMPT}, f"{NONCE}-0", count, tokens=tokens)
        answer["meta_info"]["routed_experts"] = base64.b64encode(bytes(16 * (2 + count))).decode()
        content, response = json.dumps(answer).encode(), Response()
        tracemalloc.start()
        sampler._append(response, parse_answer(content, NONCE), Context(PROMPT), count, ending)
        assert response.routed_experts is not None
        sample = Sample.from_response(
            PROMPT,
            response.tokens,
            response.logprobs,
            text=ending.text(response.tokens),
            finish_reason="length",
            policy_version=0,
            version_spans=version_spans_of(response.versions, start=3),
            routed_experts=response.routed_experts,
        )
        left = sum(each.count for each in tracemalloc.take_snapshot().statistics("filename"))
        tracemalloc.stop()
        assert len(sample.tokens) == 3 + count
        return left

    objects(100)
    assert objects(20_000) <= objects(200) + 5
    assert len(set(parsed)) == 1  # the parser of JSON sees no token
