"""A folder of DICOM -> questions that the header answers, on pictures without a header.

What is asked, of what passes the gate in ``phi.py``: which modality, which part of the body, which plane. Other
questions come from a table whose image column names the files (``medrl import table --images DIR``), through the same
gate. Pictures are PNG, drawn through a window and named by salted keys; patients are salted keys; the names of files
and folders are not repeated, for they are often the patient's.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medrl.data.gray import chosen_slices
from medrl.data.phi import BODY_PARTS, MODALITIES, PLANES, Facts, facts_of
from medrl.data.pseudonyms import Salt
from medrl.data.readers.pictures import Pictures
from medrl.data.readers.result import BadRow, ImportResult, collect
from medrl.data.readers.rows import Row, Rows
from medrl.data.scan_dicom import read_dicom_header
from medrl.data.scan_files import scan_kind
from medrl.errors import DataError, ImageError
from medrl.types import LETTERS, Example

_N_OPTIONS = 4
_HEAD = ("Head", "Brain", "Skull")
_VOLUMES = ("CT", "MRI")


@dataclass(frozen=True, slots=True)
class _Unit:
    """What one round of questions is about: a file, or the chosen files of a series."""

    files: tuple[Path, ...]
    facts: Facts


def read_dicom(
    root: Path,
    pictures: Pictures,
    salt: Salt,
    *,
    series_slices: str | None = None,
    show_paths: bool = False,
    quiet: bool = True,
) -> ImportResult:
    """Questions on every DICOM file under ``root``, or on some slices of every series.

    Files that are not DICOM are counted in the notes. Bad rows name a file by its number in the order of paths.

    Args:
        pictures: its ``root`` is ``root``.
        series_slices: which files of a series to show, see ``View.slices``; None asks about every file.
        show_paths: name bad files by their path instead.

    Raises:
        DataError: there is no DICOM file.
    """
    everything = sorted(path for path in root.rglob("*") if path.is_file() and path.name != "DICOMDIR")
    files = [path for path in everything if scan_kind(path) == "DICOM"]
    if not files:
        raise DataError(f"{root} holds no DICOM file: give the folder that the export wrote")
    labels = {
        path: path.relative_to(root) if show_paths else Path(f"file-{number:05}") for number, path in enumerate(files)
    }
    facts, bad, without = _headers(files, labels, salt)
    facts, copies, differing = _once(facts, salt)
    units = _units(facts, series_slices)
    failed: set[_Unit] = set()

    def convert(row: Row) -> Example | None:
        unit, ask = row.value
        if unit in failed:
            return None
        try:
            return _question(unit, ask, pictures, root)
        except ImageError:
            failed.add(unit)
            raise

    rows = Rows([(labels[unit.files[0]], len(_ASKED), [(unit, ask) for ask in _ASKED]) for unit in units])
    result = collect(rows, convert, quiet=quiet)
    notes = [
        *_copies(copies, differing),
        *_notes(len(everything) - len(files), without, [unit.facts for unit in units]),
    ]
    return ImportResult(result.examples, bad + result.bad, [], notes)


def _headers(
    files: Sequence[Path], labels: dict[Path, Path], salt: Salt
) -> tuple[dict[Path, Facts], list[BadRow], int]:
    """What passes of each header, what is damaged, and how many files hold no image."""
    facts: dict[Path, Facts] = {}
    bad: list[BadRow] = []
    without = 0
    for path in files:
        try:
            header = read_dicom_header(path)
            if "PixelData" in header or "SOPClassUID" not in header:
                facts[path] = facts_of(path, header, salt)
            elif str(header.get("Modality", "")) in MODALITIES:
                raise ImageError(
                    path, "its header is an image's, but no pixels follow", "it was cut off: fetch it again"
                )
            else:
                without += 1
        except ImageError as error:
            bad.append(BadRow(labels[path], 0, f"{error.reason}; {error.fix}"))
    return facts, bad, without


def _once(facts: dict[Path, Facts], salt: Salt) -> tuple[dict[Path, Facts], int, int]:
    """Each image once: those with an instance UID by it, others by their bytes.

    Returns:
        The first file of each image in the order of paths; how many files are second copies; and how many of those hold
        other bytes than the first.
    """
    first: dict[str, Path] = {}
    kept: dict[Path, Facts] = {}
    copies = differing = 0
    for path, fact in facts.items():
        if not fact.has_uid:
            fact = replace(fact, image=salt.key("image", _digest(path)))
        if fact.image in first:
            copies += 1
            differing += _digest(path) != _digest(first[fact.image])
        else:
            first[fact.image], kept[path] = path, fact
    return kept, copies, differing


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _units(facts: dict[Path, Facts], series_slices: str | None) -> list[_Unit]:
    if series_slices is None:
        return [_Unit((path,), fact) for path, fact in facts.items()]
    series: dict[str, list[Path]] = {}
    for path, fact in facts.items():
        series.setdefault(fact.series, []).append(path)
    units = []
    for members in series.values():
        ordered = sorted(members, key=lambda path: facts[path].place)
        chosen = tuple(ordered[index] for index in chosen_slices(series_slices, len(ordered)))
        units.append(_Unit(chosen, facts[chosen[0]]))
    return units


@dataclass(frozen=True, slots=True)
class _Ask:
    """One question that a header answers."""

    name: str
    question: str
    question_type: str
    choices: tuple[str, ...]

    def answer(self, facts: Facts) -> str | None:
        found = {"modality": facts.modality, "body-part": facts.body_part, "plane": facts.plane}[self.name]
        return found if found in self.choices else None


_ASKED = (
    _Ask(
        "modality", "Which imaging modality is this?", "Modality Recognition", tuple(sorted(set(MODALITIES.values())))
    ),
    _Ask(
        "body-part",
        "Which part of the body is shown?",
        "Anatomy Identification",
        tuple(sorted(set(BODY_PARTS.values()))),
    ),
    _Ask("plane", "In which plane was this image taken?", "Plane Recognition", PLANES),
)


def _question(unit: _Unit, ask: _Ask, pictures: Pictures, root: Path) -> Example | None:
    answer = ask.answer(unit.facts)
    # Drawn even when nothing is asked: a file that cannot be opened is bad whatever its header says.
    images = tuple(image for path in unit.files for image in pictures.find(path.relative_to(root).as_posix()))
    if answer is None:
        return None
    draw = random.Random(hashlib.sha256(f"{unit.facts.image} {ask.name}".encode()).digest())
    wrong = [choice for choice in ask.choices if choice != answer]
    options = [answer, *draw.sample(wrong, min(len(wrong), _N_OPTIONS - 1))]
    draw.shuffle(options)
    return Example(
        id=f"{unit.facts.image}/{ask.name}",
        source="DICOM",
        images=images,
        question=ask.question,
        options=tuple(options),
        target=LETTERS[options.index(answer)],
        modality=unit.facts.modality,
        question_type=ask.question_type,
        # Without a patient, what belongs together for certain is the study.
        patient=unit.facts.patient or unit.facts.study,
    )


def _copies(copies: int, differing: int) -> list[str]:
    if not copies:
        return []
    are = "1 file is a second copy of an image" if copies == 1 else f"{copies} files are second copies of an image"
    other = f", {differing} of them with other bytes than the first" if differing else ""
    return [f"{are} (same instance UID, or same bytes), left out{other}"]


def _notes(others: int, without: int, facts: Sequence[Facts]) -> list[str]:
    notes = []
    if others:
        notes.append(f"{others} files are not DICOM and were left alone")
    if without:
        notes.append(f"{without} DICOM files hold no image (reports, plans, waveforms)")
    unknown = sum(fact.burned_in_unknown for fact in facts)
    if unknown:
        notes.append(
            f"{unknown} headers do not say whether text is burned into the pixels: look at some of the pictures"
        )
    faces = sum(fact.modality in _VOLUMES and fact.body_part in _HEAD for fact in facts)
    if faces:
        notes.append(f"{faces} images are CT or MRI of the head: a face can be rebuilt from a whole series of them")
    return notes
