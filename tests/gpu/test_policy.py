"""The policy on one NVIDIA GPU, in bf16, with Transformer Engine's layers.

These tests have not run yet: they were written on a machine without a GPU.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.losses.objective import make_objective
from megatron_gmpo.metrics.figures import value_of
from megatron_gmpo.models.fp32_head import fp32_product
from megatron_gmpo.policy.optimizer_state import optimizer_slots
from megatron_gmpo.policy.policy import Policy
from megatron_gmpo.weights.safetensors_folder import SafetensorsFolder

from ..support.run_states import records
from .conftest import LENGTHS, Open, make_batch

pytestmark = pytest.mark.gpu

FAMILIES = ["qwen3", "qwen3_moe"]


def steps(policy: Policy, batch: TrainBatch, count: int) -> list[float]:
    """Run ``count`` optimizer steps on the batch, which has ``old_logprobs``, and return their losses."""
    objective = make_objective(policy.cfg.algorithm, is_moe=policy.description.is_moe, max_new_tokens=64)
    share = batch if batch.plan else policy.share(batch)
    return [value_of(policy.train_step(share, objective)["loss"]) for _ in range(count)]


def difference(a: torch.Tensor, b: torch.Tensor, batch: TrainBatch) -> float:
    """Return the mean absolute difference over response tokens."""
    return float((a - b)[batch.response_mask].abs().mean())


def test_products_of_bf16_in_fp32() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randn(rows, 512, generator=generator, device="cuda").bfloat16() for rows in (128, 1000))
    product = fp32_product(a, b.T)
    assert product.dtype == torch.float32
    assert_close(product.double(), a.double() @ b.double().T, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v3"])
def test_logprobs_are_those_of_transformers(policy_of: Open, batch: TrainBatch, family: str) -> None:
    with policy_of(family) as policy:
        model = AutoModelForCausalLM.from_pretrained(policy.cfg.model.path, dtype=torch.float32).cuda()
        expected = torch.zeros(len(batch.tokens))
        with torch.no_grad():
            for start, length in zip(batch.starts.tolist(), LENGTHS, strict=True):
                ids = batch.tokens[start : start + length].cuda()
                logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
                expected[start + 1 : start + length] = logprobs.cpu()
        assert difference(policy.logprobs(batch), expected, batch) < 0.05  # bf16 against fp32


@pytest.mark.parametrize("family", FAMILIES)
def test_no_wait_in_our_own_code(policy_of: Open, batch: TrainBatch, family: str) -> None:
    with policy_of(family, train={"max_tokens_per_microbatch": 100}) as policy:
        batch = policy.share(batch)
        policy.set_old_logprobs(batch)
        steps(policy, batch, 1)
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                steps(policy, batch, 1)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        # this mode does not report the synchronization of a stream, with which ``fetch`` waits
        ours = [f"{w.filename}:{w.lineno}" for w in waits if "megatron_gmpo" in w.filename]
        assert ours == []
        assert waits  # Megatron reads the gradient norm


@pytest.mark.parametrize("family", FAMILIES)
def test_both_layer_specs_agree(
    policy_of: Open, batch: TrainBatch, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with policy_of(family) as policy:
        fused = policy.logprobs(batch)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "transformer_engine" else find(name, *args),
    )
    with policy_of(family, transformer_engine=False) as policy:
        assert difference(policy.logprobs(batch), fused, batch) < 0.05


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v3", "glm4_moe"])
def test_names_of_fused_layers_come_back(policy_of: Open, family: str) -> None:
    with policy_of(family) as policy:
        source = SafetensorsFolder(policy.cfg.model.path)
        exported = {name: tensor.cpu() for name, tensor in policy.export_hf()}
        assert exported.keys() == set(source.names)
        for name, tensor in exported.items():
            assert torch.equal(tensor, source.get(name).to(tensor.dtype)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_do_not_see_each_other(policy_of: Open, batch: TrainBatch, family: str) -> None:
    with policy_of(family) as policy:
        packed = policy.logprobs(batch)
    with policy_of(family, train={"max_tokens_per_microbatch": 1}) as policy:
        assert difference(policy.logprobs(batch), packed, batch) < 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_learns(policy_of: Open, batch: TrainBatch, family: str) -> None:
    with policy_of(family, optimizer={"lr": 1e-4}) as policy:
        batch.old_logprobs = policy.logprobs(batch)
        losses = steps(policy, batch, 5)
        assert losses[-1] < losses[0]


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16 moments": {"optimizer": {"moments_dtype": "bf16"}},
    "half of it on the host": {"optimizer": {"offload_fraction": 0.5}},
    "overlap": {"optimizer": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
    "fp8 weights": {"fp8": {"recipe": "tensorwise", "param": True}},
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_checkpoint_brings_the_optimizer_back(
    policy_of: Open, batch: TrainBatch, tmp_path: Path, kind: str
) -> None:
    sections = OPTIMIZERS[kind]
    optimizer = {"lr": 1e-3} | sections.get("optimizer", {})
    with policy_of("qwen3_moe", **(sections | {"optimizer": optimizer})) as policy:
        batch.old_logprobs = policy.logprobs(batch)
        start = policy.start_save(tmp_path, 0, records(), 9).finish()  # before any optimizer state exists
        losses = steps(policy, batch, 2)
        saved = policy.start_save(tmp_path, 2, records(), 9).finish()
        before, logprobs = optimizer_state(policy), policy.logprobs(batch)
        steps(policy, batch, 1)
        policy.load(saved)
        assert_close(optimizer_state(policy), before, rtol=0, atol=0)
        assert difference(policy.logprobs(batch), logprobs, batch) < 1e-3
        policy.load(start)
        assert steps(policy, batch, 2) == pytest.approx(losses, abs=1e-2)


def optimizer_state(policy: Policy) -> list[dict[str, torch.Tensor]]:
    return [
        {name: tensor.float().cpu().clone() for name, tensor in slot.tensors.items()}
        for slot in optimizer_slots(policy.model.optimizer)
    ]


@pytest.mark.parametrize("optimizer", [{"moments_dtype": "bf16"}, {"offload_fraction": 1.0}])
def test_an_optimizer_of_another_kind_takes_the_same_steps(
    policy_of: Open, batch: TrainBatch, optimizer: dict[str, Any]
) -> None:
    def learned(**changes: Any) -> torch.Tensor:
        with policy_of("qwen3", optimizer={"lr": 1e-3, **changes}) as policy:
            batch.old_logprobs = policy.logprobs(batch)
            steps(policy, batch, 3)
            return policy.logprobs(batch)

    plain = learned()
    # The policy has moved.
    assert difference(plain, batch.old_logprobs, batch) > 0.05  # pyright: ignore[reportArgumentType]
    assert difference(learned(**optimizer), plain, batch) < 0.02


@pytest.mark.parametrize("fp8", [{}, {"recipe": "tensorwise"}])
def test_memory_is_free_after_each_phase(policy_of: Open, fp8: dict[str, Any]) -> None:
    batch = make_batch([900, 700, 800])
    sections: dict[str, Any] = {
        "fp8": fp8,
        "algorithm": {"kl_coef": 0.1},
        "model": {"reference_offload": True},
    }
    with policy_of("qwen3_moe", **sections) as policy:

        def phases() -> list[int]:
            held = []
            batch.old_logprobs = policy.logprobs(batch)
            held.append(torch.cuda.memory_allocated())
            batch.ref_logprobs = policy.reference_logprobs(policy.share(batch))
            held.append(torch.cuda.memory_allocated())
            steps(policy, batch, 1)
            held.append(torch.cuda.memory_allocated())
            for _ in policy.export_hf():
                pass
            return [*held, torch.cuda.memory_allocated()]

        assert policy.reference
        assert all(not parameter.is_cuda for chunk in policy.reference for parameter in chunk.parameters())
        phases()  # the first call creates optimizer state and workspaces
        first, second = phases(), phases()
        assert second == pytest.approx(first, abs=2**20)
        assert max(second) - min(second) < 2**22  # no phase keeps memory for the next one
