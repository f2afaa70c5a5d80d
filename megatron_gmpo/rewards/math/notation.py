r"""One spelling for each answer: Unicode, LaTeX synonyms, spaces, digit groups."""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho - sigma tau "
)
_GREEK += "upsilon phi chi psi omega"
_SYMBOLS = str.maketrans(
    {chr(ord("α") + place): f"\\{name} " for place, name in enumerate(_GREEK.split())}
    | {"Γ": r"\Gamma ", "Δ": r"\Delta ", "Θ": r"\Theta ", "Σ": r"\Sigma ", "Ω": r"\Omega "}
    | dict.fromkeys("−–—‐", "-")
    | dict.fromkeys("×·⋅∗∙", "*")
    | dict.fromkeys("÷⁄∕", "/")
    | dict.fromkeys("≤⩽", r"\leq ")
    | dict.fromkeys("≥⩾", r"\geq ")
    | dict.fromkeys("°º˚", r"^\circ ")
    | dict.fromkeys("’′", "'")
    | dict.fromkeys('\u200b\u2061€£₹"“”', "")
    | {"≠": r"\neq ", "≈": r"\approx ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset "}
    | {"∠": r"\angle "}
    | {"∞": r"\infty ", "±": r"\pm ", "√": r"\sqrt ", "ℝ": r"\mathbb{R}", "…": r"\ldots "}
    | {"⟨": r"\langle ", "⟩": r"\rangle ", "∨": r"\lor ", "¢": " cents"}
)
_SYNONYMS = {
    name: standard
    for standard, names in {
        "": "left right displaystyle textstyle limits big Big bigg Bigg bigl bigr Bigl Bigr rm bf it",
        " ": "quad qquad enspace thinspace",
        r"\frac": "dfrac tfrac cfrac",
        r"\binom": "dbinom tbinom",
        "*": "times cdot",
        "/": "div",
        r"\leq": "le leqslant",
        r"\geq": "ge geqslant",
        r"\neq": "ne",
        "<": "lt",
        ">": "gt",
        "|": "vert lvert rvert mid",
        r"\{": "lbrace",
        r"\}": "rbrace",
        "[": "lbrack",
        "]": "rbrack",
        r"\emptyset": "varnothing",
        r"^\circ": "degree",
        r"\ldots": "dots cdots dotsc dotsb",
        r"\text": "mbox hbox textbf textit textrm textsf textnormal mathrm mathbf mathit operatorname",
    }.items()
    for name in names.split()
}
_COMMAND = re.compile(r"\\([A-Za-z]+)\*?")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_BRACES = re.compile(r"\{((?:[^{}]|(?<=\\)[{}]|(?<!\\)\{[^{}]*\})*)(?<!\\)\}")
_REALS = r"(-\\infty,\\infty)"
_MULTIPLES = [
    ("dozen", "12"),
    ("hundred", "100"),
    ("thousand", "10^3"),
    ("million", "10^6"),
    ("billion", "10^9"),
]
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<!\\)\\(?:!\s*|/)", ""),
        (r"(?<!\\)\\[,;:> ]|~", " "),
        (r"(?<!\\)\\[()\[\]]|(?<!\\)\$", ""),  # the delimiters of mathematics
        (r"\{,\}", ","),
        (r"\\text\s*\{\s*(and|or|,|percent|degrees?|[Aa]ll real numbers)\s*\}", r" \1 "),
        (r"\\text\s*\{\s*(sin|cos|tan|cot|sec|csc|ln|log|exp)\s*\}", r"\\\1 "),
        (r"(?<=[\d}])\s*\\text\s*\{m\}", r"\\text{ m}"),  # metres, not a variable
        (r"\\text\s*\{([A-Za-z])\}", r" \1"),
        (r"\\?%|\bpercent\b", "%"),
        (r"(?<=\d)\s*\^\s*(?:\{\s*o\s*\}|o(?![A-Za-z]))", r"^\\circ "),  # a small o as the degree sign
        (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ|\bdegrees?\b", r"^\\circ "),
        (r"(?<=\d) sq\.", " sq"),
        (r"\b[Aa]ll real numbers\b|\\mathbb\s*\{?R\}?", _REALS),
        (r"(?<![A-Za-z\\])(infinity|pi|sqrt)(?![A-Za-z])", r"\\\1 "),
        (r"\\infinity", r"\\infty"),
        (r"\\sqrt\s+(\d+(?:\.\d+)?)", r"\\sqrt{\1}"),
        (r"\*\*", "^"),
        (r"<=", r"\\leq "),
        (r">=", r"\\geq "),
        (r"!=", r"\\neq "),
        (
            r"\{([^{}]+)\\over(?![A-Za-z])([^{}]+)\}|^([^{}]+)\\over(?![A-Za-z])([^{}]+)$",
            r"\\frac{\1\3}{\2\4}",
        ),
        (r"\s*\\text\s*\{\s*\(?base (\d+)\)?\s*\}", r"_\1"),
        (r"(?i)^(\\text\s*\{\s*)?(?:the )?(?:final )?answer(?: is)?\s*:?\s*(?(1)\})", ""),
        *((rf"(?<=\d)\s*\\text\s*\{{\s*{word}s?\b", rf" * {factor} \\text{{") for word, factor in _MULTIPLES),
        *((rf"(?<=\d)\s*{word}s?\b", rf" * {factor}") for word, factor in _MULTIPLES),
        (r"^\s*(?:=|\\approx(?![A-Za-z]))", ""),
        (r"\\\\\s*$", ""),  # an end of line
        (r"\s+", " "),
    ]
]
_AND_OR = re.compile(r"\\text\s*\{[^{}]*\}|,?\s*(?<![A-Za-z\\])(and|or)(?![A-Za-z])")
_ORDER = re.compile(r"[<>]|\\[lg]eq")
_GROUPED = re.compile(
    r"(?<![\d.,])(?<!\d )(?<!,-)[1-9]\d{0,2}"
    r"(?:(?:,\d{3})+(?!\d)|(?: \d{3})+(?! ?\d| ?/ ?\d{3}))(?!,\S)"
)
"""A number like 10,000 or 10 000; not ``10, 000`` or ``10,000,5``, which are lists, nor 3 125/216."""
_WORDS = re.compile(
    r"(?=.*[A-Za-z]{4}|(?i:yes|no|odd)$)(?:(?:[A-Z]?[a-z]+|[A-Z]+)(?:[ ']+|-(?=[A-Za-z]{4})|$))+", re.DOTALL
)
"""English, not a product of variables: words written like ``east``, ``East`` or ``EAST``."""


def tidy(text: str) -> str:
    """Return an answer in one spelling. Answers that differ in more than their spelling stay different."""
    text = text.strip().strip('*"')
    if not text.isascii():
        text = _ascii(text)
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # a JSON string's \\frac
    text = _COMMAND.sub(lambda command: _SYNONYMS.get(command[1], command[0]), text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _GROUPED.sub(_digits, text)  # before "and" and "or" become commas
    either = r" \lor " if _ORDER.search(text) else ","
    text = _AND_OR.sub(lambda found: {"or": either, "and": ","}.get(found[1], found[0]), text)
    text = text.strip(" ,;").removesuffix(".").strip()
    while whole := _TEXT.fullmatch(text) or _BRACES.fullmatch(text):
        text = whole[1].strip()
    return text


def key(text: str) -> str:
    """Return what the spellings of one text share: no needless braces or spaces, for words no case."""
    text = _TEXT.sub(r"\1", text)
    text = re.sub(r"\{\s*([^\\{}\s])\s*\}", r"\1", text)
    if _WORDS.fullmatch(text):
        text = text.lower()
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def _ascii(text: str) -> str:
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", lambda run: f"^{{{run[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub("[₀-₉]+", lambda run: f"_{{{run[0].translate(_SUBSCRIPTS)}}}", text)
    text = re.sub("[¼-¾⅐-⅞]", _fraction, text)
    return unicodedata.normalize("NFKC", text.translate(_SYMBOLS))


def _fraction(character: re.Match[str]) -> str:
    """Write a character like ½ as a LaTeX fraction."""
    upper, lower = unicodedata.normalize("NFKC", character[0]).split("\N{FRACTION SLASH}")
    return f"\\frac{{{upper}}}{{{lower}}}"


def _digits(number: re.Match[str]) -> str:
    """Remove the separators of a number like 10,000, unless its comma is that of a pair like (1,234)."""
    before, after = number.string[: number.start()].rstrip(" -"), number.string[number.end() :].lstrip()
    depth = len(re.findall(r"[(\[{]|\\langle", before)) - len(re.findall(r"[)\]}]|\\rangle", before))
    between = before.endswith(("(", "[", "{", r"\langle", ",")) and after.startswith((")", "]", "\\", ","))
    if "," in number[0] and depth > 0 and between:
        return number[0]
    return re.sub("[ ,]", "", number[0])
