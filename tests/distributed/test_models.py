"""Log probabilities of model families equal transformers' in several layouts; exports equal the source."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_gmpo.batch.columns import TrainBatch

from ..support import cases, reference
from ..support.ranks import RankPool
from .test_layouts import CP, EP, ETP, PP, TP, VPP, config, make_batch

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]

VOCAB = 259  # needs padding in every layout

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
WIDE = {"qk_rope_head_dim": 32, "head_dim": 32}  # wavelengths that YaRN keeps, mixes and stretches

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 one group": ("qwen3", {"num_key_value_heads": 4, "vocab_size": 384}),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": LLAMA3,
            "head_dim": 32,  # some wavelengths are below 2048 tokens, some above 8192, some between
        },
    ),
    "qwen2_moe normalised, without biases": ("qwen2_moe", {"norm_topk_prob": True, "qkv_bias": False}),
    "qwen2_moe mlp_only_layers": ("qwen2_moe", {"mlp_only_layers": [0, 3], "intermediate_size": 48}),
    "qwen3_moe not normalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3_moe mlp_only_layers": ("qwen3_moe", {"mlp_only_layers": [0, 3], "intermediate_size": 48}),
    "qwen3_moe decoder_sparse_step": ("qwen3_moe", {"decoder_sparse_step": 2, "intermediate_size": 48}),
    "deepseek_v3": ("deepseek_v3", {"v_head_dim": 12}),
    "deepseek_v3 no query rank": (
        "deepseek_v3",
        {"q_lora_rank": None, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
    ),
    "deepseek_v3 all experts": (
        "deepseek_v3",
        {"first_k_dense_replace": 0, "n_group": 1, "n_shared_experts": 2, "rms_norm_eps": 1e-2},
    ),
    "deepseek_v3 yarn rope": (
        "deepseek_v3",
        {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}, **WIDE},
    ),
    "deepseek_v3 yarn rope without mscale": ("deepseek_v3", {"rope_parameters": YARN, **WIDE}),
    "glm4_moe llama3 rope": ("glm4_moe", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "glm4_moe plain attention": (
        "glm4_moe",
        {"use_qk_norm": False, "attention_bias": False, "n_group": 1, "first_k_dense_replace": 2},
    ),
}
"""Variant -> family and changes to its config.json. A bare family selects the model of ``tiny_model``."""

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one rank": (1, {}),
    "tp2": (2, {TP: 2}),
    "pp2": (2, {PP: 2}),
    "pp2 vpp2": (2, {PP: 2, VPP: 2}),
    "tp2 pp2": (4, {TP: 2, PP: 2}),
    "cp2": (2, {CP: 2}),
    "ep2": (2, {EP: 2}),
    "tp2 ep2": (2, {TP: 2, EP: 2}),
    "tp2 etp2": (2, {TP: 2, ETP: 2}),
    "pp2 vpp2 ep2": (4, {PP: 2, VPP: 2, EP: 2}),
    "tp2 ep2 etp2": (4, {TP: 2, EP: 2, ETP: 2}),
    "ep4": (4, {EP: 4}),
}

COVERED = {
    "qwen2": ["one rank", "tp2", "pp2 vpp2"],
    "qwen2 tied": ["tp2 pp2"],
    "qwen3": ["one rank", "tp2", "pp2 vpp2", "tp2 pp2"],
    "qwen3 tied": ["one rank", "tp2", "pp2", "pp2 vpp2", "tp2 pp2"],
    "qwen3 one group": ["tp2"],
    "llama": ["one rank", "tp2 pp2"],
    "llama3 rope": ["one rank", "cp2"],
    "qwen2_moe": ["one rank", "tp2 etp2", "tp2 ep2", "pp2 vpp2 ep2", "tp2 ep2 etp2"],
    "qwen2_moe normalised, without biases": ["one rank"],
    "qwen2_moe mlp_only_layers": ["pp2 vpp2 ep2"],
    "mixtral": ["one rank", "tp2 etp2", "tp2 ep2", "pp2 vpp2 ep2"],
    "qwen3_moe": ["one rank", "ep2", "tp2 ep2", "tp2 etp2", "pp2 vpp2 ep2", "tp2 ep2 etp2", "ep4"],
    "qwen3_moe not normalised": ["one rank", "tp2 ep2"],
    "qwen3_moe mlp_only_layers": ["one rank", "pp2 vpp2 ep2"],
    "qwen3_moe decoder_sparse_step": ["pp2", "tp2 ep2"],
    "deepseek_v3": ["one rank", "tp2 ep2", "tp2 etp2", "cp2", "pp2 vpp2 ep2"],
    "deepseek_v3 no query rank": ["one rank", "tp2 ep2"],
    "deepseek_v3 all experts": ["one rank", "pp2 vpp2 ep2"],
    "deepseek_v3 yarn rope": ["one rank", "cp2", "tp2 ep2"],
    "deepseek_v3 yarn rope without mscale": ["one rank"],
    "glm4_moe": ["one rank", "tp2 ep2", "tp2 etp2", "cp2", "pp2 vpp2 ep2"],
    "glm4_moe plain attention": ["one rank", "tp2 ep2"],
    "glm4_moe llama3 rope": ["one rank"],
}


@pytest.fixture(scope="session")
def model_folder(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a function that makes the folder of a family or of one of MODELS.

    Every weight is random, and large enough that attention concentrates on few tokens.
    """
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            family, changes = MODELS.get(name, (name, {}))
            hf = AutoConfig.from_pretrained(
                tiny_model(family, hidden_size=32, ffn_hidden_size=32, head_dim=16)
            )
            hf.update({"vocab_size": VOCAB, "max_position_embeddings": 131072, **changes})
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(hf, dtype=torch.float32)
            with torch.no_grad():
                for tensor in model.state_dict().values():
                    torch.nn.init.normal_(
                        tensor, mean=float(tensor.ndim == 1), std=0.3 if tensor.ndim > 1 else 0.1
                    )
            made[name] = tmp_path_factory.mktemp("model")
            model.save_pretrained(made[name])
        return made[name]

    return make


@pytest.mark.versions
@pytest.mark.parametrize(
    ("model", "layout"), [(model, layout) for model, layouts in COVERED.items() for layout in layouts]
)
def test_logprobs_are_transformers_and_export_is_the_source(
    ranks: RankPool, model_folder: Callable[[str], Path], model: str, layout: str
) -> None:
    path, batch = model_folder(model), long_batch() if "rope" in model else make_batch()
    world_size, parallel = LAYOUTS[layout]
    results = ranks.run(world_size, cases.train, config(path, parallel, max_tokens=64), batch, 0)
    for result in results:
        assert_close(result["logprobs"].double(), reference.batch_logprobs(path, batch), atol=1e-4, rtol=0)
    assert_same_tensors(results[0]["weights"], reference.saved_tensors(path))


@pytest.mark.parametrize("layout", ["tp2 pp2", "pp2 vpp2 ep2", "tp2 ep2 etp2"])
def test_every_rank_gets_the_export_in_batches_of_any_size(
    ranks: RankPool, model_folder: Callable[[str], Path], layout: str
) -> None:
    """One parameter a batch, several, and all; the last is what the test above compares on rank 0."""
    path = model_folder("qwen3 tied" if layout == "tp2 pp2" else "qwen3_moe")
    world_size, parallel = LAYOUTS[layout]
    results = ranks.run(world_size, cases.exports, config(path, parallel, max_tokens=64), (1, 50_000, 2**30))
    for weights in (weights for result in results for weights in result):
        assert_same_tensors(weights, reference.saved_tensors(path))


@pytest.mark.parametrize("layout", ["tp2 pp2", "pp2 vpp2 ep2", "tp2 ep2 etp2"])
def test_each_stage_exports_its_own_tensors(
    ranks: RankPool, model_folder: Callable[[str], Path], layout: str
) -> None:
    """The senders together have each tensor once; no data passes between stages; metadata is sent once."""
    path = model_folder("qwen3 tied" if layout == "tp2 pp2" else "qwen3_moe")
    world_size, parallel = LAYOUTS[layout]
    results = ranks.run(world_size, cases.exports_of_stages, config(path, parallel, max_tokens=64))
    senders = results[0][0]
    assert senders[0] == 0
    assert len(senders) == parallel.get(PP, 1)
    union: dict[str, Tensor] = {}
    for sender in senders:
        assert not union.keys() & results[sender][1].keys()
        union |= results[sender][1]
    assert_same_tensors(union, reference.saved_tensors(path))
    assert all(found == senders and calls == [] for found, _, calls in results)


@pytest.mark.parametrize(
    ("rollout", "model", "change_tower", "sent"),
    [
        ({"engine": "sglang"}, {}, False, False),
        ({"engine": "sglang"}, {}, True, True),
        ({"engine": "sglang"}, {"freeze_vision": False}, False, True),
        ({"engine": "sglang", "server_urls": ["http://localhost:1"]}, {}, False, True),
        ({"engine": "embedded"}, {}, False, True),
    ],
)
def test_a_frozen_tower_is_sent_to_servers_that_lack_it(
    ranks: RankPool,
    tiny_model: Callable[..., Path],
    rollout: dict[str, Any],
    model: dict[str, Any],
    change_tower: bool,
    sent: bool,
) -> None:
    path = tiny_model("qwen3_vl", num_layers=2)
    cfg = config(path, {PP: 2}, max_tokens=64, rollout=rollout, model=model)
    results = ranks.run(2, cases.exported_names, cfg, change_tower)
    stored = load_file(path / "model.safetensors").keys()
    assert results == [{name for name in stored if sent or "visual." not in name}] * 2


def test_a_stage_without_tensors_of_its_own_sends_none(
    ranks: RankPool, model_folder: Callable[[str], Path]
) -> None:
    """Stages 1 and 2 have no layers; the last one has the norm, and a copy of the tied embedding."""
    path = model_folder("qwen3 tied")
    layers = AutoConfig.from_pretrained(path).num_hidden_layers
    layout = {"pipeline_model_parallel_layout": f"E{'t' * layers}|||L"}
    results = ranks.run(4, cases.exports_of_stages, config(path, {PP: 4}, max_tokens=64, megatron=layout))
    assert [senders for senders, *_ in results] == [[0, 3]] * 4
    assert_same_tensors(results[0][1] | results[3][1], reference.saved_tensors(path))


def test_stages_of_unequal_length(ranks: RankPool, model_folder: Callable[[str], Path]) -> None:
    """Stages of unequal length work, which the 61 layers of DeepSeek-V3 require."""
    path, batch = model_folder("deepseek_v3"), make_batch()
    cfg = config(path, {PP: 2}, max_tokens=64, megatron={"num_layers_in_first_pipeline_stage": 3})
    results = ranks.run(2, cases.train, cfg, batch, 0)
    for result in results:
        assert_close(result["logprobs"].double(), reference.batch_logprobs(path, batch), atol=1e-4, rtol=0)
    assert_same_tensors(results[0]["weights"], reference.saved_tensors(path))


def long_batch() -> TrainBatch:
    """Return a batch with one sequence, long enough to rotate the slow channels of rotary embeddings."""
    tokens = torch.randint(3, VOCAB, (700,), generator=torch.Generator().manual_seed(0))
    return TrainBatch(tokens, torch.tensor([700]), torch.arange(700) >= 1, torch.ones(1), torch.zeros(700))


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("name", ["llama3 rope", "glm4_moe llama3 rope", "deepseek_v3 yarn rope"])
def test_rope_scaling_shows_in_the_logprobs(model_folder: Callable[[str], Path], name: str) -> None:
    """RoPE scaling changes the log probabilities, so that the comparison above covers it."""
    path, tokens = model_folder(name), long_batch().tokens
    scaled = reference.load_float64(path)
    hf = AutoConfig.from_pretrained(path)
    hf.rope_parameters = {"rope_type": "default", "rope_theta": hf.rope_parameters["rope_theta"]}
    plain = AutoModelForCausalLM.from_config(
        hf, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    plain.load_state_dict(scaled.state_dict())
    with torch.no_grad():
        scaled, plain = (reference.sequence_logprobs(model, tokens, 1.0)[0] for model in (scaled, plain))
    assert (scaled - plain).abs().max() > 0.1


def test_a_folder_with_shards_and_an_index_and_bf16_weights(
    ranks: RankPool, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = AutoModelForCausalLM.from_pretrained(model_folder("qwen3_moe"), dtype=torch.bfloat16)
    source.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    cfg = config(tmp_path, {TP: 2, EP: 2}, max_tokens=64, model={"dtype": "bf16"})
    assert_same_tensors(
        ranks.run(2, cases.train, cfg, make_batch(), 0)[0]["weights"], reference.saved_tensors(tmp_path)
    )


@pytest.fixture
def broken_folder(model_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a model and applies ``change`` to its tensors."""

    def make(model: str, change: Callable[[dict[str, Tensor]], Any]) -> Path:
        source = model_folder(model)
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text((source / "config.json").read_text())
        return tmp_path

    return make


NORM, FC2 = "model.layers.3.input_layernorm.weight", "model.layers.2.mlp.experts.5.down_proj.weight"
REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing norm of the last stage": (lambda t: t.pop(NORM), f"lacks the tensor '{NORM}'"),
    "missing tensor of one expert": (lambda t: t.pop(FC2), f"lacks the tensor '{FC2}'"),
    "missing head": (lambda t: t.pop("lm_head.weight"), "lacks the tensor 'lm_head.weight'"),
    "extra bias": (
        lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)}),
        "'model.layers.1.self_attn.q_proj.bias'",
    ),
    "extra layer": (
        lambda t: t.update({NORM.replace("3", "4"): t[NORM].clone()}),
        f"'{NORM.replace('3', '4')}'",
    ),
    "misshapen expert": (lambda t: t.update({FC2: t[FC2][:, :-2].contiguous()}), f"{FC2} (32, 30)"),
    "misshapen norm": (lambda t: t.update({NORM: torch.ones(1)}), f"{NORM} (1,)"),
    "misshapen key": (
        lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(31, 32)}),
        "model.layers.0.self_attn.k_proj.weight (31, 32)",
    ),
    "larger vocabulary": (
        lambda t: t.update({"model.embed_tokens.weight": torch.zeros(VOCAB + 1, 32)}),
        f"model.embed_tokens.weight ({VOCAB + 1}, 32)",
    ),
    "smaller vocabulary": (
        lambda t: t.update({"model.embed_tokens.weight": torch.zeros(VOCAB - 1, 32)}),
        f"model.embed_tokens.weight ({VOCAB - 1}, 32)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("layout", ["one rank", "tp2 etp2", "pp2 vpp2 ep2"])
def test_a_folder_that_does_not_fit_is_refused_on_every_rank(
    ranks: RankPool, broken_folder: Callable[..., Path], layout: str, name: str
) -> None:
    change, named = REFUSED[name]
    world_size, parallel = LAYOUTS[layout]
    messages = ranks.run(
        world_size, cases.refusal, config(broken_folder("qwen3_moe", change), parallel, max_tokens=64)
    )
    for message in messages:
        assert named in message
        assert "\n" not in message


def test_megatron_fields_that_add_parameters_are_refused(
    ranks: RankPool, model_folder: Callable[[str], Path]
) -> None:
    cfg = config(
        model_folder("qwen3_moe"),
        {PP: 2},
        max_tokens=64,
        megatron={"moe_shared_expert_intermediate_size": 32},
    )
    for message in ranks.run(2, cases.refusal, cfg):
        assert "no conversion rule for Megatron parameter" in message
        assert "shared_experts" in message


def test_a_tied_model_that_stores_the_head_only(ranks: RankPool, broken_folder: Callable[..., Path]) -> None:
    """transformers loads the head into the embedding (tests/unit/test_hostile_folders.py)."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    path = broken_folder("qwen3 tied", lambda tensors: tensors.update({head: tensors.pop(embedding)}))
    expected = reference.saved_tensors(path)
    expected[embedding] = expected.pop(head)
    weights = ranks.run(2, cases.train, config(path, {PP: 2}, max_tokens=64), make_batch(), 0)[0]["weights"]
    assert_same_tensors(weights, expected)


def test_weights_that_are_no_safetensors(ranks: RankPool, broken_folder: Callable[..., Path]) -> None:
    path = broken_folder("qwen3", lambda tensors: None)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert all(
        str(file) in message for message in ranks.run(2, cases.refusal, config(path, {}, max_tokens=64))
    )
    file.unlink()
    assert all(
        "no model.safetensors" in message
        for message in ranks.run(2, cases.refusal, config(path, {}, max_tokens=64))
    )


def test_buffers_that_old_folders_store_are_no_parameters(
    ranks: RankPool, broken_folder: Callable[..., Path]
) -> None:
    path = broken_folder(
        "llama", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    assert ranks.run(1, cases.refusal, config(path, {}, max_tokens=64)) == [""]


SHIM = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM
from megatron_gmpo.platform import prepare_megatron

def answer():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        return tensors, model(torch.arange(3, 40)[None]).logits

tensors, logits = answer()
prepare_megatron(torch.device("cpu"))
prepare_megatron(torch.device("cpu"))
after, logits_after = answer()
assert tensors.keys() == after.keys() and len(tensors) > 40
assert any(name.endswith("inv_freq") for name in after)
for name, tensor in after.items():
    assert tensor.device.type == "cpu" and torch.equal(tensor, tensors[name]), name
assert torch.equal(logits, logits_after)
with torch.device("meta"):
    assert torch.zeros(1).is_meta and torch.empty(1).is_meta
assert torch.zeros(1, device="meta").is_meta
assert not torch.cuda.is_available()
try:
    torch.zeros(1, device="cuda")
except (RuntimeError, AssertionError):
    pass
else:
    raise AssertionError("outside Megatron, cuda no longer means cuda")
torch.compile(lambda x: x + 1)(torch.ones(2))
from torch._dynamo.utils import counters
assert not counters["frames"], "torch's compiler ran"
"""


def test_transformers_is_as_it_was_beside_the_cpu_shim(model_folder: Callable[[str], Path]) -> None:
    command = [sys.executable, "-c", SHIM, str(model_folder("qwen3_moe"))]
    env = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
