"""``launch.py`` for servers with block-wise FP8 weights on a CPU.

On CPUs, SGLang 0.5.23 has kernels for these weights only with AMX. This launcher replaces the two matrix
multiplications with torch's, on the dequantised weights. Parameters, loaders and weight updates remain
SGLang's own. Activations are not quantised, unlike on a GPU.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

LAUNCHER = Path(__file__).parents[2] / "megatron_gmpo/rollout/sglang/launch.py"


def multiply_with_torch() -> None:
    from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
    from sglang.srt.layers.quantization import fp8
    from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant
    from torch.nn.functional import linear

    def multiply(
        input: Any, weight: Any, block_size: Any, weight_scale: Any, input_scale: Any, bias: Any
    ) -> Any:
        return linear(input, block_quant_dequant(weight, weight_scale, block_size, input.dtype), bias)

    class Experts:
        def __init__(self, layer: Any, dtype: Any) -> None:
            self.num_experts = layer.num_experts
            for name in ("w13_weight", "w2_weight"):
                weight, scale = getattr(layer, name), getattr(layer, f"{name}_scale_inv")
                setattr(self, name, block_quant_dequant(weight, scale, [128, 128], dtype))

    def run_experts(method: Any, layer: Any, dispatch_output: Any) -> Any:
        x = dispatch_output.hidden_states
        return StandardCombineInput(
            moe_forward_native(
                Experts(layer, x.dtype), x, dispatch_output.topk_output, method.moe_runner_config
            )
        )

    fp8._is_cpu = False  # take the path for GPUs, not the one for AMX
    fp8.dispatch_w8a8_block_fp8_linear = lambda **_: multiply
    fp8.Fp8MoEMethod.apply = run_experts


def launch(*_: Any, **__: Any) -> None:
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    run_server(prepare_server_args(sys.argv[1:]))


if __name__ == "__main__":
    watch = runpy.run_path(str(LAUNCHER))["main"]
    runpy.run_module = launch  # pyright: ignore[reportAttributeAccessIssue]
    watch()
# This branch runs in the processes that SGLang starts, which import this file as their parent's main
# module.
else:
    multiply_with_torch()
