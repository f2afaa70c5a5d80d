"""Tiny models, their problems and a supervised warm-up: what the demo, the tests and the benchmarks start
from."""

from __future__ import annotations

from typing import Literal

Family = Literal["qwen3_moe", "qwen3", "qwen2_moe", "qwen2", "mixtral", "llama", "deepseek_v3", "glm4_moe"]
"""The model_type of a tiny model."""
