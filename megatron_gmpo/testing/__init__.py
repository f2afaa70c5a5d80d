"""Tiny models, their problems and a supervised warm-up, for the demo, the tests and the benchmarks."""

from __future__ import annotations

from typing import Literal

Family = Literal["qwen3_moe", "qwen3", "qwen2_moe", "qwen2", "mixtral", "llama", "deepseek_v3", "glm4_moe"]
"""Model types of tiny models."""

VisionFamily = Literal["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]
"""Model types of tiny vision-language models."""
AnyFamily = Literal[Family, VisionFamily]
