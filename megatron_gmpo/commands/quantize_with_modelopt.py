"""Quantize a Hugging Face model with NVIDIA's ModelOpt.

``export_quantized`` runs this script in ModelOpt's own environment:

    python -I quantize_with_modelopt.py

Stdin is a JSON object with the keys ``hf`` and ``out`` (folders), ``format`` (fp8 or nvfp4) and ``prompts``
(lists of token ids for calibration).
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import modelopt.torch.quantization as mtq  # pyright: ignore[reportMissingImports]
import torch
from modelopt.torch.export import (  # pyright: ignore[reportMissingImports]
    export_hf_checkpoint,
)
from tqdm import tqdm
from transformers import AutoModelForCausalLM

FORMATS = {"fp8": mtq.FP8_DEFAULT_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG}


@torch.no_grad()
def main() -> None:
    task = json.load(sys.stdin)
    warnings.simplefilter("ignore")
    placed = {"device_map": "auto"} if torch.cuda.is_available() else {}
    model = AutoModelForCausalLM.from_pretrained(
        task["hf"], dtype=torch.bfloat16, trust_remote_code=False, attn_implementation="sdpa", **placed
    ).eval()

    def calibrate(model: Any) -> None:
        for prompt in tqdm(task["prompts"], "calibrating", unit=" prompts", disable=None):
            model(torch.tensor([prompt], device=model.device), use_cache=False)

    mtq.quantize(model, FORMATS[task["format"]], calibrate)
    # SGLang chooses its model class by this field
    model.config.architectures = model.config.architectures or [type(model).__name__]
    export_hf_checkpoint(model, export_dir=task["out"])


if __name__ == "__main__":
    main()
