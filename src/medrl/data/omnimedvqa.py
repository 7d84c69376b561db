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

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medrl.data.omnimed_names import DATASETS, MODALITIES
from medrl.data.readers.fields import check_options, fields_of, letter_of, text
from medrl.data.readers.pictures import Pictures
from medrl.data.readers.result import AbsentImages, BadRow, ImportResult, check_bad, collect
from medrl.data.readers.rows import Row, RowError, Rows, rows_of_files
from medrl.data.store import counts
from medrl.errors import DataError, SettingsError
from medrl.types import LETTERS, Example

__all__ = [
    "CITATION",
    "LICENSE",
    "MODALITIES",
    "SOURCE",
    "AbsentImages",
    "BadRow",
    "ImportResult",
    "check_bad",
    "counts",
    "read_omnimedvqa",
]

SOURCE = "OmniMedVQA"
CITATION = "Hu et al., OmniMedVQA, CVPR 2024, arXiv 2402.09181"
LICENSE = "a collection: each data set in it has its own terms, several are non-commercial"

_TEXT_FIELDS = ("dataset", "question_id", "question_type", "question", "gt_answer")
_MOST_NAMES = 8


def read_omnimedvqa(
    root: Path,
    pictures: Pictures | None = None,
    *,
    datasets: Sequence[str] = (),
    modalities: Sequence[str] = (),
    quiet: bool = True,
) -> ImportResult:
    """All questions under ``root``, file by file in the order of their names.

    A question that cannot be used is listed as bad with file, position and reason. Questions of restricted-access files
    whose images are not here are read, checked and counted as absent.

    Args:
        pictures: how images are found and checked; by default under ``root``.
        datasets: only these files, named as they are but for case, blanks and punctuation; empty for all.
        modalities: only questions of these, by our names or theirs; empty for all.
        quiet: no progress bar.

    Raises:
        DataError: ``root`` is not laid out as OmniMedVQA.
        SettingsError: it has no such data set.
    """
    root = Path(root)
    pictures = pictures or Pictures(root, root)
    files = _chosen_files(root, datasets)
    wanted = {_key(MODALITIES.get(name, name)) for name in modalities}
    absent: Counter[Path] = Counter()

    def convert(row: Row) -> Example | None:
        example, image = _to_example(row)
        if wanted and _key(example.modality) not in wanted:
            return None
        if row.file.parent.name == _RESTRICTED and not pictures.is_here(image):
            absent[row.file] += 1
            return None
        return replace(example, images=pictures.find(image))

    rows = rows_of_files(files, root)
    result = collect(rows, convert, quiet=quiet)
    result.absent.extend(AbsentImages(file, questions) for file, questions in absent.items())
    if not datasets and not modalities:
        result.notes.extend(_compare_with_known(rows))
    return result


_OPEN, _RESTRICTED = "Open-access", "Restricted-access"


def _chosen_files(root: Path, datasets: Sequence[str]) -> list[Path]:
    folder = root / "QA_information"
    files = [
        path
        for access in (_OPEN, _RESTRICTED)
        for path in sorted((folder / access).glob("*.json"))
        if not path.name.startswith(".")
    ]
    if not files:
        raise DataError(
            f"{root} is not OmniMedVQA: it has no QA_information/{_OPEN}/*.json; "
            "give the folder that OmniMedVQA.zip unpacks to"
        )
    if not datasets:
        return files
    names = {_key(file.stem): file.stem for file in files}
    for name in datasets:
        if _key(name) not in names:
            near = difflib.get_close_matches(_key(name), names, n=3, cutoff=0.4) or sorted(names)[:_MOST_NAMES]
            raise SettingsError(f"{root} has no data set {name!r}; it has {', '.join(names[key] for key in near)}, ...")
    chosen = {_key(name) for name in datasets}
    return [file for file in files if _key(file.stem) in chosen]


def _compare_with_known(rows: Rows) -> list[str]:
    """How the files that are here differ from the 42 that were published."""
    here = {name.stem: count for name, count, _ in rows.parts if name.parent.name == _OPEN}
    known = {name: sum(sizes.values()) for name, sizes in DATASETS.items()}
    missing = [name for name in known if name not in here]
    if len(missing) == len(known):
        return ["none of OmniMedVQA's 42 open-access files is here: this is another data set in its layout"]
    notes = [
        f"{name}.json has {here[name]} questions; the published file has {known[name]}"
        for name in known
        if name in here and here[name] != known[name]
    ]
    if missing:
        notes.append(f"{len(missing)} of the 42 published open-access files are not here: {', '.join(missing)}")
    return notes


def _to_example(place: Row) -> tuple[Example, str]:
    """The example without its image, and the image's path."""
    row = fields_of(place.value)
    values = {name: text(row, name) for name in _TEXT_FIELDS}
    modality = text(row, "modality" if "modality" in row and "modality_type" not in row else "modality_type")
    options = _options(row)
    target = letter_of(values["gt_answer"], options)
    example = Example(
        id=f"{values['dataset']}/{values['question_id']}",
        source=values["dataset"],
        images=(),
        question=values["question"],
        options=check_options(options, target),
        target=target,
        modality=MODALITIES.get(modality, modality),
        question_type=values["question_type"],
    )
    text(row, "image_path")
    return example, row["image_path"]


def _options(row: dict[str, Any]) -> tuple[str, ...]:
    names = [f"option_{letter}" for letter in LETTERS]
    present = [name for name in names if row.get(name) is not None]
    expected = names[: max(2, len(present))]
    for name in expected:
        if name not in present:
            raise RowError(f"missing field {name}")
        if not isinstance(row[name], str):
            raise RowError(f"field {name} is {row[name]!r}, not text")
    return tuple(text(row, name) for name in expected)


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())
