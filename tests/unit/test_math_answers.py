"""Verdicts on math answers as a teacher would give them: the table of docs/rewards.md, and longer lists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_gmpo.rewards.math.equality import is_correct

ROOT = Path(__file__).parents[2]

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
    ("5", "+5"),
    ("5", "５"),
    ("5", "5\\\\"),
    (r"\frac12", "{1}/{2}"),
    (r"\frac12", r"1 \over 2"),
    (r"\frac12", r"{1 \over 2}"),
    (r"(-\infty,2]", r"\{x \mid x \le 2\}"),
    (r"(-\infty,2]", r"\{x \in \mathbb{R} : x \leq 2\}"),
    ("5", r"\text{The answer is } 5"),
    ("5", r"\mathrm{5}"),
    ("5", r"\$5"),
    ("5", r"5 \, \text{cm}"),
    ("5", r"5~\mathrm{cm}"),
    ("5", r"5\ \mathrm{cm}"),
    ("5", "5 cm^2"),
    ("5", "5 m/s"),
    ("5", r"5 \text{ m/s}"),
    ("5", "5 miles per hour"),
    ("5", "$5"),
    ("5", r"5\text{.}"),
    (r"\text{Evelyn}", r"\textbf{Evelyn}"),
    (r"\text{Evelyn}", r"\mathrm{Evelyn}"),
    (r"\text{Evelyn}", '"Evelyn"'),
    (r"\text{Evelyn}", "Evelyn."),
    (r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}", r"\begin{pmatrix}-1&0\\0&-1\\\end{pmatrix}"),
    (r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}", r"\left[\begin{matrix}-1&0\\0&-1\end{matrix}\right]"),
    (
        r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}",
        r"\left[\begin{array}{cc}-1&0\\0&-1\end{array}\right]",
    ),
    (
        r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}",
        r"\begin{pmatrix}\frac{1}{5}\\-\frac{18}{5}\end{pmatrix}",
    ),
    ("(15,-29)", "x=15, y=-29"),
    ("(6,31,-1)", "a=6,b=31,c=-1"),
    ("52_8", r"52 \text{ (base 8)}"),
    ("4210_{5}", "4210_5"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19} \text{ and } 1+\sqrt{19}"),
    (r"1 \pm \sqrt{19}", r"x = 1 \pm \sqrt{19}"),
    ("3, 5, 7", r"\{3,5,7\}"),
    ("1,-2", r"x=1 \text{ or } x=-2"),
    ("1,-2", "x=1,-2"),
    ("y = -2x", "2x+y=0"),
    ("y = -2x", "-2x"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("x=5", "5"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}^\circ"),
    (r"\frac{270}7\text{ degrees}", r"38\frac{4}{7}"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    ("58,500", "58500"),
    (r"\$32,\!348", "32,348"),
    (r"137 \frac{1}{2}", r"\frac{275}{2}"),
    ("2k+2", "2(k+1)"),
    ("6r^2-4r-24", "-24-4r+6r^2"),
    (r"\frac{\sqrt{21}}{5}", r"\sqrt{\frac{21}{25}}"),
    (r"\frac{\sqrt{21}}{5}", r"\sqrt{21}/5"),
    (r"\frac{\sqrt{21}}{5}", "√21/5"),
    (r"\frac{\sqrt{21}}{5}", "sqrt(21)/5"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"\frac{\pi}{6}", "pi/6"),
    (r"\frac{\pi}{6}", "π/6"),
    (r"288 \pi", "288pi"),
    (r"-\frac{\pi}{6}", r"-\frac{1}{6}\pi"),
    (r"-\frac{\pi}{6}", r"-\pi/6"),
    (r"\frac{3840}{289}", r"13\frac{83}{289}"),
    (r"\text{(C)}", r"\text{C}"),
    (r"\text{(C)}", "c"),
    (r"\text{(C)}", "C)"),
    (r"\text{(C)}", "(C) ellipse"),
    (r"\text{(C)}", "Option C"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"(-\infty, 2) \cup (3, \infty)", r"x\in(-\infty,2)\cup(3,+\infty)"),
    (r"864 \mbox{ inches}^2", "864 in^2"),
    (r"864 \mbox{ inches}^2", r"864\text{ sq in}"),
    (r"5.4 \text{ cents}", "5.4"),
    (r"5.4 \text{ cents}", "5.4¢"),
    (".35625", "0.35625"),
    (".35625", r"\frac{57}{160}"),
    ("3R^2", "3 R^{2}"),
    (r"\cot x", r"\cot(x)"),
    (r"\cot x", r"\frac{1}{\tan x}"),
    ("x^5 - x^4 + x^3 - x^2 + x - 1", "(x-1)(x^4+x^2+1)"),
    ("(a+5)(b+2)", "(b+2)(a+5)"),
    ("6 - 5i", "-5i+6"),
    ("1,000,000", "1000000"),
    ("1,000,000", "10^6"),
    ("1,000,000", "1 million"),
    ("-10", r"-\$10"),
    ("-10", r"\$-10"),
    ("1/6", r"0.1\overline{6}"),
    ("65.0", "65"),
    ("3.333", "3.333"),
    ("5,000,000", r"5 \text{ million dollars}"),
    ("60", "5 dozen eggs"),
    ("2500000", r"\$2.5 million"),
]
RIGHT_RESPONSES = [
    ("5", r"The final answer is $\boxed{5}$. I hope it is correct."),
    ("5", "**Answer:** 5"),
    ("5", "Answer: $5$"),
    ("5", "### Final Answer\n5"),
    ("5", r"The answer is \(5\)."),
    ("5", "So there are 5 left."),
    ("5", "#### 5"),
    ("5", "Final answer: 5 apples"),
    ("1,080", "The answer is 1,080."),
    ("1/2", r"The answer is \frac{1}{2}."),
    ("1/2", r"So the probability is \frac{1}{2}."),
    ("x+1", "Therefore, $f(x) = x+1$."),
    ("0.5", "The answer is 0.5."),
    ("(1,2)", "The answer is (1, 2)."),
    ("5", "The correct answer is therefore 5."),
    ("5", "The answer to the problem is\n\n$$5$$"),
    ("5", "\\[\n\\boxed{\n5\n}\n\\]"),
    ("B", "The answer is B"),
    ("(B)", "**The correct answer is (B) 7.**"),
    ("18", "She makes $18 every day."),
    ("18", "She makes 9 * 2 = $<<9*2=18>>18 every day at the market.\n#### 18"),
    ("-3", "The answer is -3."),
    ("-3", "so x = -3"),
    ("3.5", "= 3.5"),
    ("10%", "so 10%"),
]
WRONG = [
    ("5", "5 million"),
    ("5", r"5 \text{ million dollars}"),
    ("5", "5 dozen"),
    ("52_8", r"52 \text{ (base 9)}"),
    ("x<3", r"\{x : y<3\}"),
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


def boxed(answer: str) -> str:
    return f"So the answer is $\\boxed{{{answer}}}$."


def test_the_table_of_the_docs() -> None:
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8").replace(r"\|", "\0")
    rows = re.findall(r"^\| `([^|]+)` \| `([^|]+)` \| (right|wrong) \|$", text, re.MULTILINE)
    assert len(rows) >= 60
    verdicts = {True: "right", False: "wrong"}
    pairs = [
        (truth.replace("\0", "|"), response.replace("\0", "|"), verdict) for truth, response, verdict in rows
    ]
    assert [row for row in pairs if verdicts[is_correct(row[0], row[1])] != row[2]] == []


@pytest.mark.parametrize(("pairs", "verdict"), [(RIGHT, True), (WRONG, False)])
def test_what_a_teacher_would_say(pairs: list[tuple[str, str]], verdict: bool) -> None:
    assert [pair for pair in pairs if is_correct(pair[0], boxed(pair[1])) is not verdict] == []


def test_final_answers_without_a_box() -> None:
    assert [pair for pair in RIGHT_RESPONSES if not is_correct(*pair)] == []
    assert not is_correct("3", "so x = -3")


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
