r"""Math answers: the table of docs/rewards.md, and truths with one character changed or respelled."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gmpo.rewards.math.equality import is_correct

ROOT = Path(__file__).parents[2]

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


def test_the_table_of_the_docs() -> None:
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8").replace(r"\|", "\0")
    rows = re.findall(r"^\| `([^|]+)` \| `([^|]+)` \| (right|wrong) \|$", text, re.MULTILINE)
    assert len(rows) >= 60
    verdicts = {True: "right", False: "wrong"}
    pairs = [
        (truth.replace("\0", "|"), response.replace("\0", "|"), verdict) for truth, response, verdict in rows
    ]
    assert [row for row in pairs if verdicts[is_correct(row[0], row[1])] != row[2]] == []


RIGHT = [
    (r"\sqrt2", r"\sqrt2 \approx 1.414"),
    (r"\sqrt2", r"x = \sqrt2 \approx 1.414"),
    ("3.14", r"x \approx 3.14"),
    ("(B)", "(B): 7"),
    ("7", r"\textbf{(B)}7"),
    ("7", "B. 7"),
    ("7", "(B) 7"),
    ("3", r"3\text{ m}"),
    ("2", "2.0"),
    ("-5", "- 5"),
    (r"\pm 5", "5, -5"),
    (r"\pm 5", r"-5 \text{ and } 5"),
    ("0.5", "1/2"),
    ("0.5", ".5"),
    ("5", r"5^\circ"),
    ("(1,2),(3,4)", "(3,4),(1,2)"),
    ("x<2", "2>x"),
    ("1<x<2", "(1,2)"),
    ("2>x>1", "1<x<2"),
    ("3", r"\{3\}"),
    (r"\sin 2x", r"2\sin x\cos x"),
    (r"\tan x", r"\frac{\sin x}{\cos x}"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    ("7", r"7\%"),
    ("x^2+2x+1", "(x+1)^2"),
    ("-1", "i^2"),
    ("2^{n+1}-1", r"2\cdot 2^n - 1"),
    (r"\frac{\ln 2}{\ln 3}", r"\log_3 2"),
    (r"\ln(xy)", r"\ln x+\ln y"),
    ("n!", "n(n-1)!"),
    (r"\binom{5}{2}", "10"),
    ("x>2", "2<x"),
    ("x+y>2", "-x-y<-2"),
    ("y=x", "x=y"),
    ("(x-1)^2+y^2=4", "x^2-2x+1+y^2=4"),
    (r"\$36", "36 dollars"),
    ("(1,2)", "x=1, y=2"),
    ("(1,2)", "(x,y)=(1,2)"),
    (r"\mathbb{R}", "all real numbers"),
    (r"\frac{1}{1+\frac{1}{x}}", r"\frac{x}{x+1}"),
    (r"0.1\overline{6}", "1/6"),
    (r"\lfloor \pi\rfloor", "3"),
    ("2", "|−2|"),
    ("2x", "f(x)=2x"),
    (r"\frac{3}{4}", "3/4 of the cake"),
    (r"25\pi", r"25π \text{ square units}"),
    ("x^{0.5}", r"\sqrt{x}"),
    (r"\sqrt[3]{2}", "2^{1/3}"),
    ("12", "**12**"),
]
WRONG = [
    ("204", r"204 \approx 17"),
    ("(B)", "(B)^2"),
    ("204", r"204 \approx 205 \approx 17"),
    ("17", r"204 \approx 17"),
    ("3", r"3 \text{i}"),
    ("3", r"3\mathrm{x}"),
    (r"\frac{1}{23}", r"\frac{12}{3}"),
    ("31/2", "3 1/2"),
    ("12", "1 2"),
    ("x^{12}", "x^1 2"),
    ("2", "2.01"),
    ("1", "e"),
    ("5", "5 + x"),
    ("5", "5, 5"),
    ("5", "(5, 5)"),
    ("5", r"\pm 5"),
    (r"\pm 5", "5"),
    ("a+b", "a-b"),
    ("A", "B"),
    (r"\text{A}", r"\text{AB}"),
    ("x^2+1", "x^2+1=0"),
    (r"\frac{x}{2}", r"\frac{2}{x}"),
    ("2^{-1}", "2^1"),
    (r"90^\circ", "90^2"),
    ("10^5", r"10^\circ"),
    ("60", "60%0"),
    ("P(A)", "P(B)"),
    ("f(x+1)", "f(x)+f(1)"),
    (r"\text{Tuesday}", r"\text{Thursday}"),
    ("1:2", "2:1"),
    ("1/2x", "x/2"),
    (r"12 \text{ in}", r"12 \text{ ft}"),
    ("(1,2),(3,4)", "(1,2),(4,3)"),
    ("(0,1]", "(0,1)"),
    ("x<2", "x>2"),
    ("x<2", "y<2"),
    ("1<x<2", "(1,2]"),
    ("1<x<2", "1<y<2"),
    (r"x\ne 3", "x=3"),
    (r"\emptyset", "0"),
    (r"\{0\}", r"\emptyset"),
    ("x_1", "x_2"),
    (r"\overline{AB}", "AB"),
    (r"0.\overline{3}", "0.3"),
    (r"\sin x", r"\sin y"),
    (r"\sin x", r"\cos x"),
    (r"2\sin x", r"\sin 2x"),
    ("10!", "9!"),
    (r"\log_2 3", r"\log_3 2"),
    (r"\sqrt{2}", "1.414214567"),
    ("1", "0.999999999"),
    (r"\ln 2", r"\log 2"),
    ("x+y>2", "x+y<2"),
    ("1010", "1010_2"),
    ("6", "6:30"),
    (r"\sqrt2", r"\sqrt2+10^{-60}"),
    ("x", "x+10^{-40}"),
    ("5", r"\sqrt{5}^{10^9}"),
    (r"\infty", r"\infty/2"),
]


@pytest.mark.parametrize(("pairs", "verdict"), [(RIGHT, True), (WRONG, False)])
def test_what_a_teacher_would_say(pairs: list[tuple[str, str]], verdict: bool) -> None:
    assert [pair for pair in pairs if is_correct(pair[0], boxed(pair[1])) is not verdict] == []


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


@settings(max_examples=60, deadline=None, derandomize=True)
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


@pytest.mark.parametrize(
    "text", ["{" * 5000, "\\boxed{" * 3000 + "1", "\\[" * 5000, "$" * 20001, " answer" * 9999]
)
def test_hostile_responses_have_no_answer(text: str) -> None:
    assert not is_correct("7", text)


@pytest.mark.parametrize(
    "answer", ["9^{9^{9^9}}", "10^{10^{10}}", "(" * 400 + "7" + ")" * 400, "99999!", "x" * 2000]
)
def test_answers_too_large_to_compute_are_compared_as_texts(answer: str) -> None:
    assert not is_correct("7", boxed(answer))
    assert is_correct(answer, boxed(answer))
