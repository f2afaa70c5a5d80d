"""The parts of FP8 that a CPU can test: refusals, and token counts that suit every kernel."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer import TransformerConfig

from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.batch.packing import pack
from megatron_gmpo.command_line import load_config
from megatron_gmpo.config import Config, Fp8Config, OptimizerConfig
from megatron_gmpo.errors import InputError
from megatron_gmpo.models.description import describe_model
from megatron_gmpo.models.transformer_config import fp8_fields
from megatron_gmpo.platform import check_deterministic
from megatron_gmpo.platform.capabilities import (
    Capabilities,
    capabilities_of,
    check_apex,
    transformer_engine_version,
)
from megatron_gmpo.policy.build import check_optimizer
from megatron_gmpo.policy.fp8 import check_fp8, total_multiple

H100 = Capabilities("NVIDIA H100 80GB HBM3", (9, 0), (12, 9), (2, 11))
B200 = Capabilities("NVIDIA B200", (10, 0), (12, 9), (2, 11))
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
ALIGNED = {None: 1, "delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}
"""The number of tokens of a rank must be a multiple of this for Transformer Engine's kernels."""


def config(recipe: str | None, **sections: Any) -> Config:
    return Config.model_validate({"fp8": {"recipe": recipe}, **sections})


def transformer(**changes: Any) -> TransformerConfig:
    sizes = {
        "num_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 64,
        "ffn_hidden_size": 512,
    }
    return TransformerConfig(**{**sizes, "add_bias_linear": False, **changes})


def refusal(refuse: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        refuse()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("recipe", "machine", "words"),
    [
        ("tensorwise", Capabilities(), ["fp8.recipe = 'tensorwise' needs an NVIDIA GPU"]),
        (
            "tensorwise",
            Capabilities("H100", (9, 0), (12, 9)),
            ["Transformer Engine >= 2.9", "docs/install_gpu.md"],
        ),
        ("tensorwise", Capabilities("H100", (9, 0), (12, 9), (2, 8)), ["2.8 is installed"]),
        (
            "delayed",
            Capabilities("NVIDIA A100", (8, 0), (12, 9), (2, 11)),
            ["8.9 or more", "A100 has 8.0", "remove it"],
        ),
        (
            "tensorwise",
            Capabilities("NVIDIA A100", (8, 0), (12, 9), (2, 11)),
            ["8.9 or more", "A100 has 8.0", "remove it"],
        ),
        (
            "blockwise",
            Capabilities("NVIDIA L40S", (8, 9), (12, 9), (2, 11)),
            ["9.0 or more", "L40S has 8.9", "choose 'tensorwise'"],
        ),
        (
            "blockwise",
            Capabilities("NVIDIA H100", (9, 0), (12, 8), (2, 11)),
            ["CUDA 12.9 or newer", "12.8", "choose 'tensorwise'"],
        ),
        ("mxfp8", H100, ["10.0 or more, below 12.0", "H100 80GB HBM3 has 9.0", "choose 'blockwise'"]),
        ("mxfp8", Capabilities("RTX 5090", (12, 0), (12, 9), (2, 11)), ["below 12.0", "RTX 5090 has 12.0"]),
    ],
)
def test_machines_without_a_recipe(recipe: str, machine: Capabilities, words: list[str]) -> None:
    message = refusal(lambda: check_fp8(config(recipe), transformer(), machine))
    for word in words:
        assert word in message


def test_transformer_engine_has_the_upper_bound_of_the_installed_megatron() -> None:
    """megatron-core 0.16.1 requires Transformer Engine below 2.12; 0.19.2 has no upper bound.

    Source: the extra ``te`` in their package metadata.
    """
    newer = Capabilities("H100", (9, 0), (12, 9), (2, 12))
    if version("megatron-core").startswith("0.16."):
        message = refusal(lambda: check_fp8(config("tensorwise"), transformer(), newer))
        assert "Transformer Engine >= 2.9, < 2.12" in message
        assert "2.12 is installed" in message
    else:
        check_fp8(config("tensorwise"), transformer(), newer)


def test_delayed_scales_without_a_reference_policy() -> None:
    message = refusal(lambda: load_config(["--fp8.recipe", "delayed", "--algorithm.kl_coef", "0.1"]))
    assert "fp8.recipe = 'delayed' with algorithm.kl_coef" in message
    assert "choose 'tensorwise'" in message
    needs_reference = config("delayed", algorithm={"loss": "tests.support.losses:needs_reference"})
    message = refusal(lambda: check_fp8(needs_reference, transformer(), Capabilities()))
    assert "fp8.recipe = 'delayed' with algorithm.loss = " in message
    assert "choose 'tensorwise'" in message
    check_fp8(config("tensorwise", algorithm={"kl_coef": 0.1}), transformer(), H100)


@pytest.mark.parametrize(
    ("recipe", "machine"), [*product(RECIPES[:3], [H100]), *product(RECIPES, [B200]), (None, Capabilities())]
)
def test_machines_with_a_recipe(recipe: str | None, machine: Capabilities) -> None:
    check_fp8(config(recipe), transformer(), machine)


@pytest.mark.parametrize(
    ("recipe", "changes", "words"),
    [
        ("tensorwise", {"hidden_size": 264}, ["16 divides", "the hidden size is 264", "remove it"]),
        ("tensorwise", {"ffn_hidden_size": 520}, ["intermediate size / tensor_model_parallel_size is 520"]),
        (
            "tensorwise",
            {"ffn_hidden_size": 544, "tensor_model_parallel_size": 4},
            ["is 136", "another layout"],
        ),
        ("mxfp8", {"ffn_hidden_size": 528}, ["32 divides", "is 528", "choose 'tensorwise'"]),
        ("tensorwise", {"kv_channels": 9}, ["query heads x head size / tensor_model_parallel_size is 72"]),
        (
            "mxfp8",
            {"kv_channels": 12, "tensor_model_parallel_size": 4},
            ["heads x head size / tensor_model_parallel_size is 24"],
        ),
        (
            "tensorwise",
            {"num_moe_experts": 4, "moe_ffn_hidden_size": 24},
            ["the experts' intermediate size", "is 24"],
        ),
        (
            "tensorwise",
            {"num_moe_experts": 4, "moe_ffn_hidden_size": 64, "moe_shared_expert_intermediate_size": 40},
            ["the shared expert's intermediate size", "is 40"],
        ),
    ],
)
def test_matrices_that_no_kernel_takes(recipe: str, changes: dict[str, Any], words: list[str]) -> None:
    message = refusal(lambda: check_fp8(config(recipe), transformer(**changes), B200))
    for word in words:
        assert word in message


def test_sides_that_no_layer_has_do_not_matter() -> None:
    all_experts = transformer(num_moe_experts=4, moe_ffn_hidden_size=64, ffn_hidden_size=520)
    check_fp8(config("tensorwise"), all_experts, H100)
    some_dense = transformer(
        num_moe_experts=4, moe_ffn_hidden_size=64, ffn_hidden_size=520, moe_layer_freq=[0, 1, 1, 1]
    )
    assert "is 520" in refusal(lambda: check_fp8(config("tensorwise"), some_dense, H100))


def test_latent_attention(tiny_model: Callable[..., Path]) -> None:
    cfg = Config.model_validate({"device": "cpu", "model": {"path": str(tiny_model("deepseek_v3"))}})
    described = describe_model(cfg, 1, torch.device("cpu")).transformer
    described.kv_lora_rank = 24
    assert "kv_lora_rank is 24" in refusal(lambda: check_fp8(config("tensorwise"), described, H100))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--fp8.recipe", "int8"], ["fp8.recipe = 'int8'", "'tensorwise'"]),
        (["--fp8.param", "true"], ["fp8: param = True needs a recipe"]),
        (
            ["--fp8.recipe", "delayed", "--fp8.num_layers_at_end_in_bf16", "1"],
            ["fp8: layers in bf16", "choose 'tensorwise'"],
        ),
        (["--fp8.recipe", "mxfp8", "--fp8.param", "true"], ["another recipe than 'mxfp8'"]),
        (
            ["--fp8.recipe", "tensorwise", "--model.dtype", "fp32"],
            ["fp8.recipe = 'tensorwise' needs model.dtype = 'bf16', not 'fp32'"],
        ),
        (
            ["--optimizer.moments_dtype", "bf16", "--model.dtype", "fp32"],
            ["optimizer.moments_dtype = 'bf16' needs model.dtype"],
        ),
        (
            ["--optimizer.offload_fraction", "0.5", "--model.dtype", "fp32"],
            ["optimizer.offload_fraction = 0.5 needs model.dtype"],
        ),
        (
            ["--optimizer.moments_dtype", "bf16", "--optimizer.use_distributed_optimizer", "false"],
            ["needs use_distributed_optimizer"],
        ),
        (
            ["--optimizer.moments_dtype", "bf16", "--optimizer.offload_fraction", "1"],
            ["moments_dtype = 'bf16' with offload_fraction"],
        ),
        (
            ["--optimizer.overlap_param_gather", "true"],
            ["overlap_param_gather = true needs overlap_grad_reduce = true"],
        ),
        (
            ["--fp8.recipe", "tensorwise", "--fp8.param", "true", "--optimizer.moments_dtype", "bf16"],
            ["fp8.param = true with optimizer.moments_dtype"],
        ),
    ],
)
def test_settings_that_contradict_each_other(overrides: list[str], words: list[str]) -> None:
    message = refusal(lambda: load_config(overrides))
    for word in words:
        assert word in message


ARCHITECTURE = {"num_layers": 8, "num_moe_experts": 4}


def test_megatrons_fields() -> None:
    cfg = Config.model_validate({"fp8": {"recipe": "blockwise", "num_layers_at_end_in_bf16": 2}})
    assert fp8_fields(cfg.fp8, ARCHITECTURE, cfg.parallel) == {
        "fp8": "e4m3",
        "fp8_recipe": "blockwise",
        "fp8_param": False,
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 0,
        "num_layers_at_end_in_bf16": 2,
        "moe_router_padding_for_quantization": True,
    }
    given = {
        name: value
        for name, value in fp8_fields(Fp8Config(recipe="delayed"), {"num_layers": 8}, cfg.parallel).items()
        if value
    }
    assert given == {"fp8": "hybrid", "fp8_recipe": "delayed"}
    assert (
        fp8_fields(Fp8Config(recipe="mxfp8", format="hybrid"), ARCHITECTURE, cfg.parallel)["fp8"] == "hybrid"
    )
    assert fp8_fields(Fp8Config(), ARCHITECTURE, cfg.parallel) == {}


def test_more_bf16_layers_than_a_stage_has() -> None:
    cfg = Config.model_validate(
        {
            "fp8": {"recipe": "tensorwise", "num_layers_at_start_in_bf16": 5},
            "parallel": {"pipeline_model_parallel_size": 2},
        }
    )
    message = refusal(lambda: fp8_fields(cfg.fp8, ARCHITECTURE, cfg.parallel))
    assert message.startswith(
        "fp8.num_layers_at_start_in_bf16 = 5 is more than the 4 layers of a pipeline stage"
    )


def test_the_optimizers_needs() -> None:
    bare = Capabilities("H100", (9, 0), (12, 9))
    for field, value in (("moments_dtype", "bf16"), ("offload_fraction", 0.5)):
        cfg = OptimizerConfig.model_validate({field: value})
        check_optimizer(cfg, H100)
        assert f"optimizer.{field} = {value!r} needs an NVIDIA GPU" in refusal(
            lambda cfg=cfg: check_optimizer(cfg, Capabilities())
        )
        assert "needs Transformer Engine: install it as docs/install_gpu.md says" in refusal(
            lambda cfg=cfg: check_optimizer(cfg, bare)
        )
    check_optimizer(OptimizerConfig(overlap_grad_reduce=True, overlap_param_gather=True), Capabilities())


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that simulates which modules can be found.

    Usage: ``installed("apex", amp_C=False)``. Modules that are False cannot be found.
    """
    find = importlib.util.find_spec

    def pretend(*there: str, **others: bool) -> None:
        known = dict.fromkeys(there, True) | others

        def find_spec(name: str, package: str | None = None) -> Any:
            if name not in known:
                return find(name, package)
            return importlib.machinery.ModuleSpec(name, None) if known[name] else None

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    return pretend


def test_another_apex_is_told_apart(installed: Callable[..., None]) -> None:
    installed(apex=False)
    check_apex()
    installed("apex", "amp_C")
    check_apex()
    installed("apex", amp_C=False)
    assert "apex has no amp_C: it is PyPI's package" in refusal(check_apex)


def test_a_cpu_has_nothing() -> None:
    assert capabilities_of(torch.device("cpu")) == Capabilities()


def test_transformer_engine_without_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder on the path that has the package and no record of its installation."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"has no metadata .*install_gpu\.md") as refused:
        transformer_engine_version()
    assert str(tmp_path) in str(refused.value)
    record = tmp_path / "transformer_engine-2.11.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Name: transformer_engine\nVersion: 2.11.0\n")
    assert transformer_engine_version() == (2, 11)


def test_determinism_is_set_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    gpu = torch.device("cuda", 0)
    assert refusal(lambda: check_deterministic(True, gpu)).endswith(
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 CUBLAS_WORKSPACE_CONFIG=:4096:8"
    )
    check_deterministic(False, gpu)
    check_deterministic(True, torch.device("cpu"))


@pytest.mark.parametrize(
    ("recipe", "cp", "tp", "sp"), list(product(ALIGNED, [1, 2, 4], [1, 2, 4, 8], [True, False]))
)
def test_every_combination_pads_as_its_kernels_need(recipe: str | None, cp: int, tp: int, sp: bool) -> None:
    check_packing(recipe, cp, tp, sp, [1, 37, 8, 130])
    check_packing(recipe, cp, tp, sp, [1, 37, 8, 130], dummy=True)


@settings(deadline=None, max_examples=100)
@given(
    recipe=st.sampled_from(list(ALIGNED)),
    cp=st.sampled_from([1, 2, 4]),
    tp=st.sampled_from([1, 2, 4, 8]),
    sp=st.booleans(),
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=8),
)
def test_any_lengths(recipe: str | None, cp: int, tp: int, sp: bool, lengths: list[int]) -> None:
    check_packing(recipe, cp, tp, sp, lengths)


def check_packing(
    recipe: str | None, cp: int, tp: int, sp: bool, lengths: list[int], dummy: bool = False
) -> None:
    """Check that packing keeps every token once and gives every rank a length that the kernels accept.

    All ranks have the same length, and sequences are cut into equal chunks.
    """
    parallel = {"context_parallel_size": cp, "tensor_model_parallel_size": tp, "sequence_parallel": sp}
    cfg = config(recipe, parallel=parallel)
    total, scattered = sum(lengths), sp and tp > 1
    batch = TrainBatch(
        tokens=torch.arange(1, total + 1),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        response_mask=torch.ones(total, dtype=torch.bool),
        advantages=torch.zeros(len(lengths)),
        rollout_logprobs=torch.zeros(total),
    )
    lengths = [] if dummy else lengths
    seen: list[int] = []
    widths = set()
    for rank in range(cp):
        packed = pack(
            batch,
            list(range(len(lengths))),
            cp_size=cp,
            cp_rank=rank,
            sequence_multiple=2 * cp if cp > 1 else 1,
            total_multiple=total_multiple(cfg),
        )
        widths.add(len(packed.tokens))
        bounds = packed.cu_seqlens.tolist()
        assert bounds[-1] == cp * len(packed.tokens)
        for start, end in pairwise(bounds):
            assert end > start
            assert cp == 1 or (end - start) % (2 * cp) == 0
        seen += [token for token in packed.tokens.tolist() if token]
        assert not packed.mask[packed.flat_index < 0].any()  # padding must not carry loss
    assert sorted(seen) == list(range(1, sum(lengths) + 1))
    (width,) = widths
    stretch, rest = divmod(width, tp if scattered else 1)
    assert rest == 0
    assert stretch % ALIGNED[recipe] == 0
    # The total is no larger than needed: the next smaller one is too short or breaks one of the rules
    # above.
    smallest = sum(-(-length // (2 * cp)) * 2 * cp if cp > 1 else length for length in lengths)
    step = 2 * cp if cp > 1 else 1
    rank_multiple = ALIGNED[recipe] * (tp if scattered else 1)
    assert not any(
        n % (cp * rank_multiple) == 0 for n in range(max(smallest, 1), cp * width, 1) if n % step == 0
    )
