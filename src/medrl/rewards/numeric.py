"""Numbers with units: read out of an answer, and compared within a tolerance.

Only the extracted answer is looked at, never the reasoning: "grade 2 seen" there is no answer 2.
"""

import logging
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from medrl.errors import MissingExtraError, RewardError
from medrl.rewards.option_text import clean
from medrl.rewards.parse import strip_lead_in


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number and its unit as written; an empty unit is none."""

    number: float
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.number:.12g} {self.unit}".strip()


_SCALES: dict[str, dict[str, float]] = {
    "length": {"nm": 1e-9, "µm": 1e-6, "mm": 1e-3, "cm": 1e-2, "dm": 1e-1, "m": 1.0, "km": 1e3, "inch": 0.0254},
    "area": {"mm2": 1e-6, "cm2": 1e-4, "m2": 1.0},
    "volume": {"µl": 1e-9, "mm3": 1e-9, "ml": 1e-6, "cm3": 1e-6, "cl": 1e-5, "dl": 1e-4, "l": 1e-3, "m3": 1.0},
    "mass": {"ng": 1e-12, "µg": 1e-9, "mg": 1e-6, "g": 1e-3, "kg": 1.0},
    "time": {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "day": 86400.0, "week": 604800.0},
    "age": {"month": 1.0, "year": 12.0},
    "angle": {"°": 1.0, "rad": 180 / math.pi},
    "pressure": {"mmhg": 133.322, "kpa": 1000.0, "pa": 1.0},
    "frequency": {"khz": 1e3, "mhz": 1e6, "hz": 1.0},
    "share": {"%": 0.01, "‰": 0.001},
}
"""Unit -> what one of it is worth, by what is measured. Units that are not here are compared by their words."""
_MEASURES = {unit: (measure, worth) for measure, units in _SCALES.items() for unit, worth in units.items()}
_SPELLINGS = {
    "um": "µm", "micron": "µm", "micrometer": "µm", "micrometre": "µm", "millimeter": "mm", "millimetre": "mm",
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "in": "inch", "inche": "inch",
    "ul": "µl", "cc": "cm3", "milliliter": "ml", "millilitre": "ml", "liter": "l", "litre": "l",
    "ug": "µg", "mcg": "µg", "milligram": "mg", "gram": "g", "kilogram": "kg",
    "sec": "s", "second": "s", "minute": "min", "hr": "h", "hour": "h", "d": "day", "wk": "week",
    "mo": "month", "yr": "year", "y": "year", "y o": "year", "year old": "year", "degree": "°", "deg": "°",
    "percent": "%", "per cent": "%", "hounsfield unit": "hu", "years old": "year", "beats per minute": "bpm",
}  # fmt: skip
_NUMBER_NAMES = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
_NUMBER_WORDS = {name: float(number) for number, name in enumerate(_NUMBER_NAMES)}
_ABOUT = re.compile(r"\A(?:about|around|approximately|approx\.?|roughly|circa|ca\.|[~≈])\s?")
_PLAIN = re.compile(
    r"([+-]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:[.,]\d+)?|\.\d+))(?:\s?[x×*]\s?10\s?\^?\s?([+-]?\d{1,2})|e([+-]?\d{1,2}))?(?!\s?[/^\d])"
)
_FRACTION = re.compile(r"([+-]?\d{1,9})\s?/\s?(\d{1,9})(?![\d/.])")
_EDGES = " .!*_`\"'$()[]{}"
_LATEX_IN_WORDS = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\(?:text|mathrm|textbf|mathbf|boxed)\s?\{([^{}]*)\}", r"\1"),
        (r"\\[,;: ]|[~$]", " "),
        (r"\^\s?\{\s?([+-]?\d+)\s?\}", r"^\1"),
        (r"\\%", "%"),
        (r"\^\s?\{?\\circ\}?", "°"),
        (r"\\mu\s?", "µ"),
        (r"\\times|\\cdot", "×"),
    )
)
_FORMULA = re.compile(r"[\d\s+\-*/^×.(){}]|\\(?:d?frac|tfrac|sqrt|pi|left|right|div)(?![a-z])")
_TOO_LARGE = re.compile(r"\^\s?\{?\s?-?\d{3}|\^.*\^|\d{10}")
_UNIT = re.compile(r"[^\W\d_]+[23]?(?:[ /.%°]{1,2}[^\W\d_]+[23]?)*")
_MAX_UNIT_WORDS = 4
_MAX_CHARS = 200
_MAX_FORMULA_CHARS = 60
_SAME = 1e-9
"""Relative difference below which two numbers are one: what rounding in unit conversion may add."""


def read_quantity(text: str) -> tuple[Quantity | None, str]:
    """The one number, with its unit, that ``text`` is; or None and the problem.

    Digits, thousands commas, a decimal comma, powers of ten, fractions, number words up to twelve and LaTeX are read. A
    range, a bound ("> 5"), two numbers or a sentence around the number are not.
    """
    if len(text) > _MAX_CHARS:
        return None, "answer is too long"
    parse_formula = _math_verify_parse()
    for pattern, plain in _LATEX_IN_WORDS:
        text = pattern.sub(plain, text)
    body = _ABOUT.sub("", strip_lead_in(clean(text)).strip(_EDGES))
    if not body:
        return None, "empty answer"
    number, rest = _split_number(body)
    if number is None:
        number = _evaluate(text, parse_formula)
        return (None, "not a number") if number is None else (Quantity(number), "")
    unit = _unit(rest)
    if unit is None:
        return None, "more than a number and a unit"
    return Quantity(number, unit), ""


def numbers_match(answer: Quantity, target: Quantity, tolerance: str = "") -> bool:
    """Whether ``answer`` is ``target`` within ``tolerance`` (``5 %`` of the target, ``2 mm``, or empty).

    Units are converted. A target in a unit of measurement needs an answer in one; a target that counts things takes a
    bare number; a target without a unit takes any unit, and a percentage also as the share that it is.
    """
    allowed = allowed_difference(target, tolerance)
    if target.unit in _MEASURES or (target.unit and answer.unit):
        numbers = [_convert(answer, target.unit)]
    else:
        numbers = [answer.number, answer.number / 100 if answer.unit == "%" else None]
    return any(number is not None and abs(number - target.number) <= allowed for number in numbers)


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
    difference = _convert(given, target.unit) if given.unit else given.number
    if difference is None:
        raise RewardError(f"tolerance {tolerance!r} is not in a unit of the target {target}; write '5 %' or its unit")
    return difference + slack


def _convert(quantity: Quantity, unit: str) -> float | None:
    """The number of ``quantity`` in ``unit``; None when it measures something else, or has no unit."""
    if quantity.unit == unit:
        return quantity.number
    (mine, worth), (theirs, size) = (_MEASURES.get(name, (name, 1.0)) for name in (quantity.unit, unit))
    return quantity.number * worth / size if mine == theirs else None


def _split_number(body: str) -> tuple[float | None, str]:
    """The number that ``body`` begins with, and what is behind it."""
    if match := _FRACTION.match(body):
        rest = body[match.end() :]
        # "120/80 mmHg" is a pair of pressures; nobody measures in eightieths.
        return (int(match[1]) / int(match[2]) if 0 < int(match[2]) <= (16 if rest else 10**9) else None), rest
    if match := _PLAIN.match(body):
        digits = match[1].replace(",", "") if re.search(r",\d{3}(?!\d)", match[1]) else match[1].replace(",", ".")
        return float(digits) * 10.0 ** int(match[2] or match[3] or 0), body[match.end() :]
    word, _, rest = body.partition(" ")
    return _NUMBER_WORDS.get(word), rest


def _unit(rest: str) -> str | None:
    """A unit as we spell it; empty for none, None for what cannot be a unit."""
    rest = rest.strip().strip(".")
    if not rest:
        return ""
    if rest in ("°", "%", "‰"):
        return rest
    rest = rest.replace("μ", "µ").replace("^", "").replace("-", " ").strip()
    if not _UNIT.fullmatch(rest) or len(rest.split()) > _MAX_UNIT_WORDS:
        return None
    singular = rest[:-1] if re.search(r"\w\ws$", rest) else rest
    return _SPELLINGS.get(rest) or _SPELLINGS.get(singular, singular)


def _evaluate(text: str, parse: Any) -> float | None:
    """The value of a formula such as ``\frac{7}{2}``; None when the text is none, or too large to be worked out."""
    text = strip_lead_in(text.strip().strip("$ ")).replace("×", "\\times ")
    whole = "".join(match[0] for match in _FORMULA.finditer(text.replace("\\times ", "×")))
    if whole != text.replace("\\times ", "×") or len(text) > _MAX_FORMULA_CHARS or _TOO_LARGE.search(text):
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
