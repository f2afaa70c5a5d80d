"""Quantises a Hugging Face model with NVIDIA's ModelOpt; the part of ``tools.export_quantized`` that runs in ModelOpt's own environment:

    python -I quantize_with_modelopt.py

Stdin is a JSON object: ``hf`` and ``out``, folders; ``format``, fp8 or nvfp4; ``prompts``, lists of tokens to calibrate on.
"""

from __future__ import annotations

import json
import sys
import warnings

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM

FORMATS = {"fp8": mtq.FP8_DEFAULT_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG}


@torch.no_grad()
def main() -> None:
    task = json.load(sys.stdin)
    warnings.simplefilter("ignore")
    placed = {"device_map": "auto"} if torch.cuda.is_available() else {}
    model = AutoModelForCausalLM.from_pretrained(task["hf"], dtype=torch.bfloat16, **placed).eval()

    def calibrate(model: torch.nn.Module) -> None:
        for prompt in tqdm(task["prompts"], "calibrating", unit=" prompts", disable=None):
            model(torch.tensor([prompt], device=model.device), use_cache=False)

    mtq.quantize(model, FORMATS[task["format"]], calibrate)
    model.config.architectures = model.config.architectures or [
        type(model).__name__
    ]  # SGLang chooses its model by this
    export_hf_checkpoint(model, export_dir=task["out"])


if __name__ == "__main__":
    main()
