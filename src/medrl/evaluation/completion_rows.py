"""Rows of completions from other programs -> Example and Completion.

One JSON object a line: ``completion``, ``target``, and where they apply ``options``, ``kind`` (default ``choice``),
``mode`` (default ``think``), ``tolerance``, ``references``, ``question`` and ``id``. Other columns are ignored.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from typing import Any

from medrl.errors import DataError
from medrl.rewards.closed import read_multi_select, read_yes_no
from medrl.rewards.parse import read_choice
from medrl.types import KINDS, LETTERS, MODES, Completion, Example, Kind, Mode, find_kind

COLUMNS = ("completion", "options", "target", "kind", "mode")


def without_mark(line: str | bytes) -> str | bytes:
    """The line without the byte-order mark that some programs begin a file with."""
    return line.removeprefix("\ufeff") if isinstance(line, str) else line.removeprefix(BOM_UTF8)


def parse_row(line: str | bytes, place: str) -> Mapping[str, Any]:
    """The JSON object on a line. Raises ``DataError`` naming ``place`` when it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{place} is no object; a row has {', '.join(COLUMNS)}")
    return row


def read_row(row: Mapping[str, Any], place: str) -> tuple[Example, Completion]:
    """What a row holds. Raises ``DataError`` naming ``place`` for a row that makes no sense."""
    missing = sorted({"completion", "target"} - row.keys())
    if missing:
        raise DataError(f"{place} has no {' and no '.join(missing)}; a row has {', '.join(COLUMNS)}")
    return _example_of(row, place), _completion_of(row, place)


def _completion_of(row: Mapping[str, Any], place: str) -> Completion:
    # Programs write null where a model wrote nothing: an empty completion, which is graded as one.
    text = "" if row["completion"] is None else row["completion"]
    if not isinstance(text, str):
        raise DataError(f"{place} has a completion that is no text: {text!r:.60}")
    return Completion(text=text, token_ids=(), finish_reason="stop", mode=_mode_of(row.get("mode") or "think", place))


def _mode_of(name: Any, place: str) -> Mode:
    plain = str(name).strip().casefold().replace("-", "_").replace(" ", "_")
    for mode in MODES:
        if plain == mode:
            return mode
    raise DataError(f"{place} has mode {name!r}; the modes are {', '.join(MODES)}")


def _example_of(row: Mapping[str, Any], place: str) -> Example:
    kind = find_kind(str(row.get("kind") or "choice"))
    if kind is None:
        raise DataError(f"{place} has kind {row['kind']!r}; the kinds are {', '.join(KINDS)}")
    options = _options_of(row.get("options"), place)
    references = row.get("references") or ()
    if not isinstance(references, list | tuple | str):
        raise DataError(f"{place} has references that are no list of texts: {references!r:.80}")
    return Example(
        id=str(row.get("id", place)),
        source=str(row.get("source", "")),
        images=(),
        question=str(row.get("question") or ""),
        options=options,
        target=_target_of(row["target"], kind, options, place),
        kind=kind,
        references=tuple(map(str, [references] if isinstance(references, str) else references)),
        tolerance="" if row.get("tolerance") is None else str(row["tolerance"]),
    )


def _options_of(given: Any, place: str) -> tuple[str, ...]:
    """Texts in the order of their letters; other programs write an object of letter and text, or numbers."""
    options = given or ()
    if isinstance(options, dict):
        texts = {str(letter).strip(" ().").upper(): text for letter, text in options.items()}
        letters = LETTERS[: len(options)]
        if sorted(texts) != list(letters):
            raise DataError(
                f"{place} has options called {', '.join(map(str, options))}; call them {', '.join(letters)}, or give a "
                "list of texts"
            )
        options = [texts[letter] for letter in sorted(texts)]
    numbers_or_texts = isinstance(options, list | tuple) and all(
        isinstance(option, str | int | float) and not isinstance(option, bool) for option in options
    )
    if not numbers_or_texts:
        raise DataError(f"{place} has options that are no list of texts: {options!r:.80}")
    return tuple(map(str, options))


def _target_of(target: Any, kind: Kind, options: Sequence[str], place: str) -> str:
    """The target in our form: other programs write lists, numbers, small letters, or the right option's text."""
    parts = target if isinstance(target, list | tuple) else [target]
    if target is None or None in parts:
        raise DataError(f"{place} has a target that is null; a target is the right answer")
    if kind == "multi_select" and len(parts) == 1:
        listed, _ = read_multi_select(str(parts[0]), options)
        return listed or str(parts[0])
    parts = [_one_target(part, kind, options) for part in parts]
    return ", ".join(sorted(parts) if kind == "multi_select" else parts)


def _one_target(target: Any, kind: Kind, options: Sequence[str]) -> str:
    text = str(target).strip()
    if kind in ("choice", "multi_select"):
        index, _ = read_choice(text, options)  # "C) CT", "(c)" and "ct" mean what they mean in an answer
        return text if index is None else LETTERS[index]
    if kind == "yes_no":
        return read_yes_no(text, options)[0] or text
    return text
