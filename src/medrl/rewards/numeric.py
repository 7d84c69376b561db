"""Numbers with units: read out of an answer, and compared within a tolerance.

Only the extracted answer is looked at, never the reasoning: "grade 2 seen" there is no answer 2.
"""

import logging
import re
import unicodedata
from functools import lru_cache
from typing import Any

from medrl.errors import MissingExtraError, RewardError
from medrl.rewards.option_text import clean
from medrl.rewards.phrases import strip_lead_in, strip_phrases
from medrl.rewards.units import Quantity, convert, read_unit

_NUMBER_NAMES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_NUMBER_WORDS = {name: float(number) for number, name in enumerate(_NUMBER_NAMES)}
_ABOUT = re.compile(r"\A(?:about|around|approximately|approx\.?|roughly|circa|ca\.|[~≈=])\s?")
_PLAIN = re.compile(
    r"([+-]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:[.,]\d+)?|\.\d+))(?:\s?[x×*]\s?10\s?\^?\s?([+-]?\d{1,2})|e([+-]?\d{1,2}))?(?!\s?[/^\d])"
)
_FRACTION = re.compile(r"([+-]?\d{1,9})\s?/\s?(\d{1,9})(?![\d/.])")
_MIXED = re.compile(r"(\d{1,4})\s(?:and\s)?(\d{1,2})\s?/\s?(\d{1,2})(?![\d/.])")
_EDGES = " .,;!*_`\"'$()[]{}"
_LATEX_IN_WORDS = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\(?:text|mathrm|textbf|mathbf|boxed)\s?\{([^{}]*)\}", r"\1"),
        (r"\\(?:si|SI|qty)\s?\{([^{}]*)\}\s?\{([^{}]*)\}", r"\1 \2"),
        (r"\\[dt]?frac\s?\{\s?(\d{1,9})\s?\}\s?\{\s?(\d{1,9})\s?\}", r" \1/\2 "),
        (r"\\[dt]?frac\s?(\d)(\d)", r" \1/\2 "),
        (r"\{,\}", ","),
        (r"\\[,;: ]|[~$]", " "),
        (r"[\u00ba\u02da]", "°"),
        (r"\u2044", "/"),
        (r"\^\s?\{\s?([+-]?\d+)\s?\}", r"^\1"),
        (r"\\%", "%"),
        (r"\^\s?\{?\\circ\}?", "°"),
        (r"\\mu\s?", "µ"),
        (r"\\times|\\cdot", "×"),
    )
)
_FORMULA = re.compile(r"[\d\s+\-*/^×.(){}]|\\(?:d?frac|tfrac|sqrt|pi|left|right|div)(?![a-z])")
_NO_FORMULA = re.compile(r"\^\s?\{?\s?-?\d{3}|\^.*\^|\d{10}|\d\s+\d")
"""Too large to be worked out, or two numbers side by side."""
_MAX_CHARS = 200
_MAX_FORMULA_CHARS = 60
_SAME = 1e-9
"""Relative difference below which two numbers are one: what rounding in unit conversion may add."""


def read_quantity(text: str) -> tuple[Quantity | None, str]:
    """The one number, with its unit, that ``text`` is; or None and the problem.

    Digits, thousands commas, a decimal comma, powers of ten, fractions (``3 1/2``), number words up to twenty and LaTeX
    are read. A range, a bound ("> 5", "3 or more"), two numbers or a sentence around the number ("3 is wrong") are not.
    """
    if len(text) > _MAX_CHARS:
        return None, "answer is too long"
    parse_formula = _math_verify_parse()
    text = _write_out_fractions(text)
    for pattern, plain in _LATEX_IN_WORDS:
        text = pattern.sub(plain, text)
    body = _ABOUT.sub("", strip_phrases(clean(text)).strip(_EDGES))
    if not body:
        return None, "empty answer"
    number, rest = _split_number(body)
    if number is None:
        number = _evaluate(text, parse_formula)
        return (None, "not a number") if number is None else (Quantity(number), "")
    unit = read_unit(rest)
    if unit is None:
        return None, "more than a number and a unit"
    return Quantity(number, unit), ""


def numbers_match(answer: Quantity, target: Quantity, tolerance: str = "") -> bool:
    """Whether ``answer`` is ``target`` within ``tolerance`` (``5 %`` of the target, ``2 mm``, or empty).

    Units are converted; % is one: a hundredth, so that 50 % is 0.5 and not 50. A target in a unit of measurement needs
    an answer in one, and a target without a unit is a count or a share: 5 cm are not 5. What is counted may be said or
    left out (``3 lesions``), and ``degrees`` may be those of the target.
    """
    allowed = allowed_difference(target, tolerance)
    degrees = answer.unit == "°" and target.unit in ("°c", "°f")
    number = answer.number if degrees else convert(answer, target.unit)
    return number is not None and abs(number - target.number) <= allowed


def read_target(target: str, example_id: str) -> Quantity:
    """The target of a numeric example. Raises `RewardError` naming the example when it is no quantity."""
    quantity, problem = read_quantity(target)
    if quantity is None:
        raise RewardError(
            f"example {example_id!r} has the numeric target {target!r}, which cannot be read ({problem}); "
            "a target is one number and its unit, e.g. '3.5 cm'"
        )
    return quantity


def allowed_difference(target: Quantity, tolerance: str) -> float:
    """How far off ``target`` is still right, in its unit. Raises `RewardError` for a tolerance that is none."""
    slack = _SAME * max(1.0, abs(target.number))
    if not tolerance.strip():
        return slack
    given, problem = read_quantity(tolerance)
    if given is None or given.number < 0:
        raise RewardError(f"tolerance {tolerance!r} cannot be read ({problem or 'negative'}); write '5 %' or '2 mm'")
    if given.unit == "%":
        return abs(target.number) * given.number / 100 + slack
    difference = convert(given, target.unit, zero=0.0) if given.unit else given.number
    if difference is None:
        raise RewardError(f"tolerance {tolerance!r} is not in a unit of the target {target}; write '5 %' or its unit")
    return difference + slack


def _split_number(body: str) -> tuple[float | None, str]:
    """The number that ``body`` begins with, and what is behind it."""
    if (match := _MIXED.match(body)) and 0 < int(match[2]) < int(match[3]) <= 16:
        return int(match[1]) + int(match[2]) / int(match[3]), body[match.end() :]
    if match := _FRACTION.match(body):
        rest = body[match.end() :]
        # "120/80 mmHg" is a pair of pressures; nobody measures in eightieths.
        return (int(match[1]) / int(match[2]) if 0 < int(match[2]) <= (16 if rest else 10**9) else None), rest
    if match := _PLAIN.match(body):
        digits = match[1].replace(",", "") if re.search(r",\d{3}(?!\d)", match[1]) else match[1].replace(",", ".")
        return float(digits) * 10.0 ** int(match[2] or match[3] or 0), body[match.end() :]
    word, _, rest = body.partition(" ")
    return _NUMBER_WORDS.get(word), rest


def _write_out_fractions(text: str) -> str:
    """``3½`` as ``3 1/2``: Unicode's own way would join its digits to the number before it."""
    for char in set(text):
        parts = unicodedata.decomposition(char).split()
        if parts[:1] == ["<fraction>"]:
            text = text.replace(char, f" {''.join(chr(int(part, 16)) for part in parts[1:])} ")
    return text


def _evaluate(text: str, parse: Any) -> float | None:
    """The value of a formula such as ``\frac{7}{2}``; None when the text is none, or too large to be worked out."""
    text = strip_lead_in(text.strip().strip("$ ")).replace("×", "\\times ")
    whole = "".join(match[0] for match in _FORMULA.finditer(text.replace("\\times ", "×")))
    if whole != text.replace("\\times ", "×") or len(text) > _MAX_FORMULA_CHARS or _NO_FORMULA.search(text):
        return None
    # Its own time limit works with alarms, which belong to whoever calls us; a text this short needs none.
    found = parse(f"${text}$", parsing_timeout=None)
    value = found[0] if found and getattr(found[0], "is_number", False) else None
    return float(value) if value is not None and value.is_real and value.is_finite else None


@lru_cache(maxsize=1)
def _math_verify_parse() -> Any:
    # Asked for with the first number, not with the first formula: a run must not stop for it at step 300.
    try:
        from math_verify import parse
    except ImportError as error:
        raise MissingExtraError("math-verify", "rewards") from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at every call without its time limit
    return parse
