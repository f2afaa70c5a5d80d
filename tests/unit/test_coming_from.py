"""Every name and default in docs/coming_from.md is one of our config, or of the installed TRL."""

from __future__ import annotations

import ast
import os
import re
from dataclasses import MISSING, fields
from inspect import signature
from typing import Any

import pytest

from megatron_gmpo.config import Config
from megatron_gmpo.losses.registry import LOSSES

from ..support.commands import ROOT

PAGE = (ROOT / "docs/coming_from.md").read_text()


def rows(header: str, page: str = PAGE) -> list[list[str]]:
    """Return the cells of every table whose header starts with ``header``."""
    found: list[list[str]] = []
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        lines = table.splitlines()
        if lines[0].startswith(header):
            found += [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:]]
    return found


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def settings(section: type[Any] = Config, prefix: str = "") -> dict[str, Any]:
    """Return every key of the config with its default."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        found[prefix + name] = field.get_default()
        if hasattr(field.annotation, "model_fields"):
            found |= settings(field.annotation, f"{prefix}{name}.")
    return found


def value(text: str) -> Any:
    (literal,) = names(text)
    return ast.literal_eval({"true": "True", "false": "False"}.get(literal, literal))


TRL = "| TRL | default | here"
THEIRS = [*rows(TRL), *rows("| verl | here"), *rows("| slime | here")]


def test_the_page_has_all_tables() -> None:
    assert [len(rows(header)) > 40 for header in (TRL, "| verl | here", "| slime | here")] == [True] * 3
    assert {len(row) for row in rows(TRL)} == {5}
    assert {len(row) for row in THEIRS} == {3, 5}


def test_our_names_are_settings() -> None:
    from megatron.core.transformer import TransformerConfig

    known = settings().keys()
    known |= {f"megatron.{field.name}" for field in fields(TransformerConfig)}
    known |= {f"algorithm.options.{name}" for name in signature(LOSSES["gmpo"].function).parameters}
    ours = [name for row in THEIRS for name in names(row[2 if len(row) == 5 else 1])]
    assert [name for name in ours if name not in known] == []
    text = [
        name for name in names(PAGE) if re.fullmatch(r"(algorithm|optimizer|train|sglang|eval)\.\w+", name)
    ]
    theirs = {name for row in THEIRS for name in names(row[0])}
    assert [name for name in text if name not in known and name not in theirs] == []


def test_our_defaults() -> None:
    known = settings()
    shown = {row[2]: row[3] for row in rows(TRL) if row[3]}
    assert len(shown) > 30
    for cell, default in shown.items():
        (name,) = names(cell)
        if name != "algorithm.options.dual_clip":
            assert value(default) == known[name], name


@pytest.mark.slow  # imports TRL
def test_trl_has_these_fields_and_defaults() -> None:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from transformers import TrainingArguments
    from trl.experimental.gmpo import GMPOConfig

    defaults = {field.name: field.default for field in fields(GMPOConfig)}
    described = [name for row in rows(TRL) for name in names(row[0])]
    assert [name for name in described if name not in defaults] == []
    own = defaults.keys() - {field.name for field in fields(TrainingArguments)}
    assert own - set(described) == set()
    for cell, default, *_ in rows(TRL):
        if default:
            (name,) = names(cell)
            assert defaults[name] is not MISSING
            assert value(default) == defaults[name], name
