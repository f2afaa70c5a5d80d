r"""Where the final answer of a response stands. docs/rewards.md has the rules with examples."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BARE_BOX = re.compile(r"\\boxed\s+([^\s{}\\$.,;]+)")
_BRACE = re.compile(r"(?<!\\)(?:\\\\)*([{}])")
_PLACEHOLDER = re.compile(
    r"(?:\\text\s*\{)?(?:the |your |final )*answer(?: here)?\}?|\\?[lc]?dots|\.\.\.|…", re.I
)
"""Content of a box that repeats the task instead of answering it."""
_JOINED = re.compile(
    r"[\s$]*(?:\\text\s*\{)?\s*(?:,|;|,?\s*\b(?:and|or)\b)\s*\}?[\s$]*(?:[A-Za-z]\w?\s*=\s*)?[\s$]*"
)
"""Text between two boxes that together are one answer."""
_BETWEEN = 40
"""Maximum length of that text."""
_STATED = re.compile(
    r"\banswers?\b(?:[^.\n:=]{0,60}?\s(?:is|are)\b:?|\W{0,3}[:=])[\s*]*"
    r"(?:(?:therefore|thus|hence|simply|just|then|exactly|equal to|given by)\b,?[\s*]*)*(?=\S)",
    re.I,
)
_MATH = re.compile(
    r"\$\$(.{1,1000}?)\$\$|\\\[(.{1,1000}?)\\\]|\\\((.{1,1000}?)\\\)"
    r"|(?<![\\\w$])\$(?=\S)([^$\n]+?)(?<=[^\s\\])\$(?!\d)",
    re.DOTALL,
)
"""TeX's delimiters of mathematics. As in Pandoc, a dollar sign beside a space or before a digit is money."""
_NUMBER = re.compile(
    r"(?<![\w.])-?(?:\\\$|[$€£])?(?:\d{1,3}(?:[ \u00a0\u202f]\d{3})+(?!\d)|\d[\d,]*(?:\.\d+)?|\.\d+"
    r"|\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\})"
    r"(?:\s*/\s*\d+)?(?:\s?\\?%)?"
)
_DEFINITE = re.compile(r"[\d$\\=+*/^<>π√∞½⅓¼]|^\W*(?:[A-Z]|[a-z]\b(?! [a-z]{2}))")
"""A number, mathematics, a name or the letter of a choice, unlike "correct" and "a whole number"."""
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n|,?\s(?:because|since|so|as|which|where)\s")


def final_answer(response: str) -> str | None:
    """Return the final answer of a response as it is written, or None if there is none. Takes linear time."""
    text = response.rpartition("</think>")[2]
    if not text or text.isspace():
        text = response
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    _, marked, after = text.rpartition("####")
    if marked and re.fullmatch(".+", after := after.strip()):  # otherwise it is a heading
        return after
    if statements := list(_STATED.finditer(text)):
        return _first_answer(text[_definite(text, statements) :])
    found = max((_last(_MATH, text), _last(_NUMBER, text)), key=lambda match: match.end() if match else -1)
    return _content(found) if found else None


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete ``\boxed{...}`` that holds an answer, or None.

    Boxes that only a comma, "and" or "or" separates are one answer, a list.
    """
    if "box" not in text:
        return None
    boxes = [box for box in _boxes(text) if text[slice(*box)].strip(" .$") and not _is_placeholder(text, box)]
    if not boxes:
        bare = _BARE_BOX.findall(text)
        return bare[-1] if bare else None
    answer = [boxes[-1]]
    for start, end in reversed(boxes[:-1]):
        next_box = text.rfind("\\", 0, answer[-1][0])
        if not 0 < next_box - end <= _BETWEEN or not _JOINED.fullmatch(text, end + 1, next_box):
            break
        answer.append((start, end))
    return " ; ".join(text[slice(*box)] for box in reversed(answer))


def _boxes(text: str) -> list[tuple[int, int]]:
    """Return start and end of the content of each complete box without a box inside, in order."""
    starts = {match.end() for match in _BOX.finditer(text)}
    boxes: list[tuple[int, int]] = []
    opened: list[int] = []  # the position after each unclosed brace
    if not starts:
        return boxes
    for brace in _BRACE.finditer(text, min(starts) - 1):
        if brace[1] == "{":
            opened.append(brace.end())
        elif opened and (start := opened.pop()) in starts and (not boxes or start > boxes[-1][0]):
            boxes.append((start, brace.start(1)))
    return boxes


def _is_placeholder(text: str, box: tuple[int, int]) -> bool:
    return _PLACEHOLDER.fullmatch(text[slice(*box)].strip()) is not None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return max(pattern.finditer(text), key=lambda match: match.end(), default=None)


def _content(match: re.Match[str]) -> str:
    """Return the mathematics between delimiters, or a number."""
    return next((group for group in match.groups() if group), match[0])


def _definite(text: str, statements: list[re.Match[str]]) -> int:
    """Return where the last definite answer after "the answer is" starts; if none is definite, the last."""
    ends = [*(statement.start() for statement in statements[1:]), len(text)]
    for statement, end in zip(reversed(statements), reversed(ends), strict=True):
        if _DEFINITE.search(_sentence(text[statement.end() : end])):
            return statement.end()
    return statements[-1].end()


def _sentence(text: str) -> str:
    end = _SENTENCE_END.search(text)
    return text[: end.start()] if end else text


def _first_answer(text: str) -> str:
    """Return the answer at the start of a text that follows "the answer is"."""
    sentence = _sentence(text)
    math = _MATH.search(text)
    if not math or math.start() >= max(len(sentence), 1) or _NUMBER.match(sentence):
        return sentence.replace("**", "").strip()
    answers = [_content(math)]
    while (following := _MATH.search(text, math.end())) and following.start() - math.end() <= _BETWEEN:
        if not _JOINED.fullmatch(text, math.end(), following.start()):
            break
        answers.append(_content(following))
        math = following
    return " ; ".join(answers)
