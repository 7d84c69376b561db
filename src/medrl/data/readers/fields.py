"""Fields of a row -> fields of an Example: texts, option lists in every spelling, answers as letter or text."""

import ast
import contextlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from medrl.data.readers.inline import split_inline
from medrl.data.readers.rows import RowError
from medrl.types import LETTERS

YES_NO = ("yes", "no")
_OPTION_LETTERS, _OPTION_TEXTS = ("letter", "key", "label"), ("content", "value", "text")
"""What the two fields are called where each option is an object."""
_PREFIX = re.compile(r"\s*[(（\[]?([A-Ja-j])\s*[)）\].．:：、]\s*")
_TAGGED = re.compile(r"<\s*answer\s*>(.*?)(?:<\s*/?\s*answer\s*>|$)", re.DOTALL | re.IGNORECASE)
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL | re.IGNORECASE)
_LETTER_ANSWER = re.compile(
    r"(?:(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?\s*[:：]?\s*)?[(（\[]?([A-J])\s*[)）\].．:：]*",
    re.IGNORECASE,
)


def text(row: dict[str, Any], *names: str) -> str:
    """The first of the fields ``names`` that the row has, stripped; it must be text and not blank."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise RowError(f"missing field {' or '.join(names)}")
    value = row[name]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"field {name} is {value!r}, not text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RowError(f"field {name} is not valid Unicode text")
    return value.strip()


def text_or(row: dict[str, Any], default: str, *names: str) -> str:
    """The same, or ``default`` where every one of them is absent, null or blank."""
    present = [name for name in names if row.get(name) is not None and str(row[name]).strip()]
    return text(row, *present) if present else default


def fields_of(row: Any) -> dict[str, Any]:
    """The row, when it is one with fields; NaN, with which data frames write what is missing, counts as absent."""
    if not isinstance(row, dict):
        raise RowError(f"a {type(row).__name__}, not a question with fields")
    return {name: None if isinstance(value, float) and value != value else value for name, value in row.items()}


def option_list(value: Any) -> tuple[str, ...]:
    """Options written as a list, an object of letters, a list in a string (Python's or JSON), or a text with letters.

    Letters before the texts (``A: ...``, ``(B) ...``) are taken off when all options have theirs, in order. Nulls
    behind the last are no options.
    """
    if isinstance(value, str):
        value = _parse_list(value)
    if isinstance(value, list | tuple):
        value = list(value)
        while value and value[-1] is None:
            value.pop()
        if value and all(isinstance(item, dict) for item in value):
            value = {str(_one_of(item, _OPTION_LETTERS)): _one_of(item, _OPTION_TEXTS) for item in value}
    if isinstance(value, dict):
        value = {str(key).strip().upper(): item for key, item in value.items() if item is not None}
        if sorted(value) != list(LETTERS[: len(value)]):
            raise RowError(f"options have the letters {', '.join(map(str, sorted(value)))}")
        value = [value[letter] for letter in LETTERS[: len(value)]]
    if not isinstance(value, list | tuple):
        raise RowError(f"options are {value!r}, not a list")
    return without_letters([text({"option": item}, "option") for item in value])


def _one_of(item: dict[str, Any], names: Sequence[str]) -> Any:
    return next((item[name] for name in names if item.get(name) is not None), None)


def _parse_list(value: str) -> Any:
    try:
        # A list of constants and nothing else: no name, call or operator is ever looked at.
        return (
            json.loads(value) if value.lstrip().startswith(("[", "{")) and "'" not in value else ast.literal_eval(value)
        )
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        pass
    try:
        return list(split_inline(value)[1])
    except RowError:
        parts = [part for part in re.split(r"[|;\n]", value) if part.strip()]
    if len(parts) < 2:
        raise RowError(f"options are {value!r}, no list: write them as a JSON list, or with | between")
    return parts


def without_letters(options: Sequence[str]) -> tuple[str, ...]:
    """``options`` without ``A)``, ``(B)``, ``C:`` or ``D.`` where every one has its own letter."""
    found = [_PREFIX.match(option) for option in options]
    lettered = all(match and match[1].upper() == letter and match.end() < len(option)
                   for match, letter, option in zip(found, LETTERS, options, strict=False))  # fmt: skip
    if not lettered:
        return tuple(options)
    return tuple(option[match.end() :].strip() for option, match in zip(options, found, strict=True) if match)


def check_options(options: tuple[str, ...], target: str) -> tuple[str, ...]:
    """``options``, when there are 2 to 10 and the right one occurs once."""
    if not 2 <= len(options) <= len(LETTERS):
        raise RowError(f"{len(options)} options; there must be 2 to {len(LETTERS)}")
    if target not in LETTERS[: len(options)]:
        raise RowError(f"answer {target!r} is the letter of none of the {len(options)} options")
    right = options[LETTERS.index(target)]
    times = sum(normal(option) == normal(right) for option in options)
    if times > 1:
        raise RowError(f"duplicate options: {right!r} occurs {times} times")
    return options


def letter_of(answer: str, options: Iterable[str]) -> str:
    """Letter of the option whose text is ``answer``: as written, else but for case, else but for punctuation too."""
    listed = list(options)
    for spell in (normal, lambda text: normal(text).casefold(), _bare):
        wanted = spell(answer)
        letters = [
            letter for letter, option in zip(LETTERS, listed, strict=False) if wanted and spell(option) == wanted
        ]
        if len(letters) > 1:
            raise RowError(f"answer {answer!r} matches the options {' and '.join(letters)}")
        if letters:
            return letters[0]
    raise RowError(f"answer {answer!r} is none of the options {', '.join(map(repr, listed))}")


def _bare(value: str) -> str:
    """Without blanks, quotes, brackets and stops; what makes a number another one (1.5, -5, <5, HER2+) stays."""
    return re.sub(r"[\s'\"’‘“”()!?;:]|[.,](?!\d)", "", value).casefold()


def read_answer(answer: str, options: Sequence[str]) -> str:
    """Letter meant by ``answer``: an option's text, a letter (``C``, ``(c)``, ``C.``), or a letter and its text."""
    inner = answer_text(answer)
    try:
        return letter_of(inner, options)
    except RowError as error:
        letter = _letter(inner, options)
        if letter:
            return letter
        both = _PREFIX.match(inner)
        if both and letter_of(inner[both.end() :], options) == both[1].upper():
            return both[1].upper()
        if inner.isdecimal():
            raise RowError(f"{error}; a number is not read as an option's place: write a letter or a text") from error
        raise error


def read_letter(answer: str, options: Sequence[str]) -> str:
    """The same for a field that holds letters: ``A`` is the first option even where another one is called ``A``."""
    return _letter(answer_text(answer), options) or read_answer(answer, options)


def _letter(inner: str, options: Sequence[str]) -> str | None:
    alone = _LETTER_ANSWER.fullmatch(inner)
    return alone[1].upper() if alone and alone[1].upper() in LETTERS[: len(options)] else None


def answer_items(row: dict[str, Any], *names: str) -> list[str]:
    """The answer, or the several answers, in the first of the fields ``names`` that the row has.

    A list, a list written in a string, or one value; true and false are yes and no.
    """
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise RowError(f"missing field {' or '.join(names)}")
    value = row[name]
    if isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]"):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):  # then: a text in brackets
            value = ast.literal_eval(value.strip())
    items = value if isinstance(value, list | tuple) and value else [value]
    words = [("yes" if item else "no") if isinstance(item, bool) else item for item in items]
    return [answer_text(text({name: item}, name)) for item in words]


def answer_text(answer: str) -> str:
    """What stands in ``<answer>`` tags, or all of it where there are none, stripped."""
    tagged = _TAGGED.search(answer)
    return (tagged[1] if tagged else answer).strip()


def reasoning_text(answer: str) -> str | None:
    """What stands in ``<think>`` tags; None where there are none, or nothing in them."""
    thought = _THOUGHT.search(answer)
    return (thought[1].strip() or None) if thought else None


def normal(value: str) -> str:
    """White space made one blank."""
    return " ".join(value.split())
