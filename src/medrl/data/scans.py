"""What scanners write -> pictures; ``scan_dicom.py`` and ``scan_nifti.py`` say by which rules."""

from pathlib import Path

from PIL import Image

from medrl.data.gray import View
from medrl.data.scan_dicom import dicom_slices
from medrl.data.scan_files import scan_kind
from medrl.data.scan_nifti import nifti_slices


def read_scan(path: Path, view: View) -> list[Image.Image]:
    """The slices of a DICOM or NIfTI file that ``view`` asks for, mode ``RGB``.

    Raises:
        ImageError: too large, of a kind without pixels, or damaged. What DICOM libraries say is left out of the
            message: it may quote the header, and so the patient.
        MissingExtraError: the library is not installed.
    """
    read = dicom_slices if scan_kind(path) == "DICOM" else nifti_slices
    return [Image.fromarray(slice_).convert("RGB") for slice_ in read(path, view)]
