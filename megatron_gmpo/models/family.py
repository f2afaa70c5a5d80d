"""The definition of a model family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .mapping import Row

HFConfig = Any  # transformers' PreTrainedConfig: its fields differ by family


@dataclass(frozen=True)
class Family:
    """Names and architecture of the models with one ``model_type``.

    Attributes:
        rows: (Hugging Face config of the language model, padded vocabulary size) -> the name table.
        architecture: the same config -> fields of Megatron's TransformerConfig.
        partial_rotary: whether ``partial_rotary_factor`` applies; the other families' code ignores it.
        code: modules that folders on the hub name in ``auto_map``, and that transformers' own classes
            replace. They are never run.
    """

    rows: Callable[[HFConfig, int], list[Row]]
    architecture: Callable[[HFConfig], dict[str, Any]]
    partial_rotary: bool = False
    code: frozenset[str] = frozenset()


def language_config(whole: HFConfig) -> HFConfig:
    """Return the config of the language model, which is a part of a vision-language model's config."""
    hf = whole.get_text_config()
    if hf is not whole:
        hf = copy.copy(hf)
        hf.tie_word_embeddings = whole.tie_word_embeddings  # transformers ignores that of the part
    return hf


def refuse(hf: HFConfig, field: str, wrong: Any, why: str) -> None:
    """Raise an InputError that names ``field`` of config.json if ``wrong`` is true."""
    if wrong:
        value = getattr(hf, field, None)
        raise InputError(
            f"config.json of this {hf.model_type} model has {field} = {value!r}: {why}; use another model"
        )
