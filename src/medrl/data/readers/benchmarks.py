"""Multiple-choice benchmarks: PMC-VQA, MMMU Health & Medicine, MedXpertQA-MM.

PMC-VQA: Zhang et al., arXiv 2305.10415; hub ``RadGenome/PMC-VQA``. Version 1 and the clean test: Figure_path, Question,
Answer, Choice A..D (``A:...``), Answer_label; version 2: index, Figure_path, Caption, Question, Choices or Choice A..D,
Answer_label or Answer (a letter), split.
MMMU: Yue et al., CVPR 2024, arXiv 2311.16502; hub ``MMMU/MMMU``, five configurations of medicine: id, question with
``<image n>``, options as a Python list in a string, image_1..image_7, answer, question_type, img_type.
MedXpertQA: Zuo et al., arXiv 2501.18362; hub ``TsinghuaC3I/MedXpertQA``, configuration MM: id, question that ends with
``Answer Choices: (A) ...``, options by letter, label, images, medical_task, body_system, question_type.
"""

import ast
import re
from pathlib import Path
from typing import Any

from medrl.data.readers.fields import check_options, fields_of, option_list, read_letter, text, text_or
from medrl.data.readers.pictures import Pictures
from medrl.data.readers.result import ImportResult, collect
from medrl.data.readers.rows import Row, RowError, Rows, hub_rows, rows_of
from medrl.types import LETTERS, Example

MMMU_SUBJECTS = (
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
)
_MMMU_IMAGES = 7
_IMAGE_MARK = re.compile(r"<image (\d+)>")
_CHOICES_IN_QUESTION = re.compile(r"\s*Answer Choices:\s*\(A\).*$", re.DOTALL)


def read_pmc_vqa(path: Path, pictures: Pictures, *, split: str | None = None, quiet: bool = True) -> ImportResult:
    """PMC-VQA from one of its CSV files, a folder of them, or a hub id.

    Raises:
        DataError: there is nothing to read.
    """
    return collect(rows_of(path, "PMC-VQA", split), lambda row: _pmc_vqa(row, pictures), quiet=quiet)


def _pmc_vqa(place: Row, pictures: Pictures) -> Example:
    row = fields_of(place.value)
    cells = {letter: row.get(f"Choice {letter}") for letter in LETTERS}
    lettered = {letter: cell for letter, cell in cells.items() if cell is not None and str(cell).strip()}
    options = option_list(lettered or row.get("Choices"))
    target = read_letter(text(row, "Answer_label", "Answer"), options)
    return Example(
        id=place.id,
        source="PMC-VQA",
        images=pictures.find(text(row, "Figure_path")),
        question=text(row, "Question"),
        options=check_options(options, target),
        target=target,
    )


def read_mmmu(path: Path, pictures: Pictures, *, split: str | None = None, quiet: bool = True) -> ImportResult:
    """The five medical subjects of MMMU from its folder, one of its files, or a hub id.

    Raises:
        DataError: there is nothing to read.
    """
    if path.exists():
        rows = rows_of(path, "MMMU", split).only(*MMMU_SUBJECTS)
    else:
        subjects = [hub_rows(str(path), config=subject, split=split) for subject in MMMU_SUBJECTS]
        rows = Rows([part for subject in subjects for part in subject.parts])
    return collect(rows, lambda row: _mmmu(row, pictures), quiet=quiet)


def _mmmu(place: Row, pictures: Pictures) -> Example:
    row = fields_of(place.value)
    numbers = [n for n in range(1, _MMMU_IMAGES + 1) if row.get(f"image_{n}") is not None]
    images = tuple(path for n in numbers for path in pictures.find(row[f"image_{n}"]))
    question = _with_image_numbers(text(row, "question"), numbers)
    if text_or(row, "multiple-choice", "question_type") == "open":
        target, *references = _alternatives(text(row, "answer"))
        form: dict[str, Any] = {"kind": "short", "options": (), "target": target, "references": tuple(references)}
    elif text(row, "answer") == "?":
        raise RowError("its answer is kept back (?): of MMMU, dev and validation have answers")
    else:
        options = tuple(_with_image_numbers(option, numbers) for option in option_list(row.get("options")))
        target = read_letter(text(row, "answer"), options)
        form = {"options": check_options(options, target), "target": target}
    identity = text(row, "id")
    subject = next((subject for subject in MMMU_SUBJECTS if subject in f"{identity} {place.file}"), "unknown")
    return Example(
        id=identity,
        source="MMMU",
        images=images,
        question=question,
        modality=_alternatives(text_or(row, "unknown", "img_type"))[0],
        question_type=subject.replace("_", " "),
        rationale=text_or(row, "", "explanation") or None,
        **form,
    )


def _with_image_numbers(value: str, numbers: list[int]) -> str:
    """``<image 3>`` -> ``[image 2]`` where the third picture is the second that there is: no control token is left."""

    def place(mark: re.Match[str]) -> str:
        number = int(mark[1])
        if number not in numbers:
            raise RowError(f"its text speaks of image {number}, and there is no image_{number}")
        return f"[image {numbers.index(number) + 1}]"

    return _IMAGE_MARK.sub(place, value)


def _alternatives(value: str) -> list[str]:
    """The strings of a Python list in a string; any other text is its own only one."""
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return [value]
    found = [str(item).strip() for item in parsed if str(item).strip()] if isinstance(parsed, list) else []
    return found or [value]


def read_medxpertqa(path: Path, pictures: Pictures, *, split: str | None = None, quiet: bool = True) -> ImportResult:
    """MedXpertQA-MM from one of its files, a folder of them, or a hub id.

    Raises:
        DataError: there is nothing to read.
    """
    rows = rows_of(path, "MedXpertQA", split, config="MM").only("MM/")
    return collect(rows, lambda row: _medxpertqa(row, pictures), quiet=quiet)


def _medxpertqa(place: Row, pictures: Pictures) -> Example:
    row = fields_of(place.value)
    if not row.get("images"):
        raise RowError("missing field images: it is of MedXpertQA's text part, medrl reads MM")
    options = option_list(row.get("options"))
    target = read_letter(text(row, "label"), options)
    return Example(
        id=text(row, "id"),
        source="MedXpertQA-MM",
        images=pictures.find(row["images"]),
        question=_CHOICES_IN_QUESTION.sub("", text(row, "question")),
        options=check_options(options, target),
        target=target,
        question_type=text_or(row, "unknown", "question_type"),
    )
