"""Text of models and data sets, made fit to be shown; numbers as words."""

import unicodedata

from medrl.evaluation.intervals import Interval
from medrl.types import LETTERS, EvalRecord

UNKNOWN = "–"


def asked_text(record: EvalRecord) -> str:
    """The question with its options, one a line; the wording around it is not in the record."""
    options = (f"\n{letter}) {option}" for letter, option in zip(LETTERS, record.options, strict=False))
    return record.question + "".join(options)


def visible(text: str) -> str:
    """Text in which nothing hides: control, bidirectional and other invisible characters are spelled out.

    Line ends and tabs stay. An escape sequence cannot reach a terminal, an override cannot turn a line around, and
    instructions written in invisible characters come to light.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character in "\n\t":
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # the Control Pictures block, e.g. ␛
    # Cc control, Cf format (bidirectional, zero width, tags), Cs lone surrogate, Co private, Zl and Zp separators
    if unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}:
        return f"⟦U+{code:04X}⟧"
    return character


def percent(share: float | None, digits: int = 1) -> str:
    """``0.713`` -> ``71.3 %``."""
    return UNKNOWN if share is None else f"{100 * share:.{digits}f}\u202f%"


def percent_range(interval: Interval) -> str:
    """``66.1 – 75.9`` in percent."""
    if interval.low is None or interval.high is None:
        return UNKNOWN
    return f"{100 * interval.low:.1f} – {100 * interval.high:.1f}"


def points(difference: float | None, digits: int = 1) -> str:
    """``0.123`` -> ``+12.3``: a difference of two percentages."""
    if difference is None:
        return UNKNOWN
    return with_sign(100 * difference, digits)


def with_sign(value: float, digits: int) -> str:
    """A number with its sign; what rounds to nothing has none."""
    shown = f"{value:+.{digits}f}".replace("-", "−")
    return shown[1:] if not shown.strip("+−0.") else shown


def points_range(interval: Interval) -> str:
    """``+4.0 to +20.4``."""
    if interval.low is None or interval.high is None:
        return UNKNOWN
    return f"{points(interval.low)} to {points(interval.high)}"


def p_value(p: float) -> str:
    """``0.0213`` -> ``0.021``; tiny ones as a bound."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def p_equals(p: float) -> str:
    """``0.0213`` -> ``p = 0.021``; tiny ones as a bound."""
    return f"p {p_value(p)}" if p < 0.001 else f"p = {p_value(p)}"


def duration(seconds: float) -> str:
    """``7500`` -> ``2 h 05 min``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
