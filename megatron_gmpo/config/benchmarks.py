"""Benchmarks by name: where the Hugging Face hub has them, their columns and their template."""

from __future__ import annotations

from typing import Any

BENCHMARKS: dict[str, dict[str, Any]] = {
    "math500": {"path": "HuggingFaceH4/MATH-500", "split": "test"},
    "aime24": {"path": "HuggingFaceH4/aime_2024"},
    "amc": {"path": "AI-MO/aimo-validation-amc"},
    "amc23": {"path": "math-ai/amc23", "split": "test", "prompt_column": "question"},
    "minerva": {"path": "math-ai/minervamath", "split": "test", "prompt_column": "question"},
    "olympiadbench": {
        "path": "math-ai/olympiadbench",
        "split": "test",
        "prompt_column": "question",
        "answer_column": "final_answer",
        "report_by": ("subfield",),
    },
    "gsm8k": {"path": "openai/gsm8k:main", "split": "test", "prompt_column": "question"},
}
"""Name -> values of ``[eval.sets.NAME]``.

The GMPO paper (arXiv 2507.20673, table 1) has ``aime24`` (30 problems), ``amc`` (83, of 2022 and 2023),
``math500`` (500), ``minerva`` (272) and ``olympiadbench``. ``amc23`` has the 40 problems of 2023 alone."""

TEMPLATE = "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
"""Template of the benchmarks, the instruction of Qwen2.5-Math and DeepSeek-R1."""


def benchmark(name: str, folder: str) -> dict[str, Any]:
    """Return the values of ``[eval.sets.NAME]`` of a benchmark.

    Args:
        folder: folder to read ``NAME.parquet`` from, instead of the hub; "" for the hub.
    """
    values = {"template": TEMPLATE} | BENCHMARKS[name]
    if folder:  # a file has no splits
        values = {key: value for key, value in values.items() if key != "split"}
        values["path"] = f"{folder}/{name}.parquet"
    return values
