"""Scans as files: which are scans, and what reading them can raise; for ``scan_dicom.py`` and ``scan_nifti.py``."""

import contextlib
import importlib
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from medrl.errors import ImageError, MissingExtraError

MAX_VOXELS = 4_000_000_000
"""Of a whole volume or stack; only the slices asked for are ever in memory."""

# What the libraries are known to raise on broken files. KeyError and IndexError are LookupErrors.
DECODER_ERRORS = (
    OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, NotImplementedError,
    RuntimeError, MemoryError, AssertionError, ImportError, StopIteration, BufferError, struct.error, zlib.error,
)  # fmt: skip


def scan_kind(path: Path) -> str | None:
    """``DICOM`` or ``NIfTI`` by content or suffix, None for anything else."""
    name = path.name.lower()
    if name.endswith((".dcm", ".dicom")):
        return "DICOM"
    if name.endswith((".nii", ".nii.gz")):
        return "NIfTI"
    with contextlib.suppress(OSError), path.open("rb") as file:
        return "DICOM" if file.read(132)[128:] == b"DICM" else None
    return None


def extra(package: str, extra: str) -> ModuleType:
    """The package, or MissingExtraError that names the extra which brings it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(package, extra) from error


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Libraries' warnings stay inside: they quote headers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def damaged(path: Path, kind: str, error: BaseException) -> ImageError:
    """The ImageError for a file on which a library failed; says which kind of error, not what it quotes."""
    reason = f"it cannot be read as {kind} ({type(error).__name__})"
    return ImageError(path, reason, "the file is damaged or of another kind: fetch it again, or leave its row out")
