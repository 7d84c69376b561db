"""Units of measurement: how they are spelled, and what one is worth in another."""

import math
import re
from dataclasses import dataclass


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
    "amount": {"pmol": 1e-12, "nmol": 1e-9, "µmol": 1e-6, "mmol": 1e-3, "mol": 1.0},
    "mass": {"ng": 1e-12, "µg": 1e-9, "mg": 1e-6, "g": 1e-3, "kg": 1.0},
    "time": {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "day": 86400.0, "week": 604800.0},
    "age": {"month": 1.0, "year": 12.0},
    "angle": {"°": 1.0, "rad": 180 / math.pi},
    "pressure": {"mmhg": 133.322, "kpa": 1000.0, "pa": 1.0},
    "frequency": {"khz": 1e3, "mhz": 1e6, "hz": 1.0},
    "temperature": {"°c": 1.0, "°f": 5 / 9},
}
"""Unit -> what one of it is worth, by what is measured; ``mg/dl`` is made of two. Others are compared by words."""
_SHARES = {"": 1.0, "%": 0.01, "‰": 0.001}
"""A share is a bare number: 50 % is 0.5, and never 50."""
_ZERO_OF_F = -160 / 9
"""0 °F in °C."""
_MEASURES = {unit: (measure, worth) for measure, units in _SCALES.items() for unit, worth in units.items()}
_SPELLINGS = {
    "um": "µm", "micron": "µm", "micrometer": "µm", "micrometre": "µm", "millimeter": "mm", "millimetre": "mm",
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "in": "inch", "inche": "inch",
    "ul": "µl", "cc": "cm3", "milliliter": "ml", "millilitre": "ml", "liter": "l", "litre": "l",
    "ug": "µg", "mcg": "µg", "milligram": "mg", "gram": "g", "kilogram": "kg",
    "sec": "s", "second": "s", "minute": "min", "hr": "h", "hour": "h", "d": "day", "wk": "week",
    "mo": "month", "yr": "year", "y": "year", "y o": "year", "year old": "year", "degree": "°", "deg": "°",
    "percent": "%", "pct": "%", "per cent": "%", "hounsfield unit": "hu", "years old": "year",
    "beats per minute": "bpm", "beats/min": "bpm", "umol": "µmol", "tesla": "t",
    "deciliter": "dl", "decilitre": "dl", "millimole": "mmol", "micromole": "µmol",
    "c": "°c", "celsius": "°c", "°celsius": "°c", "f": "°f", "fahrenheit": "°f",
    "°fahrenheit": "°f",
}  # fmt: skip
_UNIT = re.compile(r"(?:° ?)?[^\W\d_]+[23]?(?:[ /.%°]{1,2}[^\W\d_]+[23]?)*")
_DEGREES = re.compile(r"\A(?:° ?|deg(?:ree)?s? )(?=[cf])")
_NO_UNIT = re.compile(
    r"\b(?:is|are|was|were|not|no|nor|or|but|and|to|than|if|because|since|wait|actually|wrong|incorrect|false"
    r"|maybe|perhaps|possibly|probably|un(?:clear|sure|known|certain|likely)"
    r"|more|less|fewer|least|most|plus|minimum|maximum|at|up|over|under|above|below)\b"
)
"""Words that make a sentence, a bound or a denial of what stands behind a number."""
_OF_WHAT = re.compile(
    r" (?:(?:in|of) (?:diameter|length|size|width|height|depth|thickness|total)|long|wide|deep|thick|high|tall|across"
    r"|approximately|approx|about|roughly)\Z"
)
_MAX_UNIT_WORDS = 4


def read_unit(rest: str) -> str | None:
    """A unit as we spell it; empty for none, None for what cannot be a unit."""
    rest = rest.strip().strip(".")
    if not rest:
        return ""
    if rest in ("°", "%", "‰"):
        return rest
    rest = _OF_WHAT.sub("", f" {rest}").strip().replace("μ", "µ").replace("^", "").replace("-", " ").strip()
    rest = rest.replace(" /", "/").replace("/ ", "/")
    if not rest:
        return ""
    if not _UNIT.fullmatch(rest) or len(rest.split()) > _MAX_UNIT_WORDS or _NO_UNIT.search(rest):
        return None
    rest = _DEGREES.sub("°", rest)
    parts = [_spell(part) for part in re.split(r"/| per ", rest)]
    return "/".join(parts) if len(parts) == 2 and all(part in _MEASURES for part in parts) else _spell(rest)


def _spell(unit: str) -> str:
    singular = unit[:-1] if re.search(r"\w\ws$", unit) else unit
    return _SPELLINGS.get(unit) or _SPELLINGS.get(singular, singular)


def convert(quantity: Quantity, unit: str, zero: float = _ZERO_OF_F) -> float | None:
    """The number of ``quantity`` in ``unit``; None when it measures something else, or lacks the unit.

    ``zero``: 0 °F in °C; 0 for differences.
    """
    number, given = quantity.number, quantity.unit
    if given == unit:
        return number
    if given in _SHARES and unit in _SHARES:
        return number * _SHARES[given] / _SHARES[unit]
    (mine, worth), (theirs, size) = _measure(given), _measure(unit)
    if not mine and not theirs and not {given, unit} & {"%", "‰"}:
        return number if "" in (given, unit) else None  # what is counted may be left out
    if mine != theirs or not mine:
        return None
    zeros = {"°f": zero}
    return (number * worth + zeros.get(given, 0.0) - zeros.get(unit, 0.0)) / size


def _measure(unit: str) -> tuple[str, float]:
    """What a unit or a quotient of two measures, and its worth; empty for others."""
    over, _, under = unit.partition("/")
    if over in _MEASURES and under in _MEASURES:
        (mine, worth), (theirs, size) = _MEASURES[over], _MEASURES[under]
        return f"{mine}/{theirs}", worth / size
    return _MEASURES.get(unit, ("", 1.0))
