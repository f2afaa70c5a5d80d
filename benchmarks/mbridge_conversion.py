"""Convert a dense model in both directions with mbridge (github.com/ISEEKYAN/mbridge).

benchmarks/conversion.py runs these functions. The code follows mbridge's README: mbridge builds the model
and fills it, and Megatron's dist_checkpointing writes and reads the checkpoint. mbridge reads a config
field that transformers 5 moved, and requires Transformer Engine's layers. On a CPU it receives the plain
layers instead, and the keys of their two norms. Its MoE models need grouped GEMM, which only a GPU has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from transformers import AutoConfig

from megatron_gmpo.models.layer_spec import decoder_spec
from megatron_gmpo.platform import choose_device, prepare_megatron

DEVICE = choose_device("auto")
prepare_megatron(DEVICE)
from mbridge import AutoBridge  # noqa: E402  # pyright: ignore[reportMissingImports]


def to_megatron(folder: Path, out: Path) -> None:
    """Convert ``folder``/hf."""
    bridge = _bridge(folder / "hf")
    models = bridge.get_model()
    bridge.load_weights(models, str(folder / "hf"))
    out.mkdir()
    dist_checkpointing.save(_sharded(models), str(out))


def to_hf(folder: Path, out: Path) -> None:
    """Convert ``folder``/mbridge_to_megatron."""
    bridge = _bridge(folder / "hf")
    models = bridge.get_model()
    loaded: Any = dist_checkpointing.load(_sharded(models), str(folder / "mbridge_to_megatron"))
    models[0].load_state_dict(loaded["model"])
    bridge.safetensor_io = bridge._get_safetensor_io(str(folder / "hf"))  # determines the files to write
    bridge.save_weights(models, str(out))


def _sharded(models: list[Any]) -> dict[str, Any]:
    return {"model": models[0].sharded_state_dict()}


def _bridge(hf: Path) -> Any:
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    config: Any = AutoConfig.from_pretrained(hf)
    config.rope_theta = config.rope_parameters["rope_theta"]
    bridge = AutoBridge.from_config(config)
    if DEVICE.type == "cpu":
        torch.cuda.current_device = lambda: DEVICE
        bridge._get_transformer_layer_spec = lambda vp_stage=None: decoder_spec(
            bridge.config, use_transformer_engine=False, vp_stage=vp_stage
        )
        layer = "model.layers.{layer_number}"
        bridge._OTHER_MAPPING["input_layernorm.weight"] = [f"{layer}.input_layernorm.weight"]
        bridge._MLP_MAPPING["pre_mlp_layernorm.weight"] = [f"{layer}.post_attention_layernorm.weight"]
    return bridge
