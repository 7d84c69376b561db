"""A folder of images whose sub-folders are labels -> multiple-choice questions, by templates."""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from medrl.data.readers.pictures import Pictures
from medrl.data.readers.result import ImportResult, collect
from medrl.data.readers.rows import Row, RowError, Rows
from medrl.data.scan_files import scan_kind
from medrl.data.store_images import Names, digest_file
from medrl.errors import DataError, SettingsError
from medrl.types import LETTERS, Example

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".dcm", ".nii", ".gz")
QUESTIONS = ("Which of these does the image show?",)


def read_folder(
    root: Path,
    pictures: Pictures,
    *,
    questions: Sequence[str] = QUESTIONS,
    modality: str = "unknown",
    question_type: str = "unknown",
    n_options: int = 4,
    seed: int = 0,
    ids: Names = "keep",
    quiet: bool = True,
) -> ImportResult:
    """One question per image under ``root/<label>/``, at any depth; blanks for ``_`` in the label.

    The wording, the wrong options and the order of the options are drawn for each image from the seed and the image's
    path, so that adding images changes no other question. Right answers come out balanced over the letters, about.

    Args:
        questions: wordings; ``{modality}`` in them is filled in.
        n_options: at most this many, the right one included.
        ids: an id is the image's path below ``root``, or ``digest``: its label and a digest of its bytes.

    Raises:
        DataError: there are fewer than two labels with images.
    """
    unknown = {name for question in questions for name in re.findall(r"\{(.*?)\}", question)} - {"modality"}
    if unknown:
        raise SettingsError(f"--question has {{{sorted(unknown)[0]}}}, but only {{modality}} can be filled in")
    labels = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    files = {label.name: sorted(_images(label)) for label in labels}
    files = {name: found for name, found in files.items() if found}
    if len(files) < 2:
        raise DataError(
            f"{root} has {len(files)} sub-folders with images, and a choice needs two: {root}/LABEL/IMAGE.png"
        )
    names = {name: " ".join(name.replace("_", " ").split()) for name in files}
    copies: Counter[str] = Counter()

    def convert(row: Row) -> Example:
        label, file = row.value
        relative = file.relative_to(root).as_posix()
        draw = random.Random(hashlib.sha256(f"{seed} {relative}".encode()).digest())
        wrong = sorted({text for text in names.values() if text.casefold() != names[label].casefold()})
        if not wrong:
            raise RowError("there is no other label")
        options = [names[label], *draw.sample(wrong, min(len(wrong), n_options - 1))]
        draw.shuffle(options)
        images = pictures.find(relative)
        # The name of a scan may be a patient's; that of its picture is a digest.
        id = f"{label}/{images[0].stem}" if scan_kind(file) else relative
        if ids == "digest":
            id = f"{label}/{digest_file(file)[:16]}"
            copies[id] += 1
            id += f"-{copies[id]}" if copies[id] > 1 else ""
        return Example(
            id=id,
            source=root.resolve().name,
            images=images,
            question=draw.choice(list(questions)).replace("{modality}", modality),
            options=tuple(options),
            target=LETTERS[options.index(names[label])],
            modality=modality,
            question_type=question_type,
        )

    rows = Rows([(Path(name), len(found), [(name, file) for file in found]) for name, found in files.items()])
    return collect(rows, convert, quiet=quiet)


def _images(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
