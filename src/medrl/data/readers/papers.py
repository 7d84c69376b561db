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

from dataclasses import replace
from pathlib import Path
from typing import Any

from medrl.data.readers.fields import check_options, fields_of, option_list, read_answer, read_letter, text, text_or
from medrl.data.readers.inline import split_inline
from medrl.data.readers.names import UNKNOWN, domains_of, modality_of, modality_of_image, source_of_image
from medrl.data.readers.pictures import Pictures
from medrl.data.readers.result import ImportResult, collect
from medrl.data.readers.rows import Row, RowError, rows_of
from medrl.types import Example

MEDVLM_R1_TEST = (("MRI", 300), ("CT", 300), ("X-Ray", 300))
"""Modalities of the released test file's rows, in order."""


def read_med_r1(path: Path, pictures: Pictures, *, split: str | None = None, quiet: bool = True) -> ImportResult:
    """Med-R1's split file at ``path``, all of a folder's, or a set that was saved to disk for its trainer.

    Raises:
        DataError: there is no such file.
    """
    rows = rows_of(path, "split files of Med-R1", split)
    return collect(rows, lambda row: _med_r1(row, path, pictures), quiet=quiet)


def _med_r1(place: Row, path: Path, pictures: Pictures) -> Example:
    row = fields_of(place.value)
    question, options = split_inline(text(row, "problem"))
    target = read_letter(text(row, "solution"), options)
    cell = _first_text(row)
    modality, question_type = domains_of(_named(path, place))
    return Example(
        id=place.id,
        source=source_of_image(cell),
        images=_images(row, pictures),
        question=question,
        options=check_options(options, target),
        target=target,
        modality=modality if modality != UNKNOWN else modality_of_image(cell),
        question_type=question_type,
    )


def read_medvlm_r1(path: Path, pictures: Pictures, *, split: str | None = None, quiet: bool = True) -> ImportResult:
    """MedVLM-R1's file at ``path``, or HuatuoGPT-Vision's evaluation rows that it was drawn from.

    Raises:
        DataError: there is no such file.
    """
    rows = rows_of(path, "questions of MedVLM-R1", split)
    order = [modality for modality, count in MEDVLM_R1_TEST for _ in range(count)]
    modalities = order if len(rows) == len(order) else []

    def convert(row: Row) -> Example:
        example = _medvlm_r1(row, pictures)
        in_turn = modalities[row.position] if modalities else domains_of(_named(path, row))[0]
        return example if example.modality != UNKNOWN else replace(example, modality=in_turn)

    return collect(rows, convert, quiet=quiet)


def _medvlm_r1(place: Row, pictures: Pictures) -> Example:
    row = fields_of(place.value)
    if row.get("options") is not None:
        options = option_list(row["options"])
        question = text_or(row, "", "question") or split_inline(text(row, "problem"))[0]
    else:
        question, options = split_inline(text(row, "problem"))
    target = _target(row, options)
    return Example(
        id=place.id,
        source=text_or(row, "MedVLM-R1", "dataset"),
        images=_images(row, pictures),
        question=question,
        options=check_options(options, target),
        target=target,
        modality=modality_of(text_or(row, "", "subset")),
    )


def _target(row: dict[str, Any], options: tuple[str, ...]) -> str:
    """The letter in ``solution``, when the text in ``answer`` agrees; either may be missing, or hold the other."""
    if row.get("solution") is None:
        return read_answer(text(row, "answer"), options)
    target = read_letter(text(row, "solution"), options)
    if row.get("answer") is not None and read_answer(text(row, "answer"), options) != target:
        raise RowError(f"solution {target} is {options[ord(target) - ord('A')]!r}, but answer is {row['answer']!r}")
    return target


# --- pictures and names ----------------------------------------------------------------------------------------------


def _named(path: Path, place: Row) -> Path:
    """The file as it is named, with the folder that it lies in or that was asked for."""
    return Path((path if path.is_dir() else path.absolute().parent).name, place.file)


def _images(row: dict[str, Any], pictures: Pictures) -> tuple[Path, ...]:
    cells = _cell(row)
    return tuple(
        path
        for cell in (cells if isinstance(cells, list | tuple) else [cells])
        for path in pictures.find(_spelled(cell, pictures) if isinstance(cell, str) else cell)
    )


def _spelled(cell: str, pictures: Pictures) -> str:
    """``cell`` as the picture is called below the root: what stands before ``Images/`` was another machine's root."""
    plain = _below_images(cell)
    inner = plain.split("/", 1)[1] if "/" in plain else plain
    for spelling in (cell, plain, inner, f"Images/{inner}", f"images/{inner}"):
        try:
            if pictures.is_here(spelling):
                return spelling
        except RowError:  # another machine's root is no path here; the next spelling does without it
            continue
    return pictures.by_name(plain.rsplit("/", 1)[-1]) or cell


def _below_images(cell: str) -> str:
    parts = cell.replace("\\", "/").split("/")
    folded = [part.casefold() for part in parts]
    return "/".join(parts[folded.index("images") :]) if "images" in folded else cell


def _first_text(row: dict[str, Any]) -> str:
    cell = _cell(row)
    first = cell[0] if isinstance(cell, list) and cell else cell
    return _below_images(first) if isinstance(first, str) else ""


def _cell(row: dict[str, Any]) -> Any:
    cell = next((row[name] for name in ("image", "images", "image_path") if row.get(name)), None)
    if cell is None:
        raise RowError("missing field image")
    return cell
