"""Losses, columns and advantages that users define, given as ``module:attribute``."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.batch.packing import pack
from megatron_gmpo.config import AlgorithmConfig
from megatron_gmpo.errors import InputError
from megatron_gmpo.losses import Loss
from megatron_gmpo.losses.adaptive_clip import make_adaptive_clip
from megatron_gmpo.losses.advantages import group_advantages
from megatron_gmpo.losses.objective import Objective, make_objective, needed_columns
from megatron_gmpo.losses.registry import LOSSES, resolve_loss
from megatron_gmpo.metrics.figures import value_of

from ..support.batches import split
from ..support.groups import index_of, rewarded
from ..support.losses import documented_losses

MODULE = """
from typing import Annotated, Literal

import torch
from pydantic import Field

from megatron_gmpo.losses import Column, DefaultClip, Loss, LossTokens, NewColumn, gmpo


Positive = Annotated[float, Field(gt=0)]


def plain(tokens, *, clip_low: float = 0.1, clip_high: float = 0.3, power: Positive = 1.0):
    sums = tokens.sum_per_sequence({"log_ratio": power * tokens.log_ratio.clamp(-clip_low, clip_high)})
    return tokens.output(tokens.advantages * sums["log_ratio"], sums)


def without_defaults(tokens, *, clip_low, clip_high, power: float):
    return plain(tokens, clip_low=clip_low, clip_high=clip_high, power=power)


def place_in_sequence(batch):
    starts = torch.repeat_interleave(batch.starts, batch.lengths)
    return (torch.arange(len(batch.tokens)) - starts).float()


def late(tokens, *, clip_low, clip_high):
    sums = tokens.sum_per_sequence({"late": tokens.columns["place"] * tokens.log_ratio})
    objective = tokens.advantages * tokens.columns["scale"] * sums["late"]
    return tokens.output(objective, sums, penalty_divisor=1.0)


def entropy_weighted(tokens, *, clip_low, clip_high):
    sums = tokens.sum_per_sequence({"weighted": tokens.entropy * tokens.log_ratio})
    return tokens.output(tokens.advantages * sums["weighted"], sums)


PLACE = NewColumn("place", Column(torch.float32, "predicted"), place_in_sequence)
SCALE = NewColumn("scale", Column(torch.float32, "sequence"), lambda batch: batch.lengths.float())
CLIP = DefaultClip(0.5, 0.6, "mine", moe=DefaultClip(0.1, 0.2, "experts"))
LATE = Loss(late, "tokens", "log_ratio", CLIP, (PLACE, SCALE), default_advantage="leave_one_out")
ENTROPY = Loss(entropy_weighted, needs=("entropy", "ref_logprobs"), default_clip=CLIP)

number = 3
unmade = Loss(plain, needs=("temperature",))
taken = Loss(plain, needs=(NewColumn("router_shift", Column(torch.float32, "input"), place_in_sequence),))
wrong_divisor = Loss(plain, divisor="token")
wrong_space = Loss(plain, clip_space="log")
wrong_column = Loss(plain, needs=(NewColumn("place", PLACE.column, lambda batch: batch.lengths),))
lambda_without = lambda: None


def old_style(logprobs, old_logprobs, mask, *, clip_low, clip_high): ...
def any_keyword(tokens, *, clip_low, clip_high, **options): ...
def positional_clips(tokens, clip_low, clip_high): ...
def only_keywords(*, tokens, clip_low, clip_high): ...
def one_clip(tokens, *, clip_low): ...
def tensor_option(tokens, *, clip_low, clip_high, router_shift: torch.Tensor): ...
def unknown_annotation(tokens, *, clip_low, clip_high, beta: "Nowhere" = 1): ...
def returns_a_tensor(tokens, *, clip_low, clip_high): return tokens.logprobs.sum()


def centered(rewards): return rewards - 0.5
def two_arguments(rewards, group): return rewards
def one_number(rewards): return rewards.mean()
def not_finite(rewards): return rewards / 0
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a module ``own`` outside the repository, and one that cannot be parsed."""
    (tmp_path / "own.py").write_text(MODULE)
    (tmp_path / "unparsable.py").write_text("def loss(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)


def objective_of(loss: str, **fields) -> Objective:
    return make_objective(AlgorithmConfig(loss=loss, **fields), is_moe=False, max_new_tokens=8)


def two_sequences() -> TrainBatch:
    return TrainBatch(
        torch.arange(7),
        torch.tensor([3, 4]),
        torch.tensor([False, True, True, False, False, True, True]),
        torch.tensor([1.0, -2.0]),
        torch.zeros(7),
        old_logprobs=torch.tensor([0, -1, -2, 0, 0, -1, -1.5]),
    )


def test_a_plain_function_takes_the_defaults_of_an_entry_and_of_its_signature() -> None:
    objective = objective_of("own:plain")
    assert objective.loss == Loss(objective.loss.function)
    assert (objective.loss.divisor, objective.loss.clip_space) == ("sequences", "ratio")
    assert objective.description == (
        "own:plain, clip_low 0.1, clip_high 0.3 (default of own:plain), "
        "advantage normalized (default of own:plain)"
    )
    assert needed_columns(AlgorithmConfig(loss="own:plain")) == frozenset()
    assert objective.count(sequences=2, tokens=5) == 2

    # Log probabilities of the predicted tokens.
    logprobs = torch.tensor([-0.9, -2.5, 0, 0, -1, -1, 0], requires_grad=True)
    microbatch = pack(two_sequences(), [0, 1])
    output = objective_of("own:plain", options={"power": 2.0})(logprobs, torch.zeros(7), microbatch, None)
    assert_close(output.loss, torch.tensor(-1.0 * 2 * (0.1 - 0.1) + 2.0 * 2 * (0.0 + 0.3)))
    assert value_of(output.metrics["policy/log_ratio_max"]) == pytest.approx(0.5)


def test_an_entry_says_the_rest() -> None:
    objective = objective_of("own:LATE")
    assert (objective.clip_low, objective.clip_high, objective.loss.clip_space) == (0.5, 0.6, "log_ratio")
    cfg = AlgorithmConfig(loss="own:LATE")
    assert make_objective(cfg, is_moe=True, max_new_tokens=8).description.endswith(
        "0.2 (experts), advantage leave_one_out (default of own:LATE)"
    )
    assert objective.count(sequences=2, tokens=5) == 5


@pytest.mark.parametrize("cp_size", [1, 2])
def test_columns_of_the_users_own_reach_the_loss(cp_size: int) -> None:
    """Columns go through split and pack to the slots of each context-parallel rank."""
    batch, objective = two_sequences(), objective_of("own:LATE")
    objective.add_columns(batch)
    for sequence, minibatch in enumerate(split(batch, 2)):
        total = 0.0
        for rank in range(cp_size):
            microbatch = pack(minibatch, [0], cp_size=cp_size, cp_rank=rank, sequence_multiple=2 * cp_size)
            logprobs = torch.full(microbatch.labels.shape, -0.5, requires_grad=True)
            # A loss that sums over tokens adds up over ranks.
            total += float(objective(logprobs, logprobs.detach(), microbatch, None).loss.detach())
        places = {0: [1, 2], 1: [2, 3]}[sequence]
        ratios = {0: [0.5, 1.5], 1: [0.5, 1.0]}[sequence]
        scale = [3, 4][sequence] * [1.0, -2.0][sequence]
        assert total == pytest.approx(-scale * sum(p * r for p, r in zip(places, ratios, strict=True)))


def test_the_documented_losses_are_their_formulas(tmp_path: Path) -> None:
    """Test on one process; tests/distributed/test_own_losses.py trains with these losses in two layouts."""
    batch = two_sequences()
    # Log probabilities of the predicted tokens.
    logprobs = torch.tensor([-0.9, -2.5, 0, 0, -0.8, -1.8, 0], requires_grad=True)
    # Log ratios, then clipped by the sign of A = 1, -2.
    clipped = {0: [0.1, -0.5], 1: [0.2, -0.3]}
    ratios = [[min(math.exp(x), 1.2) for x in clipped[0]], [max(math.exp(x), 0.8) for x in clipped[1]]]
    expected = {
        "harmonic": -1.0 * 2 / sum(1 / r for r in ratios[0]) + 2.0 * 2 / sum(1 / r for r in ratios[1]),
        "ramped": -1.0 * (ratios[0][0] / 2 + ratios[0][1]) + 2.0 * (ratios[1][0] / 2 + ratios[1][1]),
    }
    for (name, value), block in zip(expected.items(), documented_losses(), strict=True):
        (tmp_path / f"shown_{name}.py").write_text(block)
        objective = objective_of(f"shown_{name}:{name}")
        objective.add_columns(batch)
        output = objective(logprobs, torch.zeros(7), pack(batch, [0, 1]), None)
        assert float(output.loss.detach()) == pytest.approx(value, rel=1e-6)
        assert objective.count(sequences=2, tokens=4) == {"harmonic": 2, "ramped": 4}[name]


def test_columns_of_the_trainer_are_made_on_request() -> None:
    assert needed_columns(AlgorithmConfig()) == frozenset()
    assert needed_columns(AlgorithmConfig(kl_coef=0.1)) == {"ref_logprobs"}
    assert needed_columns(AlgorithmConfig(loss="rspo")) == {"router_shift"}
    assert needed_columns(AlgorithmConfig(loss="own:ENTROPY")) == {"entropy", "ref_logprobs"}
    microbatch = pack(two_sequences(), [0, 1])
    entropy = torch.ones(7, requires_grad=True)
    objective_of("own:ENTROPY")(torch.zeros(7), entropy, microbatch, None).loss.backward()
    assert entropy.grad is not None
    assert entropy.grad.tolist() == pytest.approx([-1.0, -2.0, 0, 0, 2.0, 3.0, 0])


@pytest.mark.parametrize(
    ("loss", "fields", "message"),
    [
        (
            "gmppo",
            {},
            r"algorithm\.loss = 'gmppo' is unknown: did you mean 'gmpo'\? Choose .*module:function",
        ),
        ("nowhere:loss", {}, r"'nowhere:loss' cannot be imported \(No module named 'nowhere'\): give module"),
        ("own:nothing", {}, r"'own:nothing' cannot be imported \(.*no attribute 'nothing'\): give module"),
        ("unparsable:loss", {}, r"'unparsable:loss' cannot be imported \(.*unparsable\.py, line 1\)"),
        ("own:number", {}, r"'own:number' is a int: give a function \(tokens, \*, clip_low, clip_high\)"),
        ("own:old_style", {}, r"parameter 'old_logprobs' is not keyword-only: write def loss\(tokens, \*"),
        ("own:positional_clips", {}, r"parameter 'clip_low' is not keyword-only: write def loss"),
        ("own:any_keyword", {}, r"parameter 'options' is not keyword-only: write def loss"),
        ("own:only_keywords", {}, r"parameter 'tokens' is not positional: write def loss"),
        ("own:lambda_without", {}, r"does not take the parameter 'tokens': write def loss"),
        ("own:one_clip", {}, r"does not take the parameter 'clip_high': write def loss"),
        ("own:tensor_option", {}, r"annotation of parameter 'router_shift' is not a type of config values"),
        ("own:unknown_annotation", {}, r"annotation of parameter 'beta' .*'Nowhere' is not defined.*: annot"),
        ("own:wrong_divisor", {}, r"divisor = 'token' is unknown: choose one of \('sequences', 'tokens'\)"),
        ("own:wrong_space", {}, r"clip_space = 'log' is unknown: choose one of \('log_ratio', 'ratio'\)"),
        (
            "own:unmade",
            {},
            r"needs the column 'temperature', which nothing makes: .*'ref_logprobs'.*NewColumn",
        ),
        ("own:taken", {}, r"its new column 'router_shift' exists already: give it another name"),
        (
            "own:without_defaults",
            {"clip_low": 0.1},
            r"algorithm\.options\.power is not set, and own:without_d",
        ),
        (
            "own:without_defaults",
            {"clip_low": 0.1, "options": {"power": 1.0}},
            r"algorithm\.clip_high is not set, and own:without_defaults has no default for it: set it",
        ),
        (
            "own:plain",
            {"options": {"pover": 1.0}},
            r"options\.pover .* did you mean algorithm\.options\.power",
        ),
        ("own:plain", {"options": {"power": "two"}}, r"algorithm\.options\.power = 'two': .*valid number"),
        ("own:plain", {"options": {"power": -1.0}}, r"algorithm\.options\.power = -1\.0: .*greater than 0"),
        ("own:plain", {"correction": "token"}, r"own:plain weighs whole sequences; choose 'geometric'"),
        (
            "gmpo",
            {"advantage": "normalised"},
            r"algorithm\.advantage = 'normalised' is unknown: .*'normalized'",
        ),
        (
            "gmpo",
            {"advantage": "own:number"},
            r"algorithm\.advantage = 'own:number' is a int: give a function",
        ),
        ("gmpo", {"advantage": "own:gone"}, r"algorithm\.advantage = 'own:gone' cannot be imported"),
        (
            "gmpo",
            {"advantage": "own:two_arguments"},
            r"'own:two_arguments' cannot be called .*'group'.*: give",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_work_starts(loss: str, fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        objective_of(loss, **fields)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_later_is_refused_too() -> None:
    microbatch = pack(two_sequences(), [0, 1])
    with pytest.raises(InputError, match=r"'own:returns_a_tensor' returned a Tensor: return tokens\.output"):
        objective_of("own:returns_a_tensor", clip_low=0, clip_high=0)(
            torch.zeros(7), torch.zeros(7), microbatch, None
        )
    with pytest.raises(
        InputError, match=r"column 'place' has dtype torch\.int64 and shape \(2,\), not .*\(7\)"
    ):
        objective_of("own:wrong_column").add_columns(two_sequences())
    cfg = AlgorithmConfig(loss="own:plain", clip="adaptive")
    clip = make_adaptive_clip(cfg, objective_of("own:plain"))
    assert clip is not None
    with pytest.raises(
        InputError, match=r"needs the metric policy/clip_fraction_low, which the loss does not"
    ):
        clip.update({})


def test_every_built_in_loss_fits() -> None:
    for name, entry in LOSSES.items():
        assert resolve_loss(name) is entry
        assert resolve_loss(f"megatron_gmpo.losses:{name}").function is entry.function


def test_an_advantage_of_the_users_own() -> None:
    groups = index_of(rewarded([[1.0, 0.0], [1.0]]))
    assert group_advantages(groups, "own:centered").tolist() == [0.5, -0.5, 0.5]
    for name, returned in (("one_number", "0.5"), ("not_finite", r"\[inf, nan\]")):
        line = rf"advantage = 'own:{name}' returned {returned} for the rewards \[1\.0, 0\.0\]: return one"
        with pytest.raises(InputError, match=line):
            group_advantages(groups, f"own:{name}")


ORDERS = [
    "from megatron_gmpo.losses import gmpo",
    "import megatron_gmpo.losses.gmpo; from megatron_gmpo.losses import gmpo",
    "from megatron_gmpo.losses.gmpo import geometric_mean; from megatron_gmpo.losses import gmpo",
    "from megatron_gmpo.losses.registry import LOSSES; from megatron_gmpo.losses import gmpo",
    "import importlib; importlib.import_module('megatron_gmpo.losses.gmpo'); "
    "from megatron_gmpo.losses import gmpo",
    "from megatron_gmpo.losses import gmpo as first; import megatron_gmpo.losses.gmpo; "
    "from megatron_gmpo.losses import gmpo",
]


@pytest.mark.slow
def test_importing_the_losses_starts_nothing_and_gmpo_is_the_function_in_every_order() -> None:
    program = f"""
        import sys, threading
        import torch
        threads = threading.active_count()
        import megatron_gmpo.losses
        assert not [name for name in sys.modules if name.split(".")[0] == "megatron"], "megatron is imported"
        assert threading.active_count() == threads
        assert not torch.distributed.is_initialized()
        for order in {ORDERS!r}:
            for name in [name for name in sys.modules if name.startswith("megatron_gmpo")]:
                del sys.modules[name]
            names = {{}}
            exec(order, names)
            assert type(names["gmpo"]).__name__ == "function", order
            assert type(sys.modules["megatron_gmpo.losses"].rspo).__name__ == "function", order
            assert type(sys.modules["megatron_gmpo.losses.gmpo"]).__name__ == "module", order
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120)
