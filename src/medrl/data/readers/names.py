"""What names of files and folders say: modality and question type, in our words.

Released files say it in many ways (``CT(Computed Tomography)_train.json``, ``VQA_OCT``, ``DiseaseDiagnosis_test``), and
OmniMedVQA's pictures say it by the data set they lie in and, in RadImageNet, by the part of the body they are called
after.
"""

import re
from pathlib import Path, PurePosixPath

from medrl.data.omnimed_names import DATASETS

UNKNOWN = "unknown"

_MODALITIES = {
    "CT": ("ct", "computed tomography"),
    "MRI": ("mri", "mr", "magnetic resonance", "mag netic resonance"),
    "X-Ray": ("x ray", "xray"),
    "Ultrasound": ("ultrasound", "us"),
    "Dermoscopy": ("dermoscopy", "dermo", "der"),
    "Fundus": ("fundus", "fp"),
    "OCT": ("oct", "optical coherence"),
    "Microscopy": ("microscopy", "micro"),
}
_QUESTION_TYPES = {
    "Anatomy Identification": ("anatomy",),
    "Disease Diagnosis": ("disease",),
    "Lesion Grading": ("lesion",),
    "Modality Recognition": ("modality recognition",),
    "Other Biological Attributes": ("other bio", "biological"),
}
_RADIMAGENET = {
    **dict.fromkeys(("abd", "lung"), "CT"),
    **dict.fromkeys(("usn",), "Ultrasound"),
    **dict.fromkeys(("ankle", "brain", "foot", "hip", "knee", "mrabd", "mri", "shoulder", "spine"), "MRI"),
}
"""First letters of a picture's name -> its modality; RadImageNet holds three."""
_OCT_AND_XRAY = {
    **dict.fromkeys(("person", "IM", "NORMAL2", "BACTERIA", "VIRUS"), "X-Ray"),
    **dict.fromkeys(("CNV", "DME", "DRUSEN"), "OCT"),
}
"""The same for OCT & X-Ray 2017 (Kermany et al. 2018), which holds two; ``NORMAL`` occurs in both."""


def domains_of(path: Path) -> tuple[str, str]:
    """(modality, question type) that a file's name says, or else its folders' names; ``unknown`` for what none says.

    A name that says several modalities says none, and its folders are not asked.
    """
    return _first_said(path, _MODALITIES), _first_said(path, _QUESTION_TYPES)


def modality_of(words: str) -> str:
    """Modality that ``words`` say, ``unknown`` where they say none or several."""
    return _first_said(Path(words.replace("/", " ")), _MODALITIES)


def _first_said(path: Path, names: dict[str, tuple[str, ...]]) -> str:
    for part in reversed(path.parts):
        apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", part)
        words = f" {' '.join(re.findall(r'[a-z]+', apart.casefold()))} "
        said = [ours for ours, theirs in names.items() if any(f" {name} " in words for name in theirs)]
        if said:
            return said[0] if len(said) == 1 else UNKNOWN
    return UNKNOWN


def source_of_image(cell: str) -> str:
    """Data set that OmniMedVQA's ``Images/<dataset>/...`` names; ``OmniMedVQA`` where it names none."""
    parts = [part for part in cell.split("/") if part not in ("", ".")]
    parts = parts[1:] if parts[:1] and parts[0].casefold() == "images" else parts
    return parts[0] if len(parts) > 1 else "OmniMedVQA"


def modality_of_image(cell: str) -> str:
    """Modality that a picture's place in OmniMedVQA says, ``unknown`` where it says none."""
    source = source_of_image(cell)
    if source == "RadImageNet":
        body_part = re.match(r"[a-z]*", PurePosixPath(cell).name)
        return _RADIMAGENET.get(body_part[0] if body_part else "", UNKNOWN)
    if source == "OCT & X-Ray 2017":
        kind = re.match(r"[A-Za-z]+2?", PurePosixPath(cell).name)
        return _OCT_AND_XRAY.get(kind[0] if kind else "", UNKNOWN)
    known = DATASETS.get(source, {})
    return next(iter(known)) if len(known) == 1 else UNKNOWN
