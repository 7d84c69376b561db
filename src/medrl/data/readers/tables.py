"""Anybody's table: CSV, TSV, JSON, JSON Lines, Parquet or a hub data set, with a mapping of column names."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from medrl.data.readers.fields import (
    YES_NO,
    answer_items,
    check_options,
    fields_of,
    normal,
    option_list,
    read_answer,
    read_letter,
    text,
    text_or,
)
from medrl.data.readers.inline import split_inline
from medrl.data.readers.pictures import Pictures
from medrl.data.readers.result import ImportResult, collect
from medrl.data.readers.rows import Row, RowError, Rows
from medrl.errors import DataError, SettingsError
from medrl.types import KINDS, LETTERS, Example, Kind, find_kind

COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ("id", "question_id"),
    "image": ("image", "images", "image_path", "file_name"),
    "question": ("question", "problem"),
    "options": ("options", "choices"),
    "answer": ("answer", "target", "solution", "gt_answer", "label"),
    "modality": ("modality", "modality_type"),
    "question_type": ("question_type",),
    "source": ("source", "dataset"),
    "patient": ("patient", "patient_id"),
    "kind": ("kind",),
    "tolerance": ("tolerance",),
    "references": ("references",),
    "rationale": ("rationale", "reasoning", "explanation"),
}
"""Ours -> the names under which it is looked for when no mapping names one, in any case and with blanks or hyphens for
``_``."""
_NEEDED = ("image", "question", "answer")
_YES_NO_WORDS = {"yes": "yes", "true": "yes", "1": "yes", "no": "no", "false": "no", "0": "no"}
"""How tables write yes and no where the kind says that it is one of them."""
LETTER = re.compile(r"\(?[A-Ja-j][).:]?")
"""An answer that is the letter of an option."""
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def parse_mapping(pairs: Sequence[str]) -> dict[str, str]:
    """``["question=Frage"]`` -> ``{"question": "Frage"}``.

    Raises:
        SettingsError: not of that form, or no field of ours; names the near ones.
    """
    mapping = {}
    allowed = [*COLUMNS, *(f"option_{letter}" for letter in LETTERS)]
    for pair in pairs:
        ours, sign, theirs = pair.partition("=")
        if not sign or not theirs.strip():
            raise SettingsError(f"--map {pair!r} must be OURS=THEIRS, e.g. question=Frage")
        if ours not in allowed:
            near = difflib.get_close_matches(ours, allowed, n=3, cutoff=0.4) or list(COLUMNS)
            raise SettingsError(f"--map {pair!r}: medrl has no field {ours!r}; it has {', '.join(near)}")
        mapping[ours] = theirs.strip()
    return mapping


def read_table(
    rows: Rows,
    pictures: Pictures,
    mapping: Mapping[str, str],
    *,
    source: str,
    pseudonym: Callable[[str], str],
    quiet: bool = True,
) -> ImportResult:
    """The rows of a table as examples.

    A row has an image (or several: a list, or ``a.png|b.png``), a question and an answer. Options are a list, a list
    in a string, ``x|y|z``, ``A) x, B) y``, or columns ``option_A``, ``option_B``...; the answer is then a letter or an
    option's text. Without options it is yes or no, or a few words; a column ``kind`` says otherwise. Several right
    options are a list, a list in a string, or ``A, C``; a box is four numbers.

    Args:
        mapping: ours -> the table's column, see ``COLUMNS``.
        source: name of the data set where no column has it.
        pseudonym: patient as the table has it -> what may be stored.

    Raises:
        SettingsError: the mapping names a column that the first row does not have, or no column is known.
        DataError: there are no rows.
    """
    columns = {ours: (mapping[ours],) if ours in mapping else names for ours, names in COLUMNS.items()}
    columns |= {
        f"option_{x}": (mapping[f"option_{x}"],) if f"option_{x}" in mapping else _option_names(x) for x in LETTERS
    }
    if len(rows) == 0:
        raise DataError(f"{', '.join(str(name) for name, _, _ in rows.parts)} has no rows")
    seen: dict[str, None] = {}
    plain: dict[str, Any] = {}

    def convert(row: Row) -> Example:
        if not seen:
            _check_mapping(mapping, fields_of(row.value))
        seen.update(dict.fromkeys(fields_of(row.value)))
        plain.update(_with_plain_names(row.value))
        return _table_row(row, columns, pictures, source, pseudonym)

    result = collect(rows, convert, quiet=quiet)
    missing = [ours for ours in _NEEDED if seen and not any(name in plain for name in columns[ours])]
    if missing and not result.examples:
        raise SettingsError(
            f"no column is known to hold {', '.join(missing)}; it has {', '.join(map(str, seen))}: name them, "
            + " ".join(f"--map {ours}=COLUMN" for ours in missing)
        )
    return result


def _option_names(letter: str) -> tuple[str, ...]:
    return tuple(
        f"{word}{x}" for x in (letter, letter.lower()) for word in ("option_", "option ", "Option ", "opt_", "")
    )


def _check_mapping(mapping: Mapping[str, str], row: dict[str, Any]) -> None:
    missing = [theirs for theirs in mapping.values() if theirs not in row]
    if missing:
        raise SettingsError(f"the table has no column {missing[0]!r}; it has {', '.join(map(str, row))}")


def _table_row(
    place: Row,
    columns: Mapping[str, tuple[str, ...]],
    pictures: Pictures,
    source: str,
    pseudonym: Callable[[str], str],
) -> Example:
    row = _with_plain_names(fields_of(place.value))
    patient = text_or(row, "", *columns["patient"])
    question, form = _asked(text(row, *columns["question"]), row, columns)
    return Example(
        id=text_or(row, place.id, *columns["id"]),
        source=text_or(row, source, *columns["source"]),
        images=pictures.find(_image_cell(row, columns["image"])),
        question=question,
        modality=text_or(row, "unknown", *columns["modality"]),
        question_type=text_or(row, "unknown", *columns["question_type"]),
        patient=pseudonym(patient) if patient else None,
        rationale=text_or(row, "", *columns["rationale"]) or None,
        **form,
    )


def _with_plain_names(row: dict[str, Any]) -> dict[str, Any]:
    """The row with each field also under its name in small letters with ``_`` between, where that name is free."""
    plain = {re.sub(r"[\s-]+", "_", str(name).strip().casefold()): value for name, value in row.items()}
    return plain | row


def _asked(question: str, row: dict[str, Any], columns: Mapping[str, tuple[str, ...]]) -> tuple[str, dict[str, Any]]:
    """The question, without the options that may stand in it, and the kind, options and target of its answer."""
    kind = text_or(row, "", *columns["kind"])
    known = find_kind(kind) if kind else None
    if kind and known is None:
        raise RowError(f"kind is {kind!r}; the kinds are {', '.join(KINDS)}")
    answers = answer_items(row, *columns["answer"])
    references = answer_items(row, *columns["references"]) if _cell(row, columns["references"]) is not None else ()
    options = _options(row, columns)
    if known in (None, "choice") and not options and len(answers) == 1 and LETTER.fullmatch(answers[0].strip()):
        try:
            question, options = split_inline(question)
        except RowError as error:
            raise RowError(
                f"answer {answers[0]!r} is a letter, but no column holds options: name them with --map options=COLUMN "
                f"or --map option_A=COLUMN ..., or say what it is in a column kind; and the question {error}"
            ) from error
        target = read_letter(answers[0], options)
        return question, {"kind": "choice", "options": check_options(options, target), "target": target}
    form = answer_form(options, answers, known, text_or(row, "", *columns["tolerance"]))
    more = {"references": (*form.get("references", ()), *references)} if form["kind"] == "short" else {}
    return question, form | more


def answer_form(
    options: tuple[str, ...], answers: Sequence[str], kind: Kind | None = None, tolerance: str = ""
) -> dict[str, Any]:
    """Kind, options and target that options and answers make; ``kind`` None: as they look.

    Args:
        answers: one; or several right options, the sides of a box, or a few words and other words as right as those.

    Raises:
        RowError: they do not fit each other.
    """
    first, *others = answers
    plain = normal(first).casefold().rstrip(".")
    kind = kind or (
        ("multi_select" if others else "choice") if options else "yes_no" if plain in YES_NO and not others else "short"
    )
    if kind == "multi_select":
        items = answers if others else re.split(r"[,;|]", first)
        letters = sorted({read_answer(item, options) for item in items})
        return {"kind": kind, "options": check_options(options, letters[0]), "target": ", ".join(letters)}
    if kind == "box":
        return {"kind": kind, "options": (), "target": _box(", ".join(answers))}
    if kind == "short":
        return {"kind": kind, "options": (), "target": first, "references": tuple(others)}
    if others:
        raise RowError(f"{len(answers)} answers, but a question of kind {kind} has one")
    if kind == "choice":
        target = read_answer(first, options)
        return {"kind": kind, "options": check_options(options, target), "target": target}
    if kind == "yes_no":
        if plain not in _YES_NO_WORDS:
            raise RowError(f"answer {first!r} is neither yes nor no")
        return {"kind": kind, "options": (), "target": _YES_NO_WORDS[plain]}
    if not _NUMBER.search(first):
        raise RowError(f"answer {first!r} is no number; a numeric answer is one number and its unit, e.g. '3.5 cm'")
    return {"kind": kind, "options": (), "target": first, "tolerance": tolerance}


def _box(written: str) -> str:
    """``x1, y1, x2, y2`` of a box in any writing with four numbers."""
    sides = [float(number) for number in _NUMBER.findall(written)]
    if len(sides) != 4 or sides[0] >= sides[2] or sides[1] >= sides[3]:
        raise RowError(f"answer {written!r} is no box: four numbers, left, top, right, bottom, with an area between")
    return ", ".join(f"{side:g}" for side in sides)


def _options(row: dict[str, Any], columns: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    whole = _cell(row, columns["options"])
    if whole is not None:
        return option_list(whole)
    values = [_cell(row, columns[f"option_{x}"]) for x in LETTERS]
    count = max((i + 1 for i, value in enumerate(values) if value is not None), default=0)
    if None in values[:count]:
        raise RowError(f"missing field option_{LETTERS[values.index(None)]}")
    return option_list(values[:count]) if count else ()


def _cell(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "", [])), None)


def _image_cell(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    cell = next((row[name] for name in names if row.get(name)), None)
    if cell is None:
        raise RowError(f"missing field {' or '.join(names)}")
    if isinstance(cell, str) and cell.startswith("["):
        return list(option_list(cell))
    return cell.split("|") if isinstance(cell, str) and "|" in cell else cell
