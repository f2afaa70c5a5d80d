"""Every field of config.json means to us what it means to transformers, for every family.

The fields that matter are not listed by hand: a config object records which of its attributes transformers'
code reads while it builds a model and runs it. Each of them has a value in VALUES that differs from the
default. Either a model with this value is refused, or its log probabilities equal transformers'.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import megatron_gmpo.models
from megatron_gmpo.config import Config
from megatron_gmpo.errors import InputError
from megatron_gmpo.models import FAMILIES
from megatron_gmpo.models.description import auto_class, describe_model

from ..support import cases, reference
from ..support.batches import without_images
from ..support.ranks import RankPool
from .test_layouts import config, make_batch

pytestmark = pytest.mark.distributed

VALUES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 24,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 12,
    "v_head_dim": 10,
    "q_lora_rank": 28,
    "kv_lora_rank": 22,
    "num_experts": 6,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 3,
    "topk_group": 3,  # all groups, because Megatron scores a group in another way if there is a choice
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
    "first_k_dense_replace": 2,
    "mlp_only_layers": [3],
    "decoder_sparse_step": 2,
    "rms_norm_eps": 1e-2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    "tie_word_embeddings": True,
    "qkv_bias": False,
    "attention_bias": True,
    "mlp_bias": True,
    "use_qk_norm": True,
    "rope_interleave": False,
    "hidden_act": "gelu",
    "is_causal": False,
    "layer_types": ["sliding_attention"] * 5,
    "sliding_window": 4,
    "attention_chunk_size": 4,
    "kv_sharing_modes": ["reuse"] * 5,
    "per_layer_config": {1: {"intermediate_size": 32}},
    # without effect on the log probabilities
    "pad_token_id": 5,
    "attention_dropout": 0.3,
    "initializer_range": 0.5,
    "max_position_embeddings": 777,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "router_jitter_noise": 0.5,
}

REFUSED: dict[str, set[str]] = {
    "qwen2": set(),
    "qwen2_moe": set(),
    "qwen3": {"attention_bias"},
    "qwen3_moe": {"attention_bias"},
    "llama": {"attention_bias", "mlp_bias"},
    "mixtral": set(),
    # transformers itself fails for such head_dim and num_key_value_heads
    "deepseek_v3": {"attention_bias", "rope_interleave", "head_dim", "num_key_value_heads"},
    "glm4_moe": set(),
    "qwen2_5_vl": {"head_dim"},
    "qwen3_vl": {"attention_bias"},
    "qwen3_vl_moe": {"attention_bias"},
}
"""Family -> fields whose value in VALUES is refused."""

REFUSED_EVERYWHERE = {
    "hidden_act",
    "is_causal",
    "layer_types",
    "sliding_window",
    "attention_chunk_size",
    "kv_sharing_modes",
    "per_layer_config",
}
"""The last five also decide what transformers' cache keeps, in families whose modelling code ignores them."""

PLUMBING = {
    "_attn_implementation",  # see tests/unit/test_hostile_folders.py, as for the next one
    "_experts_implementation",
    "auto_map",  # as above
    "base_model_ep_plan",
    "base_model_fsdp_plan",
    "base_model_pp_plan",
    "base_model_tp_plan",
    "dtype",  # model.dtype decides
    "get_text_config",
    "gradient_checkpointing",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "sub_configs",
    "use_cache",
    "vision_aspect_ratio",  # from here on, defaults for arguments of vision models
    "vision_feature_layer",
    "vision_feature_select_strategy",
}
"""Attributes that transformers reads and that do not describe the model."""

OURS_ALONE = {
    "model_type": "chooses the family",
    "is_heterogeneous": "transformers' name for a config with per_layer_config",
    "num_nextn_predict_layers": "names tensors that are not part of the model",
    "get_text_config": "returns the language model's part of a config",
    "vision_config": "tells a vision-language model",
    "image_token_id": "transformers reads it in prompts with images",
    "norm_topk_prob": "transformers' Qwen3-VL-MoE ignores it; false is refused",
}
"""Attribute that our code reads and transformers' does not -> reason."""

TOWER = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": VALUES["hidden_size"],
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}
"""``vision_config`` of the vision-language models here."""

OF_VISION = {
    *TOWER,
    "in_channels",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "window_size",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "text_config",
    "vision_config",
    "init_std",  # like the next one, other names of initializer_range
    "initializer_factor",
    "use_sliding_window",  # if false, the config has sliding_window = None
}
"""Attributes of vision-language models; transformers' own module reads those of the tower."""

MROPE = {
    "qwen2_5_vl": {"mrope_section": [1, 1, 2]},
    "qwen3_vl": {"mrope_section": [4, 4, 4], "mrope_interleaved": True},
    "qwen3_vl_moe": {"mrope_section": [4, 4, 4], "mrope_interleaved": True},
}
"""Family -> further rotary fields."""

ROPE_KINDS = {"deepseek_v3": {"default", "yarn"}, **{family: {"default"} for family in MROPE}}
"""Family -> supported kinds of rotary embeddings; {"default", "llama3"} for the other families."""

ROPE = {
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}
"""Parameters of every kind."""

Recorder = Callable[[str], set[str]]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Return ``recorder(folder)``, the set of config attributes that code in the folder reads from now on."""

    def record(folder: str) -> set[str]:
        reads: set[str] = set()
        plain = transformers.PreTrainedConfig.__getattribute__

        def get(self: Any, name: str) -> Any:
            file = sys._getframe(1).f_code.co_filename
            if file.startswith(folder) and "configuration_" not in file and not name.startswith("__"):
                reads.add(plain(self, "attribute_map").get(name, name))
            return plain(self, name)

        # records what transformers' own code reads, and returns the real value
        monkeypatch.setattr(transformers.PreTrainedConfig, "__getattribute__", get)
        return reads

    return record


def changed(family: str, *left_out: str) -> Any:
    values = {
        name: value
        for name, value in VALUES.items()
        if name not in REFUSED[family] | REFUSED_EVERYWHERE | set(left_out)
    }
    if family == "glm4_moe":
        values["partial_rotary_factor"] = 0.25  # the default is 0.5
    if family == "deepseek_v3":
        values["num_key_value_heads"] = values["num_attention_heads"]
    values = copy.deepcopy(values)  # transformers fills the dictionaries
    if family in MROPE:
        values["rope_parameters"] |= MROPE[family]
        whole = {"tie_word_embeddings": values["tie_word_embeddings"], "vision_config": dict(TOWER)}
        return AutoConfig.for_model(family, text_config=values, **whole)
    return AutoConfig.for_model(family, **values)


def model_of(hf: Any) -> Any:
    torch.manual_seed(0)
    model = auto_class(hf).from_config(hf, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            torch.nn.init.normal_(tensor, float(tensor.ndim == 1), 0.3 if tensor.ndim > 1 else 0.1)
    return model


def describe(hf: Any, folder: Path) -> Any:
    hf.save_pretrained(folder)
    cfg = {"device": "cpu", "model": {"path": str(folder), "dtype": "fp32"}}
    return describe_model(Config.model_validate(cfg), 1, torch.device("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_has_every_field(family: str, recorder: Recorder, tmp_path: Path) -> None:
    hf = changed(family)
    theirs = recorder(str(Path(transformers.__file__).parent))
    model, tokens = model_of(hf), torch.arange(10)[None]
    model.eval()(tokens)
    model.train()(tokens)
    theirs -= PLUMBING
    of_vision = OF_VISION if family in MROPE else set()
    assert theirs - {"num_experts", "n_routed_experts"} - of_vision <= VALUES.keys()
    ours = recorder(str(Path(megatron_gmpo.models.__file__).parent))
    describe(hf, tmp_path)
    assert ours - theirs - REFUSED_EVERYWHERE <= OURS_ALONE.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_values_give_what_transformers_computes(family: str, ranks: RankPool, tmp_path: Path) -> None:
    """All values together, also those that transformers ignores in this family."""
    hf = changed(family)
    model_of(hf).save_pretrained(tmp_path)
    if family in MROPE:
        processor = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": hf.vision_config.patch_size,
        }
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    batch = without_images(make_batch()) if family in MROPE else make_batch()
    (found,) = ranks.run(1, cases.train, config(tmp_path, {}, max_tokens=64), batch, 0)
    model = reference.load_float64(tmp_path).eval()  # without dropout and router jitter
    with torch.no_grad():
        expected = [
            reference.sequence_logprobs(model, batch.tokens[span], 1.0)[0] for span in reference.spans(batch)
        ]
    expected = torch.cat(expected) * batch.response_mask
    assert_close(found["logprobs"].double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "field"),
    [(family, field) for family in FAMILIES for field in sorted(REFUSED[family] | REFUSED_EVERYWHERE)],
)
def test_refused_fields(family: str, field: str, tmp_path: Path) -> None:
    hf = changed(family, field)
    if field == "sliding_window" and family.startswith("qwen"):
        hf.get_text_config().use_sliding_window = True
    setattr(hf.get_text_config(), field, VALUES[field])
    with pytest.raises(InputError, match=f"config.json of this {family}(_text)? model has {field} = "):
        describe(hf, tmp_path)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"glm4_moe"}))
@pytest.mark.parametrize("written", ["in rope_parameters", "beside"])
def test_partial_rotation_where_transformers_ignores_it(family: str, written: str, tmp_path: Path) -> None:
    hf = changed(family)
    model, tokens = model_of(hf).eval(), torch.arange(30)[None]
    about = hf.to_dict()
    language = about.get("text_config", about)
    (language if written == "beside" else language["rope_parameters"])["partial_rotary_factor"] = 0.5
    hf = AutoConfig.for_model(**about)
    other = model_of(hf).eval()
    assert torch.equal(model(tokens).logits, other(tokens).logits)
    if "partial_rotary_factor" not in hf.get_text_config().rope_parameters:
        assert (family, written) == ("qwen2_5_vl", "beside")  # transformers does not read it there
        return
    with pytest.raises(
        InputError, match=rf"this {family}(_text)? model has partial_rotary_factor = 0\.5, which this"
    ):
        describe(hf, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_kinds_of_rotary_embeddings_are_refused(family: str, tmp_path: Path) -> None:
    kinds = {"default", *ROPE_INIT_FUNCTIONS}
    assert {"llama3", "yarn", "linear", "dynamic", "longrope"} <= kinds
    supported = ROPE_KINDS.get(family, {"default", "llama3"})
    for kind in sorted(kinds):
        hf = changed(family)
        hf.get_text_config().rope_parameters = {"rope_type": kind, **ROPE, **MROPE.get(family, {})}
        if kind in supported:
            describe(hf, tmp_path)
        else:
            with pytest.raises(
                InputError, match=f"this {family}(_text)? model has rope_parameters = .*'{kind}'"
            ):
                describe(hf, tmp_path)
