"""The two papers' own files: Med-R1's splits and MedVLM-R1's questions.

Med-R1 (arXiv 2503.13939, Splits/{modality,question_type}/{train,test}/*.json): a list of ``{"image":
"Images/<dataset>/...", "problem": "<question> A)..., B)...", "solution": "<answer> C </answer>"}``. Modality or
question type stand only in the file's name; one file is called ``unknown``. Its authors trained on copies of 384 x 384
pixels.

MedVLM-R1 (arXiv 2502.19634): ``{"image": [...], "problem", "solution": "B", "question", "options": [...], "answer":
"Breast tissue", "dataset", "subset"}``. The released test file has 900 rows: 300 of MRI, 300 of CT, 300 of X-ray, in
this order and without a field that says so. The questions come from OmniMedVQA through HuatuoGPT-Vision's evaluation
data, whose rows (without ``problem`` and ``solution``) are read as well.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medrl.data.omnimed_names import DATASETS, MODALITIES, QUESTION_TYPES
from medrl.data.readers.fields import (
    check_options,
    fields_of,
    letter_of,
    normal,
    option_list,
    read_answer,
    text,
    text_or,
)  # fmt: skip
from medrl.data.readers.inline import split_inline
from medrl.data.readers.pictures import Pictures
from medrl.data.readers.result import ImportResult, collect
from medrl.data.readers.rows import Row, RowError, rows_of
from medrl.types import Example

MEDVLM_R1_TEST = (("MRI", 300), ("CT", 300), ("X-Ray", 300))
"""Modalities of the released test file's rows, in order."""
_SIDE = re.compile(r"[\s_.-]*(train|test|val|validation)(ing)?$", re.IGNORECASE)


def read_med_r1(path: Path, pictures: Pictures, *, split: str | None = None, quiet: bool = True) -> ImportResult:
    """Med-R1's split file at ``path``, or all of a folder's.

    Raises:
        DataError: there is no such file.
    """
    rows = rows_of(path, "split files of Med-R1", split)
    return collect(rows, lambda row: _med_r1(row, pictures), quiet=quiet)


def _med_r1(place: Row, pictures: Pictures) -> Example:
    row = fields_of(place.value)
    question, options = split_inline(text(row, "problem"))
    target = read_answer(text(row, "solution"), options)
    domain = domain_of_file(place.file.name)
    source = _source_of_image(row.get("image"))
    known = DATASETS.get(source, {})
    modality = next(iter(known)) if len(known) == 1 else "unknown"
    return Example(
        id=place.id,
        source=source,
        images=_one_or_more(row, pictures),
        question=question,
        options=check_options(options, target),
        target=target,
        modality=domain if domain in MODALITIES.values() else modality,
        question_type=domain if domain in QUESTION_TYPES else "unknown",
    )


def domain_of_file(name: str) -> str:
    """``CT(Computed Tomography)_train.json`` -> ``CT``, ``Lesion_Grading-test.json`` -> ``Lesion Grading``, else
    ``unknown``. Generous about case, blanks and punctuation, and about our own short names.
    """
    key = _letters(_SIDE.sub("", name.rsplit(".", 1)[0]))
    names = {_letters(theirs): ours for theirs, ours in MODALITIES.items()}
    names |= {_letters(ours): ours for ours in MODALITIES.values()} | {_letters(kind): kind for kind in QUESTION_TYPES}
    return names.get(key, "unknown")


def read_medvlm_r1(path: Path, pictures: Pictures, *, split: str | None = None, quiet: bool = True) -> ImportResult:
    """MedVLM-R1's file at ``path``, or HuatuoGPT-Vision's evaluation rows that it was drawn from.

    Raises:
        DataError: there is no such file.
    """
    rows = rows_of(path, "questions of MedVLM-R1", split)
    order = [modality for modality, count in MEDVLM_R1_TEST for _ in range(count)]
    modalities = order if len(rows) == len(order) else []
    return collect(
        rows, lambda row: _medvlm_r1(row, modalities[row.position : row.position + 1], pictures), quiet=quiet
    )


def _medvlm_r1(place: Row, modality: Sequence[str], pictures: Pictures) -> Example:
    row = fields_of(place.value)
    if row.get("options") is not None:
        question, options = text(row, "question", "problem"), option_list(row["options"])
    else:
        question, options = split_inline(text(row, "problem"))
    if row.get("solution") is not None:
        target = read_answer(text(row, "solution"), options)
        if row.get("answer") is not None and not _same(text(row, "answer"), target, options):
            raise RowError(f"solution {target} is {options[ord(target) - ord('A')]!r}, but answer is {row['answer']!r}")
    else:
        target = read_answer(text(row, "answer"), options)
    source = text_or(row, "MedVLM-R1", "dataset")
    subset = text_or(row, "", "subset")
    return Example(
        id=place.id,
        source=source,
        images=_one_or_more(row, pictures),
        question=question,
        options=check_options(options, target),
        target=target,
        modality=modality[0] if modality else domain_of_file(subset + ".") if subset else "unknown",
    )


def _same(answer: str, target: str, options: tuple[str, ...]) -> bool:
    try:
        return target in (normal(answer), letter_of(answer, options))
    except RowError:
        return False


def _one_or_more(row: dict[str, Any], pictures: Pictures) -> tuple[Path, ...]:
    cell = next((row[name] for name in ("image", "images", "image_path") if row.get(name)), None)
    if cell is None:
        raise RowError("missing field image")
    return pictures.find(cell)


def _source_of_image(cell: Any) -> str:
    """Data set that OmniMedVQA's ``Images/<dataset>/...`` names; ``OmniMedVQA`` where it names none."""
    first = cell[0] if isinstance(cell, list) and cell else cell
    parts = [part for part in first.split("/") if part not in ("", ".")] if isinstance(first, str) else []
    parts = parts[1:] if parts[:1] and parts[0].casefold() == "images" else parts
    return parts[0] if len(parts) > 1 else "OmniMedVQA"


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())
