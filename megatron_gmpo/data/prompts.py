"""Load a data set as prompts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..batch.images import ImageTokens
from ..batch.samples import Prompt
from ..config import DataConfig
from ..errors import InputError, one_line
from .encoding import PromptEncoder
from .rows import read_rows

if TYPE_CHECKING:
    from .images import ModelImages

logger = logging.getLogger(__name__)

_BATCH = 1000
"""Rows that are read and tokenized together."""


def load_tokenizer(path: str, field: str = "model.path") -> Any:
    """Load the tokenizer of a model folder; ``field`` is the config field named in the error.

    Raises:
        InputError: transformers cannot load a tokenizer from the folder.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the readers of tokenizer files raise errors of many kinds
        raise InputError(
            f"{field} = {path!r} has no tokenizer that can be loaded ({one_line(error)})"
        ) from None


def load_images(path: str, cfg: DataConfig, section: str, vision: ImageTokens | None) -> ModelImages | None:
    """Load the image processor of a vision-language model with the limits of ``cfg``; None for a text model.

    Args:
        vision: the image tokens of the model at ``path``; None for a text model.

    Raises:
        InputError: the data has images and the model takes none; see ``ModelImages``.
    """
    if vision:
        from .images import ModelImages  # with Pillow, which text models do not need

        return ModelImages(path, vision, cfg.min_pixels, cfg.max_pixels, section)
    if cfg.image_column:
        raise InputError(
            f"{section}.image_column = {cfg.image_column!r}: the model {path!r} reads no images: "
            "leave it out, or choose a vision-language model"
        )
    return None


def load_prompts(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    section: str = "data",
    tools: Sequence[dict[str, Any]] = (),
    images: ModelImages | None = None,
) -> list[Prompt]:
    """Read a data set, apply the templates, tokenize, and drop prompts longer than ``max_prompt_tokens``.

    Reading stops at ``max_prompts``: later rows are not read, and so they are not checked.

    Args:
        cfg: the data set and its templates.
        tokenizer: the policy's tokenizer. If ``cfg.use_chat_template`` is None, its chat template is used
            when it has one.
        section: section of ``cfg`` in the config, for error lines: ``data`` or ``eval.sets.NAME``.
        tools: JSON schemas of tools, which the chat template describes to the model.
        images: the image processor of a vision-language model.

    Returns:
        Prompts in the order of the data set, with ``id`` = ``"{name}/{row}"`` and ``input_ids``. With a chat
        template ``messages`` is set, without a chat template ``text``.

    Raises:
        InputError: see ``read_rows`` and ``PromptEncoder``; the length filter drops all prompts.
    """
    encoder = PromptEncoder(cfg, tokenizer, section, tools, images)
    rows = read_rows(cfg, section)
    kept: list[Prompt] = []
    dropped: list[int] = []
    while batch := list(islice(rows, _still_needed(cfg, kept))):
        for prompt in encoder.encode(batch):
            if (length := len(prompt.input_ids)) <= cfg.max_prompt_tokens:
                kept.append(prompt)
            else:
                dropped.append(length)
    if not kept:
        raise InputError(
            f"{section}.max_prompt_tokens = {cfg.max_prompt_tokens} leaves no prompt of {len(dropped)}: "
            f"give at least {min(dropped)}"
        )
    logger.info(
        "%s: %d prompts from %s; dropped %d prompts longer than %d tokens",
        section,
        len(kept),
        cfg.path or ", ".join(cfg.files),
        len(dropped),
        cfg.max_prompt_tokens,
    )
    if encoder.marked:
        logger.info(
            "%s: %d prompts hold the text of special tokens, which is encoded as text; "
            "%s.special_tokens = 'token' encodes it as the tokens",
            section,
            encoder.marked,
            section,
        )
    return kept


def check_lengths(
    prompts: list[Prompt],
    max_new_tokens: int,
    positions: int,
    section: str,
    limit_field: str,
    reason: str = "max_position_embeddings",
) -> None:
    """Check that every prompt leaves room for a response of ``max_new_tokens`` in the model's positions.

    Args:
        positions: maximum tokens of prompt and response together.
        section: section of the prompts' config, ``data`` or ``eval.sets.NAME``.
        limit_field: config field of ``max_new_tokens``.
        reason: where ``positions`` comes from, for the message.

    Raises:
        InputError: a prompt is too long; the message names the longest.
    """
    longest = max(prompts, key=lambda prompt: len(prompt.input_ids))
    length, room = len(longest.input_ids), positions - max_new_tokens
    if length > room:
        remedy = f"set {section}.max_prompt_tokens = {room} or lower it" if room > 0 else "lower it"
        raise InputError(
            f"{limit_field} = {max_new_tokens}: prompt {longest.id} of {section} has {length} tokens, and a "
            f"prompt and its response can have {positions} together ({reason}): {remedy}"
        )


def _still_needed(cfg: DataConfig, kept: list[Prompt]) -> int:
    """Return the number of rows to read next: never more than the prompts that are still missing."""
    return _BATCH if cfg.max_prompts is None else min(_BATCH, cfg.max_prompts - len(kept))
