"""Print how SGLang reads a folder that ModelOpt has quantised.

Run in SGLang's environment: python -I sglang_modelopt.py FOLDER...

The output has one JSON object per line and folder: the ``method`` that SGLang detects, the ``parameters``
that it creates for a matrix of 128 rows and 256 columns, each with dtype and shape, and those modules of
Qwen3 models that it ``skipped``, i.e. does not quantise.
"""

from __future__ import annotations

import json
import sys

import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.quantization import get_quantization_config
from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4LinearMethod, ModelOptFp8LinearMethod
from sglang.srt.layers.quantization.utils import is_layer_skipped

LINEAR = {"modelopt_fp8": ModelOptFp8LinearMethod, "modelopt_fp4": ModelOptFp4LinearMethod}
MODULES = ["lm_head", "model.embed_tokens"] + [
    f"model.layers.1.{module}"
    for module in (
        "mlp.gate",
        "mlp.experts",
        "mlp.gate_up_proj",
        "mlp.down_proj",
        "self_attn.qkv_proj",
        "self_attn.o_proj",
    )
]


def main(folder: str) -> None:
    model, layer = ModelConfig(folder), torch.nn.Module()
    config = get_quantization_config(model.quantization).from_config(
        model.hf_config.quantization_config | {"packed_modules_mapping": {}}
    )
    LINEAR[model.quantization](config).create_weights(
        layer,
        input_size_per_partition=256,
        output_partition_sizes=[128],
        input_size=256,
        output_size=128,
        params_dtype=torch.bfloat16,
        weight_loader=lambda *_: None,
    )
    parameters = {
        name: [str(p.dtype).removeprefix("torch."), list(p.shape)] for name, p in layer.named_parameters()
    }
    skipped = [
        name
        for name in MODULES
        if is_layer_skipped(name, config.exclude_modules, {}) or config.is_layer_excluded(name)
    ]
    print(json.dumps({"method": model.quantization, "parameters": parameters, "skipped": skipped}))


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        main(folder)
