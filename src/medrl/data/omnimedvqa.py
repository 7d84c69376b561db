"""OmniMedVQA -> Examples.

    root/QA_information/Open-access/<dataset>.json        a list of questions; their images are shipped
    root/QA_information/Restricted-access/<dataset>.json  the same, but the images must be got from their owners
    root/Images/<dataset>/...                             ``image_path`` of a question is relative to root

Hu et al., "OmniMedVQA: A New Large-Scale Comprehensive Evaluation Benchmark for Medical LVLM", CVPR 2024,
arXiv 2402.09181.
Data: https://huggingface.co/datasets/foreverbeliever/OmniMedVQA (88,996 open-access questions in 42 files).

License: a collection of 73 data sets, each under its own terms, several for research or non-commercial use only.
Whoever uses it must look up the terms of the data sets used.

Known oddities, all handled here: options C and D are absent, not null, where a question has fewer; one question has the
key ``modality`` for ``modality_type``; modality names carry their typos (``Mag-netic``, a bracket never closed); file
names have blanks, ``&`` and brackets; the answer is the text of the right option, not its letter; no patients.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medrl.data.store import counts, safe_path
from medrl.errors import DataError
from medrl.types import LETTERS, Example

__all__ = [
    "CITATION",
    "LICENSE",
    "MODALITIES",
    "SOURCE",
    "BadRow",
    "ImportResult",
    "check_bad",
    "counts",
    "read_omnimedvqa",
]

SOURCE = "OmniMedVQA"
CITATION = "Hu et al., OmniMedVQA, CVPR 2024, arXiv 2402.09181"
LICENSE = "a collection: each data set in it has its own terms, several are non-commercial"

MODALITIES = {
    "CT(Computed Tomography)": "CT",
    "MR (Mag-netic Resonance Imaging)": "MRI",
    "X-Ray": "X-Ray",
    "ultrasound": "Ultrasound",
    "Dermoscopy": "Dermoscopy",
    "Fundus Photography": "Fundus",
    "OCT (Optical Coherence Tomography": "OCT",
    "Microscopy Images": "Microscopy",
}
"""OmniMedVQA's names -> ours; a name that is not listed is kept as it is."""

_TEXT_FIELDS = ("dataset", "question_id", "question_type", "question", "gt_answer", "image_path")


@dataclass(frozen=True, slots=True)
class BadRow:
    """A question that could not be used."""

    file: Path
    position: int
    """Place in the file's list, from 0; -1 when it is the whole file."""
    reason: str

    def __str__(self) -> str:
        place = "the whole file" if self.position < 0 else f"row {self.position}"
        return f"{self.file}, {place}: {self.reason}"


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A restricted-access file none of whose images is here: not bad, but not imported either."""

    file: Path
    questions: int


@dataclass(frozen=True, slots=True)
class ImportResult:
    """What was read, and what was not."""

    examples: list[Example]
    bad: list[BadRow]
    skipped: list[SkippedFile] = field(default_factory=list)


class _BadRowError(ValueError):
    """Why a row is bad; caught where its file and position are known."""


def read_omnimedvqa(root: Path) -> ImportResult:
    """All questions under ``root``, file by file in the order of their names.

    A question that cannot be used is listed as bad with file, position and reason. A restricted-access file none of
    whose images is present is listed as skipped.

    Raises:
        DataError: ``root`` is not laid out as OmniMedVQA.
    """
    root = Path(root)
    folder = root / "QA_information"
    files = [
        path
        for access in ("Open-access", "Restricted-access")
        for path in sorted((folder / access).glob("*.json"))
        if not path.name.startswith(".")
    ]
    if not files:
        raise DataError(
            f"{root} is not OmniMedVQA: it has no QA_information/Open-access/*.json; "
            "give the folder that OmniMedVQA.zip unpacks to"
        )
    result = ImportResult([], [], [])
    ids: set[str] = set()
    for file in files:
        _read_file(root, file, ids, result)
    return result


def check_bad(result: ImportResult, max_bad_fraction: float = 0.001) -> None:
    """Pass when at most ``max_bad_fraction`` of the questions are bad; an unreadable file passes only at 1.0.

    Raises:
        DataError: too much is bad; shows all bad rows.
    """
    total = len(result.bad) + len(result.examples)
    whole_files = any(row.position < 0 for row in result.bad)
    fraction = 1.0 if whole_files else len(result.bad) / total if total else 0.0
    if fraction <= max_bad_fraction:
        return
    shown = "\n".join(f"  {row}" for row in result.bad)
    # The fraction to allow is rounded up, so that the advice works when it is followed.
    allowance = 1.0 if whole_files else min(1.0, max(0.05, (int(fraction * 100) + 1) / 100))
    raise DataError(
        f"{len(result.bad)} of {total} rows are bad, more than the {max_bad_fraction:.2%} allowed:\n{shown}\n"
        f"repair the source, or go on without them: --max-bad {allowance:g}"
    )


def _read_file(root: Path, file: Path, ids: set[str], result: ImportResult) -> None:
    name = file.relative_to(root)
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        result.bad.append(BadRow(name, -1, f"not JSON: {error}"))
        return
    if not isinstance(rows, list):
        result.bad.append(BadRow(name, -1, f"holds a {type(rows).__name__}, not a list of questions"))
        return
    if file.parent.name == "Restricted-access" and rows and not any(_has_image(root, row) for row in rows):
        result.skipped.append(SkippedFile(name, len(rows)))
        return
    for position, row in enumerate(rows):
        try:
            example = _to_example(root, row)
            if example.id in ids:
                raise _BadRowError(f"duplicate id {example.id!r}")
        except _BadRowError as error:
            result.bad.append(BadRow(name, position, str(error)))
        else:
            ids.add(example.id)
            result.examples.append(example)


def _has_image(root: Path, row: Any) -> bool:
    try:
        return isinstance(row, dict) and bool(_find_image(root, _text(row, "image_path")))
    except _BadRowError:
        return False


def _to_example(root: Path, row: Any) -> Example:
    if not isinstance(row, dict):
        raise _BadRowError(f"a {type(row).__name__}, not a question with fields")
    values = {name: _text(row, name) for name in _TEXT_FIELDS}
    modality = _text(
        row, "modality_type" if "modality_type" in row else "modality" if "modality" in row else "modality_type"
    )
    options = _options(row)
    return Example(
        id=f"{values['dataset']}/{values['question_id']}",
        source=values["dataset"],
        images=(_find_image(root, values["image_path"]),),
        question=values["question"],
        options=options,
        target=_letter(values["gt_answer"], options),
        modality=MODALITIES.get(modality, modality),
        question_type=values["question_type"],
    )


def _text(row: dict[str, Any], name: str) -> str:
    if name not in row:
        raise _BadRowError(f"missing field {name}")
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise _BadRowError(f"field {name} is {value!r}, not text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _BadRowError(f"field {name} is not valid Unicode text")
    return value if name == "image_path" else value.strip()


def _options(row: dict[str, Any]) -> tuple[str, ...]:
    names = [f"option_{letter}" for letter in LETTERS]
    present = [name for name in names if row.get(name) is not None]
    expected = names[: max(2, len(present))]
    for name in expected:
        if name not in present:
            raise _BadRowError(f"missing field {name}")
    options = tuple(_text(row, name) for name in expected)
    spelled = [_normal(option) for option in options]
    repeated = next((option for option, text in zip(options, spelled, strict=True) if spelled.count(text) > 1), None)
    if repeated is not None:
        raise _BadRowError(f"duplicate options: {repeated!r} occurs {spelled.count(_normal(repeated))} times")
    return options


def _letter(answer: str, options: Iterable[str]) -> str:
    """Letter of the option whose text is ``answer``: as written, else in any case."""
    for spell in (_normal, lambda text: _normal(text).casefold()):
        letters = [letter for letter, option in zip(LETTERS, options, strict=False) if spell(option) == spell(answer)]
        if len(letters) > 1:
            raise _BadRowError(f"answer {answer!r} matches the options {' and '.join(letters)}")
        if letters:
            return letters[0]
    raise _BadRowError(f"answer {answer!r} is none of the options {', '.join(map(repr, options))}")


def _normal(text: str) -> str:
    return " ".join(text.split())


def _find_image(root: Path, relative: str) -> Path:
    try:
        path = safe_path(root, relative)
    except DataError as error:
        raise _BadRowError(str(error)) from error
    if not path.is_file():
        raise _BadRowError(f"image {relative} does not exist")
    return path
