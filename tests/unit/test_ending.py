"""Where a response ends, and its text, against definitions that look at one token after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

from megatron_gmpo.rollout.ending import Ending, end_token_ids
from megatron_gmpo.testing.tiny_tokenizers import character_tokenizer, text_tokenizer

PIECES = ["a", "b", "c", "ab", "bc", "abc", "\n", "\n\n", " ", " a"]
WORDS = character_tokenizer(PIECES)  # pyright: ignore[reportArgumentType]
PAD, EOS = WORDS.pad_token_id, WORDS.eos_token_id
STOPS = st.text(alphabet="abc\n ", min_size=1, max_size=4) | st.sampled_from(
    ["<pad>", "<eos>", "a<pad>", "<pad>b", "\n<eos>", "b<pad><pad>a"]
)


def prefix_length(tokenizer: Any, tokens: list[int], end_ids: set[int], stop: tuple[str, ...]) -> int | None:
    """Return the length of the first prefix that ends with an end token or contains a stop string."""
    for length in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:length])
        if tokens[length - 1] in end_ids or any(string in text for string in stop):
            return length
    return None


@given(
    tokens=st.lists(st.integers(0, len(WORDS) - 1), max_size=40),
    end_ids=st.sets(st.sampled_from([PAD, EOS, 4])),
    stop=st.lists(STOPS, max_size=3).map(tuple),
)
@settings(max_examples=80, deadline=None)
def test_a_response_ends_at_its_first_end_token_or_stop_string(
    tokens: list[int], end_ids: set[int], stop: tuple[str, ...]
) -> None:
    """However the string is split into tokens; the text is put together character by character."""
    ending = Ending(WORDS, end_ids, stop)
    length = ending.length(np.array(tokens, np.int32))
    assert length == prefix_length(WORDS, tokens, end_ids, stop)
    response = tokens[:length]
    if not response:
        return
    content = response[:-1] if response[-1] in end_ids else response
    pieces = [(str(WORDS.convert_ids_to_tokens(token)), token in (PAD, EOS)) for token in content]
    whole = "".join(piece for piece, _ in pieces)
    special = [hidden for piece, hidden in pieces for _ in piece]
    start = min((whole.index(string) for string in stop if string in whole), default=len(whole))
    shown = [char for char, hidden in zip(whole, special, strict=True) if not hidden]
    assert ending.text(np.array(response, np.int32)) == "".join(
        shown[: len(shown) - sum(not hidden for hidden in special[start:])]
    )
    assert ending.action(np.array(response, np.int32)) == whole[:start]


def sentencepiece() -> PreTrainedTokenizerFast:
    """Return a tokenizer that strips the first token's space and falls back to bytes, as Llama 2's does."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁f", "o", "▁", "f", "fo", "n"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False
    )


def ids(tokenizer: Any, *pieces: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(pieces))


LLAMA, BYTES = sentencepiece(), text_tokenizer()


@pytest.mark.parametrize(
    ("tokenizer", "tokens", "stop", "length", "text"),
    [
        # " foo" has four bytes, and the decoder strips the space where a window begins
        (LLAMA, ids(LLAMA, "n", "▁", "f", "o", "o", "n"), " foo", 5, "n"),
        (LLAMA, ids(LLAMA, "n", "▁f", "o", "o"), " foo", 4, "n"),
        (LLAMA, ids(LLAMA, "▁f", "o", "o"), " foo", None, "foo"),
        (LLAMA, ids(LLAMA, "n", "<0xC3>", "<0xA9>", "o"), "é", 3, "n"),
        (BYTES, BYTES.encode("ab né!"), "é", 6, "ab n"),
        (BYTES, BYTES.encode("ab nè!"), "é", None, "ab nè!"),
        (BYTES, BYTES.encode("abc 🍎🍎"), "🍎", 8, "abc "),
        (BYTES, BYTES.encode("a<|im_start|>b"), "<|im_start|>", 2, "a"),
        (BYTES, BYTES.encode("a\n<|im_start|>b"), "\n<|im_start|>b", 4, "a"),
        # a special token inside: neither the server nor a reader of the whole text sees "ab"
        (BYTES, BYTES.encode("a<|im_start|>b"), "ab", None, "ab"),
        (BYTES, BYTES.encode("a<|im_end|>"), "<|im_end|>", 2, "a"),
        (BYTES, BYTES.encode("ab<|im_end|>"), "b<|im_end|>", 3, "ab"),
    ],
)
def test_a_stop_string_in_pieces(
    tokenizer: Any, tokens: list[int], stop: str, length: int | None, text: str
) -> None:
    ending = Ending(tokenizer, {tokenizer.eos_token_id}, (stop,))
    for repeated in (0, 300):  # a long response is searched by halves
        before = ids(tokenizer, "n") * repeated
        found = ending.length(np.array(before + tokens))
        if repeated and tokenizer is LLAMA and tokens[0] == ids(LLAMA, "▁f")[0]:
            assert found == repeated + 3  # the space is no longer the first character
            continue
        assert found == (None if length is None else repeated + length)
        assert ending.text(np.array(before + tokens)[:found]) == "n" * repeated + text


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [(None, None, {1}), (7, None, {1, 7}), ([7, 8], [8, 9], {1, 7, 8, 9}), (None, 1, {1}), (0, [0], {0, 1})],
)
def test_end_tokens_are_those_of_both_configs_and_the_tokenizer(
    config: Any, generation: Any, expected: set[int]
) -> None:
    """As SGLang 0.5.23: ``ModelConfig._get_hf_eos_token_id`` and ``Req._check_token_based_finish``."""
    model = Qwen3Config(eos_token_id=config)
    assert end_token_ids(model, GenerationConfig(eos_token_id=generation), WORDS) == expected
