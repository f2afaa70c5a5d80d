r"""Reference answers of every kind: with one character changed they fail, respelled they pass."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gmpo.rewards.math.equality import is_correct

KINDS = r"""
7 -12 0 1,080 114,200,000 0.46 .0000672 3.333 -4.25 \$18.90 \$32,\!348 11,\!111,\!100 25\%
\frac{3}{56} \frac34 -\frac{35}{9} \frac9{19} 1/6 1\frac{4}{5} 137\frac{1}{2} \frac{11+9a}{20}
\frac{20000}{\pi} 2.88\times10^{-19} 1-1/2^{100} 1/20! 2^{31}-1 \frac{3\sqrt{3}}{4} \sqrt{51} 6\sqrt{2}
3\sqrt[3]{7} 18+2\pi \frac{\pi}{6} 6-5i -2+7i e^{2\pi} \log_{2}{5} \ln7 \binom{12}{5} 36^\circ 52_8 4210_{5}
5r^5 x^3+3x-6 8n^2+4n+1 (a+5)(b+2) (\gamma-1)mc^2 p-q 2k+2 x_{1}+x_{2} a_n-a_{n-1} \frac{x+1}{x-2} \cot3x
(2,12) (6,31,-1) [-2,7) (-\infty,2)\cup(3,\infty) \{1,-3\} 3,5,7 1\pm\sqrt{19} \{1\pm\sqrt{5},-2\}
\left(3,\frac{\pi}{2}\right) x=5 y=2x+3 5x-7y+11z+4=0 x\in[-2,7] x\leq2 -1<x<4 1,2,\ldots,n
\begin{pmatrix}-18\\-49\\96\end{pmatrix} \begin{pmatrix}1/5&2\\-3&4\end{pmatrix}
"""
TRUTHS = KINDS.split()
"""Truths of the kinds that occur in MATH, AIME, GSM8K and ASDiv."""


def boxed(answer: str) -> str:
    return f"So the answer is $\\boxed{{{answer}}}$."


def mutants(truth: str) -> Iterator[str]:
    """Change one digit, sign, operator, index or bracket of a truth."""
    for place, character in enumerate(truth):
        if character.isdigit():
            yield truth[:place] + str((int(character) + 1) % 10) + truth[place + 1 :]
            yield truth[:place] + str((int(character) + 9) % 10) + truth[place + 1 :]
    changes = [("+", "-"), ("-", "+"), ("<", ">"), (r"\leq", r"\geq"), (r"\cup", r"\cap"), ("=", "+")]
    changes += [
        (r"\times", "+"),
        ("/", "+"),
        (r"\pm", "+"),
        ("!", ""),
        (r"\frac", r"\binom"),
        (r"\sqrt", "3"),
    ]
    changes += [(r"\pi", r"2\pi"), ("^", "_"), ("_", "^"), ("[", "("), ("]", ")"), ("x", "z"), ("n", "k")]
    for old, new in changes:
        for found in re.finditer(re.escape(old) + r"(?![a-z])" * (old[0] == "\\"), truth):
            before, after = truth[: found.start()], truth[found.end() :]
            in_a_word = re.search(r"\\[a-z]*$|\\(begin|end|text|mbox)\s*\{[^}]*$", before)
            if not in_a_word and not after.startswith(r"\circ"):
                yield before + new + after
    if re.match(r"[-\d.]|\\frac|\\sqrt", truth):
        yield truth[1:] if truth[0] == "-" else "-" + truth


def spellings(truth: str) -> Iterator[str]:
    """Yield common spellings of a truth; those that do not apply to it are the truth itself."""
    yield truth
    yield f" {truth} ."
    yield f"${truth}$"
    yield f"{{{truth}}}"
    yield r"\displaystyle " + truth
    yield truth.replace(r"\frac", r"\dfrac")
    yield re.sub(r"(?<!\\left|\\sqrt)\(", r"\\left(", re.sub(r"(?<!\\right)\)", r"\\right)", truth))
    yield re.sub(r"(?<=[\w)}])\s*([-+=<])\s*(?=[\w(\\])", r" \1 ", truth)
    yield re.sub(r"(?<!\\),(?!\\!)\s*(?!\d{3})", r",\\ ", truth)
    yield truth.replace("-", "−").replace(r"\pi", "π").replace(r"\sqrt{", "√{").replace(r"^\circ", "°")
    yield re.sub(r"\^(\d)(?!\d)", lambda power: "⁰¹²³⁴⁵⁶⁷⁸⁹"[int(power[1])], truth)
    yield re.sub(r"\^(\w)", r"^{\1}", truth)
    yield re.sub(r"(?<![\d}])\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", truth)
    if re.fullmatch(r"\d+", truth):
        yield from (
            f"{int(truth):,}",
            f"{int(truth):,}".replace(",", r"\,"),
            f"{int(truth):,}".replace(",", "{,}"),
        )
        yield from (
            f"{truth}.0",
            f"x = {truth}",
            f"{truth} people",
            rf"{truth}\text{{ units}}",
            rf"\${truth}",
        )


def wrongly_paid(truths: list[str]) -> list[tuple[str, str]]:
    pairs = [(truth, mutant) for truth in truths for mutant in mutants(truth)]
    # the only mutant that equals its truth: zero has no sign
    return [pair for pair in pairs if pair != ("0", "-0") and is_correct(pair[0], boxed(pair[1]))]


def unpaid(truths: list[str]) -> list[tuple[str, str]]:
    pairs = [(truth, spelling) for truth in truths for spelling in spellings(truth)]
    return [pair for pair in pairs if not is_correct(pair[0], boxed(pair[1]))]


def test_one_changed_character_fails() -> None:
    assert wrongly_paid(TRUTHS) == []


def test_common_spellings_pass() -> None:
    assert unpaid(TRUTHS) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["math500", "aime24", "gsm8k_train", "asdiv_train"])
def test_every_truth_of_a_data_set(name: str) -> None:
    folder = os.environ.get("MEGATRON_GMPO_DATA")
    if not folder:
        pytest.skip(f"MEGATRON_GMPO_DATA names no folder with {name}.parquet")
    import pyarrow.parquet

    answers = pyarrow.parquet.read_table(f"{folder}/{name}.parquet").column("answer").to_pylist()
    truths = sorted({str(answer).rpartition("####")[2].strip() for answer in answers})
    assert wrongly_paid(truths) == []
    assert unpaid(truths) == []


NUMBER_FORMS = [
    lambda x: f"{x.numerator}/{x.denominator}",
    lambda x: rf"\frac{{{x.numerator}}}{{{x.denominator}}}",
    lambda x: rf"-\dfrac{{{-x.numerator}}}{{{x.denominator}}}",
    lambda x: rf"{x.numerator} \cdot {x.denominator}^{{-1}}",
    lambda x: rf"\frac{{{2 * x.numerator}}}{{{x.denominator} + {x.denominator}}}",
    lambda x: rf"{x.numerator + x.denominator}/{x.denominator} - 1",
    lambda x: rf"\frac{{{x.numerator}}}{{\sqrt{{{x.denominator**2}}}}}",
]
tiny = st.integers(-60, 60).map(lambda power: Fraction(10) ** power)
rationals = st.builds(Fraction, st.integers(-50, 50), st.integers(1, 50))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    x=rationals,
    y=rationals,
    scale=st.one_of(st.just(Fraction(1)), tiny),
    forms=st.tuples(st.sampled_from(NUMBER_FORMS), st.sampled_from(NUMBER_FORMS)),
)
def test_rational_numbers_are_equal_if_their_fractions_are(x, y, scale, forms) -> None:
    """Python's fractions are the reference. The scale leaves no room for an absolute tolerance."""
    for left, right in ((x * scale, y * scale), (x * scale, x * scale)):
        verdict = is_correct(forms[0](left), boxed(forms[1](right)))
        assert verdict == (left == right)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    numbers=st.lists(st.integers(0, 999), min_size=2, max_size=4, unique=True),
    join=st.sampled_from([", ", " and ", r" \text{ or } ", "; ", r",\ "]),
    large=st.integers(1000, 10**9),
)
def test_the_numbers_of_a_list_stay_apart(numbers: list[int], join: str, large: int) -> None:
    """Python's integers are the reference: a list has its items in any order, not their digits in a row."""
    items = list(map(str, numbers))
    turned, run = join.join(items[::-1]), "".join(items)
    boxes = join.replace(r"\ ", " ").join(f"$\\boxed{{{item}}}$" for item in items[::-1])
    truth = ", ".join(items)
    assert is_correct(truth, boxed(turned))
    assert is_correct(truth, boxes)
    assert not is_correct(run, boxed(turned))
    assert not is_correct(run, boxed(join.join(items)))
    assert is_correct(f"{large}, {truth}", boxed(join.join([*items, f"{large:,}"])))


coefficients = st.lists(st.integers(-4, 4), min_size=1, max_size=4)


def expanded(numbers: list[int]) -> str:
    return (
        " + ".join(f"({number})x^{power}" for power, number in enumerate(numbers) if power)
        + f" + ({numbers[0]})"
    )


def nested(numbers: list[int]) -> str:
    text = "0"
    for number in reversed(numbers):
        text = f"({text})x + ({number})"
    return text


@settings(max_examples=25, deadline=None, derandomize=True)
@given(one=coefficients, other=coefficients)
def test_polynomials_are_equal_if_their_coefficients_are(one: list[int], other: list[int]) -> None:
    size = max(len(one), len(other), 2)
    one, other = one + [0] * (size - len(one)), other + [0] * (size - len(other))
    assert is_correct(expanded(one), boxed(nested(other))) == (one == other)
    assert is_correct(expanded(one), boxed(nested(one)))
