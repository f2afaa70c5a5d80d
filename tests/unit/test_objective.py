"""The objective of a config equals direct calls of the losses; rollout and training metrics are correct."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_gmpo.batch.columns import Microbatch, TrainBatch
from megatron_gmpo.batch.packing import pack
from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.config import AlgorithmConfig, Config
from megatron_gmpo.distributed import all_gather_objects, barrier, rank, sum_over_group, world_size
from megatron_gmpo.errors import InputError
from megatron_gmpo.losses import LossOutput, LossTokens, dr_grpo
from megatron_gmpo.losses.advantages import ADVANTAGES
from megatron_gmpo.losses.correction import (
    correct,
    importance_weights,
    kept_tokens,
    rollout_mismatch,
)
from megatron_gmpo.losses.objective import Objective, make_objective, minibatches_without_pass
from megatron_gmpo.losses.registry import LOSSES, default_clips
from megatron_gmpo.metrics.figures import value_of
from megatron_gmpo.metrics.token_records import Record
from megatron_gmpo.policy.observed import Observed, Seen, TokenRecorder
from megatron_gmpo.testing.tiny_tokenizers import text_tokenizer

from ..support.batches import split
from ..support.groups import index_of, step_batch

SLOTS, SEQUENCES = 24, 4


def microbatch() -> Microbatch:
    """Return four sequences of six slots, two of them prompt, with ratios beyond every clip."""
    g = torch.Generator().manual_seed(0)
    random = lambda scale=1.0: torch.randn(SLOTS, generator=g) * scale  # noqa: E731
    slots = torch.arange(SLOTS)
    return Microbatch(
        tokens=slots,
        labels=slots + 1,
        position_ids=slots % 6,
        cu_seqlens=torch.arange(0, SLOTS + 1, 6, dtype=torch.int32),
        bounds=list(range(0, SLOTS + 1, 6)),
        mask=slots % 6 >= 2,
        loss_slots=slots[slots % 6 >= 2],
        sequence_ids=slots // 6,
        flat_index=slots,
        input_index=slots - 1,
        advantages=torch.tensor([1.0, -1.0, 0.5, -2.0]),
        old_logprobs=random() - 2,
        ref_logprobs=random() - 2,
        rollout_logprobs=random() - 2,
        sequence_weights=torch.tensor([1.0, 0.5, 2.0, 0.25]),
        kept_tokens=torch.rand(SLOTS, generator=g) < 0.8,
    )


def predicted() -> tuple[Tensor, Tensor]:
    """Return log probabilities and entropies under the policy, with gradient."""
    g = torch.Generator().manual_seed(1)
    return (torch.randn(SLOTS, generator=g) - 2).requires_grad_(), torch.rand(
        SLOTS, generator=g
    ).requires_grad_()


def objective_of(*, is_moe: bool = False, max_new_tokens: int = 64, **fields) -> Objective:
    return make_objective(AlgorithmConfig(**fields), is_moe=is_moe, max_new_tokens=max_new_tokens)


def outcome(call, batch: Microbatch) -> tuple[LossOutput, list[Tensor | None]]:
    logprobs, entropy = predicted()
    output = call(logprobs, entropy, batch)
    output.loss.backward()
    return replace(output, loss=output.loss.detach()), [logprobs.grad, entropy.grad]


def assert_same(
    ours: tuple[LossOutput, list[Tensor | None]], direct: tuple[LossOutput, list[Tensor | None]]
) -> None:
    assert float(direct[0].loss) != 0
    assert_close(ours[0].loss, direct[0].loss, rtol=0, atol=0)
    for a, b in zip(ours[1], direct[1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, rtol=0, atol=0)
    values = [
        {name: value_of(metric) for name, metric in output.metrics.items()} for output, _ in (ours, direct)
    ]
    assert values[0] == values[1]


def direct_call(
    name: str,
    batch: Microbatch,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    max_kl: float | None = None,
    max_response_tokens: int = 64,
    **options,
):
    """Call the loss with all arguments; its clips are the defaults for a dense model."""
    clips, _ = default_clips(name, LOSSES[name], is_moe=False)

    def call(logprobs: Tensor, entropy: Tensor, _: Microbatch) -> LossOutput:
        assert batch.old_logprobs is not None
        tokens = LossTokens(
            logprobs=logprobs,
            old_logprobs=batch.old_logprobs,
            mask=batch.mask,
            sequence_ids=batch.sequence_ids,
            advantages=batch.advantages,
            ref_logprobs=batch.ref_logprobs,
            rollout_logprobs=batch.rollout_logprobs,
            entropy=entropy if entropy_coef else entropy.detach(),
            sequence_weights=batch.sequence_weights,
            kept=batch.kept_tokens,
            max_kl=max_kl,
            kl_coef=kl_coef,
            entropy_coef=entropy_coef,
            max_response_tokens=max_response_tokens,
            columns={} if batch.router_shift is None else {"router_shift": batch.router_shift},
        )
        return LOSSES[name].function(tokens, **clips | options)

    return outcome(call, batch)


def ours(objective: Objective, batch: Microbatch):
    return outcome(lambda logprobs, entropy, b: objective(logprobs, entropy, b, None), batch)


@pytest.mark.parametrize(("is_moe", "clip"), [(False, 0.4), (True, 0.2)])
def test_gmpo_is_the_default_with_the_clip_of_its_kind_of_model(is_moe: bool, clip: float) -> None:
    batch = microbatch()
    objective = objective_of(is_moe=is_moe)
    assert_same(ours(objective, batch), direct_call("gmpo", batch, clip_low=clip, clip_high=clip))
    assert objective.description.startswith(f"gmpo, clip_low {clip}, clip_high {clip} (")
    assert ("MoE" in objective.description) == is_moe
    assert ("dense" in objective.description) != is_moe


def test_clips_of_the_config_come_first() -> None:
    batch = microbatch()
    objective = objective_of(clip_low=0.1, clip_high=0.0, is_moe=True)
    assert_same(ours(objective, batch), direct_call("gmpo", batch, clip_low=0.1, clip_high=0.0))
    assert objective.description.startswith("gmpo, clip_low 0.1, clip_high 0 (from the config), advantage ")
    half = objective_of(clip_low=0.1, is_moe=True)
    assert_same(ours(half, batch), direct_call("gmpo", batch, clip_low=0.1, clip_high=0.2))
    assert "MoE" in half.description


@pytest.mark.parametrize(
    ("loss", "advantage"),
    [
        ("gmpo", "normalized"),  # arXiv 2507.20673, equation 2 and the official code
        ("rspo", "normalized"),  # arXiv 2510.23027
        ("grpo", "normalized"),  # arXiv 2402.03300, section 4.1.2
        ("dr_grpo", "mean"),  # arXiv 2503.20783, section 3.2: without the division by std
        ("dapo", "normalized"),  # arXiv 2503.14476, equation 9
        ("gspo", "normalized"),  # arXiv 2507.18071, equation 3
        ("cispo", "normalized"),  # arXiv 2506.13585, section 3.1
    ],
)
def test_a_loss_brings_the_advantage_of_its_paper_unless_the_config_sets_one(
    loss: str, advantage: str
) -> None:
    alone = objective_of(loss=loss, is_moe=loss == "rspo")
    assert alone.advantage == advantage
    assert alone.description.endswith(f", advantage {advantage} (default of {loss})")
    for chosen in ADVANTAGES:
        objective = objective_of(loss=loss, advantage=chosen, is_moe=loss == "rspo")
        assert objective.advantage == chosen
        assert objective.description.endswith(f", advantage {chosen} (from the config)")


def test_options_reach_the_loss() -> None:
    batch = microbatch()
    options = {"clip_mode": "sequence", "dual_clip": 0.1, "length_normalize": False}
    with_options = ours(objective_of(options=options), batch)
    assert_same(with_options, direct_call("gmpo", batch, **options))
    assert float(with_options[0].loss) != float(ours(objective_of(), batch)[0].loss)


def test_dr_grpo_divides_by_the_token_limit_unless_told() -> None:
    batch = microbatch()
    assert_same(
        ours(objective_of(loss="dr_grpo", max_new_tokens=48), batch),
        direct_call("dr_grpo", batch, length_normalizer=48.0),
    )
    told = objective_of(loss="dr_grpo", max_new_tokens=48, options={"length_normalizer": 7})
    assert_same(ours(told, batch), direct_call("dr_grpo", batch, length_normalizer=7.0))


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_with_its_own_defaults(loss: str) -> None:
    batch = microbatch()
    batch.router_shift = torch.rand(SLOTS) if loss == "rspo" else None
    objective = objective_of(loss=loss, is_moe=loss == "rspo")
    assert_same(ours(objective, batch), direct_call(loss, batch))
    assert objective.description.startswith(f"{loss}, clip_low ")


@pytest.mark.parametrize("loss", ["gmpo", "dapo"])
@pytest.mark.parametrize(("kl_coef", "entropy_coef"), [(0.1, 0.0), (0.0, 0.2), (0.1, -0.2)])
def test_penalties(loss: str, kl_coef: float, entropy_coef: float) -> None:
    batch = microbatch()
    found = ours(objective_of(loss=loss, kl_coef=kl_coef, entropy_coef=entropy_coef), batch)
    assert_same(found, direct_call(loss, batch, kl_coef, entropy_coef))
    bare = ours(objective_of(loss=loss), batch)
    # gmpo takes the mean over a sequence's four tokens, dapo the sum.
    per = 4 if loss == "gmpo" else 1
    logprobs, entropy = (x.detach()[batch.mask] for x in predicted())
    log_ratio = batch.ref_logprobs[batch.mask] - logprobs
    added = (kl_coef * (log_ratio.exp() - 1 - log_ratio).sum() - entropy_coef * entropy.sum()) / per
    assert_close(found[0].loss - bare[0].loss, added, rtol=1e-4, atol=1e-5)
    gradient = torch.where(batch.mask, -entropy_coef / per, 0.0)
    if entropy_coef:
        assert_close(found[1][1], gradient)
    else:
        assert found[1][1] is None
    # The metrics are logged even if they are not part of the loss.
    assert {"policy/kl_ref", "policy/entropy"} <= bare[0].metrics.keys()


@pytest.mark.parametrize("penalties", [{}, {"kl_coef": 0.3, "entropy_coef": 0.1}], ids=["none", "both"])
def test_an_observed_loss_is_the_same_and_keeps_the_gradient_of_its_policy_term(penalties) -> None:
    """The gradient is that of the paper's equation in float64, exactly 0 for the tokens that GMPO clips."""
    batch = replace(microbatch(), sequence_weights=None, kept_tokens=None)
    plain = objective_of(loss="gmpo", clip_low=0.4, clip_high=0.4, **penalties)
    observed = Observed.of(plain)
    assert_same(ours(observed, batch), ours(plain, batch))
    assert batch.old_logprobs is not None
    delta = (predicted()[0].detach() - batch.old_logprobs).double()
    expected = []
    for sequence, advantage in enumerate(batch.advantages.double()):
        of_sequence = delta[6 * sequence + 2 : 6 * sequence + 6]
        bounded = of_sequence.clamp(max=0.4) if advantage > 0 else of_sequence.clamp(min=-0.4)
        weight = bounded.mean().exp() / 4
        expected.append(torch.where(bounded == of_sequence, -advantage * weight, 0.0))
    (gradient,) = observed._values["gradient"]
    assert_close(gradient.double(), torch.cat(expected), rtol=1e-5, atol=0)
    assert ((gradient == 0) == (torch.cat(expected) == 0)).all()
    assert 0 < int((gradient == 0).sum()) < len(gradient)
    assert torch.equal(observed._values["logprobs"][0], predicted()[0].detach()[batch.loss_slots])


@pytest.mark.parametrize("unit", ["episode", "turn"])
@pytest.mark.parametrize("truncated", [False, True])
def test_a_record_has_the_sampled_tokens_of_a_sequence_of_the_loss(
    unit: Any, truncated: bool, tmp_path: Path
) -> None:
    tokenizer = text_tokenizer()
    texts = ["ppAb..Cd.E", "ppF", "pp..", "ppG.H"]  # capitals begin turns
    masks = [[False, False, *(kind.isalpha() for kind in text[2:])] for text in texts]
    finish: list[Any] = ["length" if truncated and n == 3 else "stop" for n in range(4)]
    samples = [
        Sample(tokenizer(text)["input_ids"], mask, -0.5 * np.array(mask), text, end, 0)
        for text, mask, end in zip(texts, masks, finish, strict=True)
    ]
    groups = [SampleGroup(Prompt("a", ""), samples[:1]), SampleGroup(Prompt("b", ""), samples[1:])]
    advantages = torch.tensor([1.0, -1.0, 1.0, 0.5])
    batch = step_batch(groups, advantages, unit=unit, mask_truncated=True)
    batch.old_logprobs = batch.rollout_logprobs.clone()
    new = torch.where(batch.response_mask, torch.linspace(-3, 1, len(batch.tokens)), 0)
    recorder = TokenRecorder(tmp_path, 99, tokenizer, leads_replica=True)
    observed = recorder.observe(objective_of(unit=unit), dict(enumerate(groups)))
    assert isinstance(observed, Observed)
    columns = {"logprobs": new, "entropy": new.abs(), "gradient": torch.ones(len(new))}
    observed.seen.append(Seen(batch.minibatch(0), observed, columns))
    recorder.write(1, index_of(groups))

    lines = next(tmp_path.iterdir()).read_bytes().splitlines()[1:]
    records = {(r.prompt_id, r.index, int(r.turn[0])): r for r in map(Record.from_json, lines)}
    whole = {("a", 0, 0): ("AbCdE", "pp"), ("b", 0, 0): ("F", "pp"), ("b", 2, 0): ("GH", "pp")}
    turns = {("a", 0, 0): ("Ab", "pp"), ("a", 0, 1): ("Cd", "ppAb.."), ("a", 0, 2): ("E", "ppAb..Cd.")}
    turns |= {("b", 0, 0): ("F", "pp"), ("b", 2, 0): ("G", "pp"), ("b", 2, 1): ("H", "ppG.")}
    expected = whole if unit == "episode" else turns
    expected = {key: value for key, value in expected.items() if not (truncated and key[:2] == ("b", 2))}
    assert {key: ("".join(r.text), r.prompt) for key, r in records.items()} == expected
    ratios = torch.where(batch.response_mask, (new - batch.old_logprobs).double(), 0).split([10, 3, 4, 5])
    for (prompt, index, turn), record in records.items():
        row = index + (prompt == "b")
        places = [i for i, sampled in enumerate(masks[row]) if sampled]
        if unit == "turn":
            places = [texts[row].index(letter) for letter in turns[prompt, index, turn][0]]
        else:
            assert record.turn.tolist() == {"a": [0, 0, 1, 1, 2], "b": [0, 1][: len(places)]}[prompt]
        delta = ratios[row][places]
        assert_close(torch.tensor(record.log_ratio).double(), delta, atol=1e-5, rtol=0)
        advantage = float(advantages[row])
        bounded = delta.clamp(max=0.4) if advantage > 0 else delta.clamp(min=-0.4)
        assert record.sequence_ratio == pytest.approx(float(bounded.mean().exp()), rel=1e-5)
        assert record.advantage == advantage


def test_off_policy_masking_reaches_the_loss() -> None:
    batch = microbatch()
    assert batch.rollout_logprobs is not None
    batch.rollout_logprobs += 2 * (batch.sequence_ids == 3)
    masked = ours(objective_of(mask="off_policy", mask_kl=0.3), batch)
    assert_same(masked, direct_call("gmpo", batch, max_kl=0.3))
    assert 0 < value_of(masked[0].metrics["policy/masked_sequences"]) < 1


def test_the_engines_log_probabilities_are_the_old_ones() -> None:
    """Loss and gradient are those of arXiv 2507.20673, equation (4), in float64 with the engine as pi_old."""
    batch = replace(microbatch(), old_logprobs=None, sequence_weights=None, kept_tokens=None)
    output, (gradient, _) = ours(objective_of(old_logprobs="rollout"), batch)
    logprobs = predicted()[0].detach().double().requires_grad_()
    assert batch.rollout_logprobs is not None
    loss = torch.zeros((), dtype=torch.float64)
    for i, advantage in enumerate(batch.advantages.double()):
        own = batch.mask & (batch.sequence_ids == i)
        delta = (logprobs - batch.rollout_logprobs.double())[own]
        clipped = delta.clamp(max=0.4) if advantage > 0 else delta.clamp(min=-0.4)
        loss = loss - advantage * clipped.mean().exp()
    loss.backward()
    assert float(output.loss) == pytest.approx(loss.item(), rel=1e-6)
    assert gradient is not None
    assert_close(gradient.double(), logprobs.grad, rtol=1e-5, atol=1e-7)
    fractions = [value_of(output.metrics[f"policy/clip_fraction_{side}"]) for side in ("low", "high")]
    assert min(fractions) > 0


@pytest.mark.parametrize(
    ("fields", "is_moe", "causes"),
    [
        ({}, False, []),
        ({"model": {"dtype": "bf16"}, "rollout": {"dtype": "bf16"}}, False, []),
        ({"rollout": {"quantization": "fp8"}}, False, ["rollout.quantization = 'fp8'"]),
        ({"model": {"dtype": "bf16"}, "rollout": {"dtype": "fp32"}}, False, ["rollout.dtype = 'fp32'"]),
        ({"rollout": {"router_noise": 0.5}}, False, ["rollout.router_noise = 0.5"]),
        ({"weight_sync": {"in_flight": "in_place"}}, False, []),  # nothing is in flight
        (
            {"weight_sync": {"in_flight": "in_place"}, "rollout": {"engine": "sglang", "max_staleness": 1}},
            False,
            ["weight_sync.in_flight = 'in_place'"],
        ),
        ({}, True, ["algorithm.moe_routing_replay = 'none'"]),
        (
            {"algorithm": {"moe_routing_replay": "rollout"}, "rollout": {"routed_experts": True}},
            True,
            [],
        ),
    ],
)
def test_a_warning_names_what_moves_the_ratios_to_the_engine(
    fields: dict[str, Any], is_moe: bool, causes: list[str]
) -> None:
    assert Config.model_validate(fields).rollout_ratio_warning(is_moe=is_moe) == ""
    fields = fields | {"algorithm": {"old_logprobs": "rollout"} | fields.get("algorithm", {})}
    line = Config.model_validate(fields).rollout_ratio_warning(is_moe=is_moe)
    assert bool(line) is bool(causes)
    assert all(cause in line for cause in causes)
    assert "\n" not in line


def test_without_old_logprobs_the_error_names_the_missing_call() -> None:
    with pytest.raises(AssertionError, match="call Policy"):
        ours(objective_of(), replace(microbatch(), old_logprobs=None))


def test_without_a_reference_there_is_no_kl() -> None:
    batch = replace(microbatch(), ref_logprobs=None)
    assert "policy/kl_ref" not in ours(objective_of(), batch)[0].metrics
    with pytest.raises(AssertionError, match="ref_logprobs"):
        ours(objective_of(kl_coef=0.1), batch)


def test_the_divisor_is_sequences_or_tokens() -> None:
    for loss in ("gmpo", "grpo", "dr_grpo", "gspo"):
        assert objective_of(loss=loss).count(sequences=3, tokens=9) == 3
    for loss in ("dapo", "cispo"):
        assert objective_of(loss=loss).count(sequences=3, tokens=9) == 9


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(InputError, match=r"algorithm\.loss = 'gmpoo' is unknown: did you mean 'gmpo'\?"):
        objective_of(loss="gmpoo")
    with pytest.raises(InputError, match=r"algorithm\.options\.dual_clip"):
        objective_of(options={"dual_clip": 0})
    with pytest.raises(InputError, match=r"algorithm\.old_logprobs = 'rollout': rspo .*set it to 'policy'"):
        objective_of(loss="rspo", is_moe=True, old_logprobs="rollout")


# --- rollout against training ---


def train_batch(old: list[float], rollout: list[float], mask: list[bool]) -> TrainBatch:
    return TrainBatch(
        tokens=torch.arange(len(mask)),
        lengths=torch.tensor([len(mask)]),
        response_mask=torch.tensor(mask),
        advantages=torch.ones(1),
        rollout_logprobs=torch.tensor(rollout),
        old_logprobs=torch.tensor(old),
    )


def test_mismatch_is_over_response_tokens_only() -> None:
    batch = train_batch([-9.0, -1.0, -2.0, -0.5], [0.0, -1.5, -1.0, -0.5], [False, True, True, True])
    found = rollout_mismatch(batch)
    assert {name: value_of(metric) for name, metric in found.items()} == pytest.approx(
        {
            "rollout/logprob_diff_mean": (0.5 + 1.0 + 0.0) / 3,
            "rollout/logprob_diff_max": 1.0,
            "rollout/logprob_diff_far": 2 / 3,
            "rollout/k3_kl": ((math.exp(0.5) - 1.5) + (math.exp(-1.0) - 0.0) + 0.0) / 3,
            "rollout/k3_kl_bounded": 0.0,
            "rollout/effective_sample_size": (math.exp(0.5) + math.exp(-1) + 1) ** 2
            / (3 * (math.exp(1) + math.exp(-2) + 1)),
        }
    )
    assert [
        found[f"rollout/{name}"].count for name in ("logprob_diff_mean", "logprob_diff_far", "k3_kl")
    ] == [3, 3, 3]


def test_k3_estimates_the_divergence_of_the_rollout_from_the_policy() -> None:
    g = torch.Generator().manual_seed(0)
    rollout, policy = ((torch.randn(16, generator=g)).log_softmax(0) for _ in range(2))
    drawn = torch.multinomial(rollout.exp(), 200_000, replacement=True, generator=g)
    batch = train_batch(policy[drawn].tolist(), rollout[drawn].tolist(), [True] * len(drawn))
    forward = float((rollout.exp() * (rollout - policy)).sum())
    backward = float((policy.exp() * (policy - rollout)).sum())
    found = value_of(rollout_mismatch(batch)["rollout/k3_kl"])
    assert found == pytest.approx(forward, rel=0.02)
    assert abs(forward - backward) > 0.1 * forward


def test_engines_that_agree_to_rounding_have_no_negative_divergence() -> None:
    rollout = torch.linspace(-8, -0.01, 1000)
    old = torch.nextafter(rollout, torch.zeros(())).tolist()
    found = rollout_mismatch(train_batch(old, rollout.tolist(), [True] * 1000))
    assert 0 <= value_of(found["rollout/k3_kl"]) < 1e-12
    assert 0 < value_of(found["rollout/logprob_diff_mean"]) < 1e-6


# --- collectives of a single process ---


def test_collectives_of_one_process_are_the_identity() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert sum_over_group(x, None) is x
    assert (rank(), world_size()) == (0, 1)
    item = {"a": [1]}
    assert all_gather_objects(item) == [item]
    barrier()


def three_sequences() -> tuple[TrainBatch, list[list[float]]]:
    """Return sequences of 3, 0 and 4 response tokens, and the log ratios old / rollout of each."""
    generator = torch.Generator().manual_seed(0)
    lengths = [4, 1, 7]
    mask = [False, True, True, True, False, False, False, True, False, True, True, True]
    old = torch.where(torch.tensor(mask), -torch.rand(12, generator=generator), 0)
    rollout = torch.where(torch.tensor(mask), -torch.rand(12, generator=generator), 0)
    batch = TrainBatch(
        torch.zeros(12, dtype=torch.int64),
        torch.tensor(lengths),
        torch.tensor(mask),
        torch.ones(3),
        rollout,
        old_logprobs=old,
    )
    difference = [(float(old[i]) - float(rollout[i])) if mask[i] else 0.0 for i in range(12)]
    return batch, [difference[0:4], difference[4:5], difference[5:12]]


def test_importance_weights_are_the_formulas_in_float64() -> None:
    batch, per_sequence = three_sequences()
    difference, mask = [d for row in per_sequence for d in row], batch.response_mask.tolist()
    sums = [math.fsum(row) for row in per_sequence]
    cap = 1.1
    expected = {
        "token": [min(math.exp(d), cap) for d in difference],
        "sequence": [min(math.exp(total), cap) for total in sums],
        "geometric": [min(math.exp(total / n), cap) for total, n in zip(sums, (3, 1, 4), strict=True)],
    }
    for level, values in expected.items():
        weights, metrics = importance_weights(batch, level, cap)
        assert_close(weights, torch.tensor(values), atol=1e-6, rtol=0)
        counted = (
            [w for w, m in zip(values, mask, strict=True) if m]
            if level == "token"
            else [values[0], values[2]]
        )
        assert value_of(metrics["rollout/weight_mean"]) == pytest.approx(sum(counted) / len(counted))
        assert value_of(metrics["rollout/weight_truncated"]) == sum(w >= cap for w in counted) / len(counted)
        share = math.fsum(counted) ** 2 / (len(counted) * math.fsum(w * w for w in counted))
        assert value_of(metrics["rollout/weight_effective_sample_size"]) == pytest.approx(share)
    assert float(importance_weights(batch, "sequence", cap)[0][1]) == 1  # no response tokens
    correct(batch, AlgorithmConfig(correction="geometric", correction_cap=cap))
    assert batch.token_weights is None
    assert_close(batch.sequence_weights, torch.tensor(expected["geometric"]))
    correct(batch, AlgorithmConfig(correction="token", correction_cap=cap))
    assert_close(split(batch, 3)[2].token_weights, torch.tensor(expected["token"][5:]))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("truncated", [(1,), (0, 3), (0, 1, 2, 3)], ids=str)
def test_truncated_samples_leave_the_step_as_if_they_were_not_in_it(loss: str, truncated: tuple) -> None:
    generator = torch.Generator().manual_seed(2)
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0])
    samples = [
        Sample.from_response(
            [7, 7],
            [5] * n,
            (-torch.rand(n, generator=generator)).tolist(),
            text="",
            finish_reason="length" if i in truncated else "stop",
            policy_version=0,
        )
        for i, n in enumerate([3, 4, 1, 2])
    ]

    def step(kept: list[int], *, mask_truncated: bool) -> tuple[float, Tensor]:
        """Return the loss of the step and the gradient of the log probabilities of samples not truncated."""
        group = SampleGroup(Prompt("p", ""), [samples[i] for i in kept])
        batch = step_batch([group], advantages[kept], mask_truncated=mask_truncated)
        batch.old_logprobs = 2 * batch.rollout_logprobs
        batch.ref_logprobs = 3 * batch.rollout_logprobs
        packed = pack(batch, list(range(len(kept))))
        objective = objective_of(loss=loss, kl_coef=0.1, entropy_coef=0.2, is_moe=loss == "rspo")
        logprobs = (1.5 * packed.rollout_logprobs - 0.1).requires_grad_()
        entropy = torch.ones_like(logprobs, requires_grad=True)
        packed.router_shift = torch.full_like(logprobs, 0.9)
        (part,) = batch.plan
        count = objective.count(part.sequences, part.response_tokens)
        value = objective(logprobs, entropy, packed, None).loss / max(1, count)
        value.backward()
        owners = torch.tensor(kept)[packed.sequence_ids]
        here = packed.mask & ~torch.isin(owners, torch.tensor(truncated))
        assert (logprobs.grad[~here] == 0).all()
        assert (entropy.grad[~here] == 0).all()
        return value.item(), logprobs.grad[here]

    found, gradient = step([0, 1, 2, 3], mask_truncated=True)
    if others := [i for i in range(4) if i not in truncated]:
        expected, expected_gradient = step(others, mask_truncated=False)
        assert expected != 0
        assert found == pytest.approx(expected, rel=1e-6)
        assert_close(gradient, expected_gradient)
    else:
        assert (found, len(gradient)) == (0.0, 0)


def test_token_weights_multiply_each_tokens_term() -> None:
    """The loss equals the sum of the weighted losses of single tokens."""
    generator = torch.Generator().manual_seed(1)
    new, old, weights = (torch.randn(6, generator=generator) for _ in range(3))
    tokens = LossTokens(
        new,
        old,
        torch.ones(6, dtype=torch.bool),
        torch.tensor([0, 0, 0, 1, 1, 1]),
        torch.tensor([1.5, -0.5]),
        token_weights=weights,
    )
    found = float(dr_grpo(tokens, clip_low=0.2, clip_high=0.2, length_normalizer=4.0).loss)
    expected = 0.0
    for t in range(6):
        advantage = [1.5, -0.5][t // 3]
        ratio = math.exp(float(new[t]) - float(old[t]))
        expected -= float(weights[t]) * min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage) / 4
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", ["gmpo", "gspo"])
def test_token_correction_is_refused_for_sequence_losses(loss: str) -> None:
    with pytest.raises(InputError, match="choose 'geometric'"):
        make_objective(AlgorithmConfig(loss=loss, correction="token"), is_moe=False, max_new_tokens=8)


def test_icepop_keeps_tokens_and_geometric_keeps_sequences_within_the_band() -> None:
    batch, rows = three_sequences()
    low, high = 0.8, 1.2
    tokens = kept_tokens(batch, "icepop", low, high).tolist()
    assert tokens == [low <= math.exp(d) <= high for row in rows for d in row]
    # Both values occur.
    assert len({t for t, m in zip(tokens, batch.response_mask.tolist(), strict=True) if m}) == 2
    means = [math.exp(math.fsum(row) / n) for row, n in zip(rows, (3, 1, 4), strict=True)]
    between = math.sqrt(means[0] * means[2])  # only one of the two sequences with a response is kept
    low, high = (between, 9.0) if means[0] > means[2] else (0.1, between)
    sequences = kept_tokens(batch, "geometric", low, high).tolist()
    assert sequences == [low <= mean <= high for mean, row in zip(means, rows, strict=True) for _ in row]
    assert sequences[0] != sequences[-1]


def test_the_mask_of_the_config_reaches_the_minibatches() -> None:
    batch, _ = three_sequences()
    assert correct(batch, AlgorithmConfig()) == {}
    assert batch.kept_tokens is None
    correct(batch, AlgorithmConfig(mask="off_policy"))  # the loss applies this mask
    assert batch.kept_tokens is None
    correct(batch, AlgorithmConfig(mask="icepop", mask_low=0.8, mask_high=1.2))
    assert_close(split(batch, 3)[2].kept_tokens, kept_tokens(batch, "icepop", 0.8, 1.2)[5:])
    correct(batch, AlgorithmConfig(mask="geometric"))
    assert_close(batch.kept_tokens, kept_tokens(batch, "geometric", 0.99, 1.01))


def test_a_batch_that_is_masked_altogether_leaves_a_loss_of_zero() -> None:
    batch = replace(microbatch(), kept_tokens=torch.zeros(SLOTS, dtype=torch.bool))
    output, (gradient, _) = ours(objective_of(), batch)
    assert output.loss == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize(
    ("minibatches", "is_moe", "fields", "without"),
    [
        (1, False, {}, 1),
        (4, False, {}, 1),
        (1, True, {}, 1),
        (4, True, {}, 0),
        (1, False, {"correction": "token", "loss": "grpo"}, 0),
        (1, False, {"mask": "icepop"}, 0),
        (1, False, {"mask": "geometric"}, 0),
        (1, False, {"mask": "off_policy"}, 1),  # the loss applies it with the current policy
        (1, True, {"loss": "rspo"}, 0),
        (1, False, {"kl_coef": 0.1}, 1),
        (4, False, {"old_logprobs": "rollout"}, 4),
        (4, True, {"old_logprobs": "rollout", "mask": "off_policy", "kl_coef": 0.1}, 4),
    ],
)
def test_which_minibatches_need_no_pass_for_old_logprobs(
    minibatches: int, is_moe: bool, fields: dict[str, Any], without: int
) -> None:
    cfg = AlgorithmConfig(**fields)
    assert minibatches_without_pass(cfg, minibatches, is_moe=is_moe) == without
