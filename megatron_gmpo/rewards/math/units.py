r"""Units and nouns after a number: ``5.4\text{ cents}``, ``864 \mbox{ inches}^2``, ``18 people``."""

from __future__ import annotations

import re

_NAMES = {
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "in": "inch inche",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "mg": "milligram",
    "g": "gram",
    "kg": "kilogram",
    "lb": "pound",
    "oz": "ounce",
    "s": "sec second",
    "min": "minute",
    "h": "hr hour",
    "day": "",
    "week": "wk",
    "month": "",
    "year": "yr",
    "mph": "miles per hour",
    "dollar": "usd",
    "cent": "",
    "degree": r"^\circ",
    "l": "liter litre",
    "ml": "milliliter millilitre",
}
_KNOWN = {name: unit for unit, names in _NAMES.items() for name in [unit, *names.split()]}
_SHORT_WORDS = """
m mm cm km in ft yd mi mg kg lb lbs oz sec min hr hrs day wk yr mph sq men cup cups egg eggs bag bags box pen
pens car cars cat cats dog dogs boy boys kid kids toy toys pie pies pts usd of per the
"""
_SHORT = frozenset(_SHORT_WORDS.split())
_CHANGES_MEANING = frozenset(("not", "or", "wrong", "except", "if", "unless", "least", "most", "undefined"))
_POWER = r"(?:\s*\^\s*\{?\s*[23]\s*\}?)?"
_TEXT = rf"(?:\s*\\text\s*\{{[^{{}}]*\}}{_POWER})+"
_DEGREE = r"\^\\circ(?:\s*[CF])?"
_ATTACHED = rf"(?:m/s|km/h|mm|cm|km|ft|yd|kg|mg|lbs?|oz|min|hrs?|mph){_POWER}"
_PLAIN = rf"\s[A-Za-z]{{2,}}(?:[ /-][A-Za-z]+)*{_POWER}"
_UNIT = re.compile(rf"(?<=[\d)}}\].%a-z])({_TEXT}|\s*{_DEGREE}|\s?{_ATTACHED}|{_PLAIN})\s*$")


def split_unit(text: str) -> tuple[str, str]:
    r"""Split ``18 people`` into the amount and the unit. Letters that may be variables stay in the amount."""
    unit = ""
    if r"\$" in text:
        unit, text = "dollar", text.replace(r"\$", "").strip()
    found = _UNIT.search(text)
    if not found or not re.search(r"[\d}]", text[: found.start()]):
        return text, unit
    words = re.findall("[A-Za-z]+", found[1].replace(r"\text", ""))
    if (found[1].lstrip()[0] not in "\\^" and not _is_unit(words[0])) or not _CHANGES_MEANING.isdisjoint(
        words
    ):
        return text, unit
    return text[: found.start()].strip(), found[1].strip()


def _is_unit(word: str) -> bool:
    word = word.lower()
    return word in _SHORT or (len(word) > 3 and re.search("[aeiou]", word) is not None)


def conflict(first: str, second: str) -> bool:
    """Return whether two units are known and different, like cents and dollars."""
    one, other = _standard(first), _standard(second)
    return one is not None and other is not None and one != other


def _standard(unit: str) -> tuple[str, int] | None:
    """Return a known unit's short name and power, or None."""
    if unit == r"^\circ":
        return "degree", 1
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", unit).lower()
    power = 2 if re.search(r"\bsq(uare)?\b|2", text) else 3 if re.search(r"\bcu(bic)?\b|3", text) else 1
    name = re.sub(r"\b(sq(uare)?|cu(bic)?)\b|[^a-z ]", "", text).strip()
    known = _KNOWN.get(name) or _KNOWN.get(name.removesuffix("s")) or _KNOWN.get(name.removesuffix("es"))
    return (known, power) if known else None
