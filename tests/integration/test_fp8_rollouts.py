"""Block-wise FP8 weights in real SGLang servers, by every route, compared with transformers.

transformers computes with the dequantised weights. The servers load and store the weights as on a GPU.
Torch code replaces two matrix multiplications (see ``tests/support/sglang_fp8_launcher.py``).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config

from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.config import Config, WeightSyncConfig
from megatron_gmpo.errors import InputError
from megatron_gmpo.models.fp8_blocks import quantize_all
from megatron_gmpo.rollout.embedded import EmbeddedEngine
from megatron_gmpo.rollout.engine import SamplingParams
from megatron_gmpo.rollout.sglang import processes
from megatron_gmpo.rollout.sglang.start import check_servers, fp8_start_folder, local_servers, start_sglang
from megatron_gmpo.rollout.sglang.sync import make_weight_sync
from megatron_gmpo.weights.safetensors_folder import SafetensorsFolder

from ..support.commands import ROOT
from ..support.sglang_servers import CPU, PYTHON, generate, needs_sglang

PROMPT = [5, 6, 7, 8, 9, 10]
# SGLang fuses only matrices whose sizes are multiples of the FP8 block
SHAPE = {"num_layers": 2, "head_dim": 64, "ffn_hidden_size": 128}
# one and a half blocks for qwen3; qwen3_moe is synced with verify, whose checksums need whole blocks
HIDDEN = {"qwen3": 192, "qwen3_moe": 128}


def tensors_of(model: Path) -> list[tuple[str, Tensor]]:
    folder = SafetensorsFolder(model)
    return [(name, folder.get(name)) for name in folder.names]


def dequantized(model: Path, out: Path) -> Any:
    """Return a transformers model in fp32 with the weights that are sent: FP8 values times their scales."""
    sent = {name: tensor.float() for name, tensor in quantize_all(tensors_of(model))}
    for name in [name for name in sent if name.endswith("_scale_inv")]:
        scale, weight = sent.pop(name), name.removesuffix("_scale_inv")
        rows, columns = sent[weight].shape
        sent[weight] = sent[weight] * torch.kron(scale, torch.ones(128, 128))[:rows, :columns]
    shutil.copytree(model, out)
    save_file(sent, out / "model.safetensors")
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids])).logits[0]  # (tokens, vocabulary)


def differences(
    models: list[Any], prompt: list[int], response: list[int], logprobs: list[float]
) -> list[float]:
    """Return the mean absolute difference of a server's log probabilities from each model's."""
    found = []
    for model in models:
        expected = logits_of(model, prompt + response)[len(prompt) - 1 : -1].log_softmax(-1)
        found.append(
            (torch.tensor(logprobs) - expected.gather(1, torch.tensor(response)[:, None])[:, 0])
            .abs()
            .mean()
            .item()
        )
    print("mean difference from the dequantised, the unquantised and another model:", found)
    return found


@pytest.fixture
def fp8_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_LAUNCHER", ROOT / "tests/support/sglang_fp8_launcher.py")


def fp8_config(model: Path, **sections: dict[str, Any]) -> Config:
    rollout = {"engine": "sglang", "quantization": "fp8"}
    return Config.model_validate(
        {"model": {"path": str(model)}, "sglang": {"python": str(PYTHON)}, "rollout": rollout} | sections
    )


@needs_sglang
def test_routes(fp8_on_cpu: None, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    models = [tiny_model("qwen3", hidden_size=HIDDEN["qwen3"], seed=seed, **SHAPE) for seed in (0, 1)]
    references = [dequantized(model, tmp_path / f"dequantized_{seed}") for seed, model in enumerate(models)]
    servers = local_servers(fp8_config(models[0]), CPU, tmp_path / "servers")
    try:
        servers.start()
        servers.wait_ready()
        for turn, route in enumerate(get_args(WeightSyncConfig.model_fields["route"].annotation)):
            new, other = turn % 2, 1 - turn % 2
            cfg = WeightSyncConfig(route=route, bucket_bytes=100_000, timeout_s=60)
            sync = make_weight_sync(cfg, "disaggregated", CPU, tmp_path, quantized=True)
            report = sync.update(servers.servers, tensors_of(models[new]), route)
            sync.close()
            assert report.failed == ()
            assert report.nbytes == sum(tensor.nbytes for _, tensor in quantize_all(tensors_of(models[new])))
            answer = generate(servers.servers[0], PROMPT, max_new_tokens=16).json()
            assert answer["meta_info"]["weight_version"] == route
            logprobs = [logprob for logprob, *_ in answer["meta_info"]["output_token_logprobs"]]
            compared = [references[new], AutoModelForCausalLM.from_pretrained(models[new]), references[other]]
            right, before, wrong = differences(compared, PROMPT, answer["output_ids"], logprobs)
            assert right < 0.02  # the server computes in bf16
            assert right < before < wrong
    finally:
        servers.stop()


@needs_sglang
def test_engine(fp8_on_cpu: None, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Sync through the engine, as in a run; ``verify`` overwrites every weight with noise before the sync."""
    old, new = (
        tiny_model("qwen3_moe", hidden_size=HIDDEN["qwen3_moe"], seed=seed, **SHAPE) for seed in (0, 1)
    )
    cfg = fp8_config(old, weight_sync={"route": "distributed", "verify": True, "timeout_s": 60}).model_copy(
        update={"run_dir": str(tmp_path)}
    )
    compared = [
        dequantized(new, tmp_path / "dequantized"),
        AutoModelForCausalLM.from_pretrained(new),
        AutoModelForCausalLM.from_pretrained(old),
    ]
    engine = start_sglang(cfg, AutoConfig.from_pretrained(old), AutoTokenizer.from_pretrained(old), CPU)
    try:
        engine.update_weights(tensors_of(new), version=1)
        groups = engine.generate(
            [Prompt(id="0", answer="", input_ids=PROMPT)], SamplingParams(n=4, max_new_tokens=16)
        )
    finally:
        engine.close()
    for sample in groups[0].samples:
        assert sample.policy_version == 1
        response = len(PROMPT)
        right, before, wrong = differences(
            compared, PROMPT, sample.tokens[response:].tolist(), sample.rollout_logprobs[response:].tolist()
        )
        assert right < 0.03  # in bf16 some tokens are routed to other experts
        assert right < before < wrong


@pytest.mark.parametrize("family", HIDDEN)
def test_embedded_engine(family: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    old, new = (tiny_model(family, hidden_size=HIDDEN[family], seed=seed, **SHAPE) for seed in (0, 1))
    tokenizer = AutoTokenizer.from_pretrained(old)
    engine = EmbeddedEngine(
        str(old), tokenizer, device=CPU, dtype=torch.float32, batch_size=4, seed=1, quantized=True
    )
    engine.update_weights(tensors_of(new), version=1)
    expected = logits_of(dequantized(new, tmp_path / "dequantized"), PROMPT)
    torch.testing.assert_close(logits_of(engine.model, PROMPT), expected, rtol=0, atol=1e-5)
    assert (logits_of(AutoModelForCausalLM.from_pretrained(new), PROMPT) - expected).abs().max() > 0.01


def test_a_model_in_fp8_needs_fp8_rollouts(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = fp8_start_folder(tiny_model("qwen3", num_layers=2), tmp_path / "fp8")
    about: dict[str, Any] = {
        "model": {"path": str(folder)},
        "rollout": {"engine": "sglang"},
        "sglang": {"python": sys.executable},
    }
    with pytest.raises(InputError, match=r"model\.path = '.*' is in FP8: set rollout\.quantization = 'fp8'"):
        check_servers(Config.model_validate(about), AutoConfig.from_pretrained(folder), torch.device("cpu"))
    about["rollout"]["quantization"] = "fp8"
    check_servers(Config.model_validate(about), AutoConfig.from_pretrained(folder), torch.device("cpu"))


def test_transformers_reads_the_fp8_folder(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """transformers derives the block size from the number of scales, so this test uses whole blocks only."""
    model = tiny_model("qwen3_moe", hidden_size=128, **SHAPE)
    folder = fp8_start_folder(model, tmp_path / "fp8")
    save_file(
        {name: tensor.contiguous() for name, tensor in quantize_all(tensors_of(model))},
        folder / "model.safetensors",
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    expected = logits_of(dequantized(model, tmp_path / "dequantized"), PROMPT)
    torch.testing.assert_close(logits_of(theirs, PROMPT), expected, rtol=0, atol=1e-5)
