"""The gate between DICOM headers and everything that is written: which facts pass, and which pixels may hold names.

Tags pass by allow-list: those that ``facts_of`` reads, as one of a fixed set of words or as a salted key. Everything
else, private tags and nested sequences included, is never looked at. Pixels pass unless text may be burned into them:
the tag BurnedInAnnotation (0028,0301) says YES; or it does not say NO in an image of a kind that often shows a name.
Absent means unknown, not NO.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medrl.data.pseudonyms import Salt
from medrl.errors import ImageError

MODALITIES = {
    "CT": "CT", "MR": "MRI", "CR": "X-Ray", "DX": "X-Ray", "RG": "X-Ray", "MG": "X-Ray", "IO": "X-Ray", "PX": "X-Ray",
    "US": "Ultrasound", "IVUS": "Ultrasound", "OP": "Fundus", "OPT": "OCT", "OCT": "OCT", "IVOCT": "OCT",
    "SM": "Microscopy", "GM": "Microscopy", "DMS": "Dermoscopy", "PT": "PET", "NM": "Scintigraphy", "ES": "Endoscopy",
    "XA": "Angiography", "RF": "Fluoroscopy",
}  # fmt: skip
"""Modality (0008,0060) -> ours; any other word does not pass."""

BODY_PARTS = {
    "HEAD": "Head", "BRAIN": "Brain", "SKULL": "Skull", "NECK": "Neck", "CHEST": "Chest", "THORAX": "Chest",
    "LUNG": "Lung", "HEART": "Heart", "BREAST": "Breast", "ABDOMEN": "Abdomen", "LIVER": "Liver", "KIDNEY": "Kidney",
    "PELVIS": "Pelvis", "PROSTATE": "Prostate", "CSPINE": "Cervical spine", "TSPINE": "Thoracic spine",
    "LSPINE": "Lumbar spine", "SHOULDER": "Shoulder", "ELBOW": "Elbow", "WRIST": "Wrist", "HAND": "Hand", "HIP": "Hip",
    "KNEE": "Knee", "ANKLE": "Ankle", "FOOT": "Foot", "EYE": "Eye",
}  # fmt: skip
"""BodyPartExamined (0018,0015) -> ours; any other word does not pass, people write what they like there."""

PLANES = ("Sagittal", "Coronal", "Axial")
_OFTEN_MARKED = {"US", "IVUS", "XA", "RF", "OT", "SC", "DOC"}
_OFTEN_MARKED_CLASSES = tuple(f"1.2.840.10008.5.1.4.1.1.{number}" for number in (3, 6, 7, 12))
"""Ultrasound multi-frame and single, secondary capture, angiography and fluoroscopy; each with its later forms."""
_CAPTURED = ("SCREEN", "CAPTURE", "SECONDARY")
_MOST_OBLIQUE = 0.8
_TAG_ERRORS = (
    ValueError, TypeError, AttributeError, LookupError, ArithmeticError, NotImplementedError, RuntimeError, OSError,
)  # fmt: skip
"""What pydicom raises when a damaged value is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that passes of a header."""

    modality: str
    body_part: str | None
    plane: str | None
    patient: str | None
    """Salted key; None when the header names nobody."""
    study: str
    series: str
    image: str
    """Salted keys of the UIDs."""
    has_uid: bool
    """Whether the header names the image; without it ``image`` is no key of its own."""
    place: tuple[float, float]
    """Position along the normal in mm and instance number, to order a series by."""
    burned_in_unknown: bool


def facts_of(path: Path, header: Any, salt: Salt) -> Facts:
    """What passes of ``header``.

    Raises:
        ImageError: a tag of the allow-list is damaged; says which, not what it holds.
    """
    modality = _word(path, header, "Modality")
    patient = _word(path, header, "PatientID")
    issuer = _word(path, header, "IssuerOfPatientID")
    normal, position = _geometry(header)
    number = _word(path, header, "InstanceNumber")
    uid = _word(path, header, "SOPInstanceUID")
    return Facts(
        modality=MODALITIES.get(modality, "unknown"),
        body_part=BODY_PARTS.get(_word(path, header, "BodyPartExamined").replace(" ", "")),
        plane=_plane(normal),
        patient=salt.key("patient", f"{issuer}\0{patient}") if patient else None,
        study=salt.key("study", _word(path, header, "StudyInstanceUID")),
        series=salt.key("series", _word(path, header, "SeriesInstanceUID")),
        image=salt.key("image", uid),
        has_uid=bool(uid),
        place=(position, float(number) if number.lstrip("-").isdecimal() else 0.0),
        burned_in_unknown=_word(path, header, "BurnedInAnnotation") not in ("YES", "NO"),
    )


def check_burned_in(path: Path, header: Any, pixels_are_clean: bool) -> None:
    """Pass when no text can be in the pixels, as far as the header and the user say.

    Raises:
        ImageError: there is, or there may be.
    """
    stated = _word(path, header, "BurnedInAnnotation")
    if stated == "YES":
        fix = "remove the text from the pixels, then set BurnedInAnnotation to NO"
        raise ImageError(path, "its header says that text is burned into its pixels", fix)
    if stated == "NO" or pixels_are_clean:
        return
    kinds = (_word(path, header, "ImageType") + " " + _word(path, header, "ConversionType")).upper()
    sop_class = _word(path, header, "SOPClassUID")
    marked = (
        _word(path, header, "Modality") in _OFTEN_MARKED
        or any(sop_class == known or sop_class.startswith(known + ".") for known in _OFTEN_MARKED_CLASSES)
        or any(word in kinds for word in _CAPTURED)
    )
    if marked:
        reason = (
            "it is ultrasound, angiography or a capture (or its ImageType says SECONDARY, as captures do), "
            "and its header does not say that no text is burned in"
        )
        raise ImageError(path, reason, "look at the pixels and clean them, then say so: --i-have-deidentified")


def _word(path: Path, header: Any, name: str) -> str:
    """One tag as text in capitals; several values are joined by blanks; empty when it is absent."""
    try:
        value = header.get(name)
        if value is None:
            return ""
        parts = [value] if isinstance(value, str) or not hasattr(value, "__iter__") else list(value)
        return " ".join(str(part).strip() for part in parts).upper()
    except _TAG_ERRORS as error:
        raise ImageError(path, f"its tag {name} cannot be read ({type(error).__name__})", "export it again") from None


def _geometry(header: Any) -> tuple[np.ndarray | None, float]:
    """Normal of the image plane, and where the image lies along it, mm; None and 0 when the header does not say."""
    numbers = {}
    for name, count in (("ImageOrientationPatient", 6), ("ImagePositionPatient", 3)):
        try:
            values = np.array([float(x) for x in header.get(name)])
            numbers[name] = values if values.shape == (count,) and np.isfinite(values).all() else None
        except _TAG_ERRORS:
            numbers[name] = None
    orientation, position = numbers.values()
    if orientation is None:
        return None, 0.0
    normal = np.cross(orientation[:3], orientation[3:])
    return normal, float(normal @ position) if position is not None else 0.0


def _plane(normal: np.ndarray | None) -> str | None:
    """The plane that ``normal`` stands on; None when it is oblique or unknown."""
    if normal is None or np.abs(normal).max() < _MOST_OBLIQUE:
        return None
    return PLANES[int(np.abs(normal).argmax())]
