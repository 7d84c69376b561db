"""Image files -> 8-bit RGB pictures. This file, ``gray.py`` and ``scan_*.py`` alone touch pixels.

Rules, in this order:

* formats: PNG, JPEG, TIFF, WebP, BMP, by content and not by suffix, one frame; DICOM and NIfTI as ``scan_dicom.py`` and
  ``scan_nifti.py`` say; at most ``MAX_PIXELS``, one side at most ``MAX_ASPECT`` times the other: checked before
  decoding;
* orientation: the EXIF tag is applied;
* gray of more than 8 bits (16-bit, 32-bit, float): linear from the picture's own minimum..maximum to 0..255; a constant
  picture is black; TIFF's white-is-zero is turned. Absolute values (Hounsfield units) are lost: give those as DICOM;
* alpha and transparent palette entries: over black;
* everything else as Pillow converts it to RGB; color profiles are not applied.
"""

import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from medrl.data.gray import MAX_PIXELS, View, stretch_gray
from medrl.data.scan_files import scan_kind
from medrl.data.scans import read_scan
from medrl.errors import ImageError

__all__ = ["FORMATS", "MAX_PIXELS", "View", "check_image", "open_image", "open_slices", "pixel_digest"]

FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP")
DEFAULT_VIEW = View()
MAX_ASPECT = 200
"""Long side by short side. Image processors of the Qwen2-VL family (``smart_resize``) take nothing longer."""

_DEEP_GRAY_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_WHITE_IS_ZERO = 0
_PHOTOMETRIC_TAG = 262
_TAIL_BYTES = 4096
_JPEG_END = b"\xff\xd9"

# All that Pillow's decoders are known to raise on broken files. The Warning is raised only where warnings are errors.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, EOFError,
    MemoryError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


def open_image(path: Path, view: View = DEFAULT_VIEW) -> Image.Image:
    """The picture at ``path``, upright, mode ``RGB``; of a scan the one slice that ``view`` asks for.

    Raises:
        ImageError: the file is missing, no picture, of another format, too large, of several frames, or broken.
        MissingExtraError: it is DICOM or NIfTI, and the library that reads it is not installed.
    """
    pictures = open_slices(path, view)
    if len(pictures) != 1:
        raise ImageError(path, f"{view.slices!r} asks for {len(pictures)} slices", "use open_slices for several")
    return pictures[0]


def open_slices(path: Path, view: View = DEFAULT_VIEW) -> list[Image.Image]:
    """The slices of a scan that ``view`` asks for, as ``open_image`` gives one; a picture is its own only slice."""
    path = Path(path)
    return read_scan(path, view) if scan_kind(path) else [_open_picture(path)]


def check_image(path: Path) -> None:
    """Raise the ImageError that ``open_image`` would, as far as can be told without decoding the pixels.

    Header, format, size, frames; that a JPEG has its end mark and a PNG sound checksums. What looks wrong, and every
    other format, is decoded and decides for itself.
    """
    path = Path(path)
    if scan_kind(path):
        read_scan(path, DEFAULT_VIEW)
        return
    if not _looks_whole(path):
        _open_picture(path)


def _looks_whole(path: Path) -> bool:
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_frame(path, image)
            if image.format == "PNG":
                image.verify()
                return True
        if image.format != "JPEG":
            return False
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return _JPEG_END in file.read()
    except ImageError:
        raise
    except _DECODER_ERRORS:
        return False


def _open_picture(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_frame(path, image)
            image.load()
            return _to_rgb(path, image)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(path, "the file does not exist", "check the path, or import the data again") from error
    except Image.UnidentifiedImageError as error:
        formats = ", ".join((*FORMATS, "DICOM", "NIfTI"))
        raise ImageError(path, f"it is none of {formats}", "convert it to PNG, or fetch it again") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(path, str(error)) from error
    except _DECODER_ERRORS as error:
        reason = f"it cannot be decoded ({type(error).__name__}: {error})"
        raise ImageError(
            path, reason, "the file is damaged or cut off: fetch it again, or leave its row out"
        ) from error


def stored_size(path: Path) -> tuple[int, int]:
    """(width, height) of the picture at ``path`` as stored, before orientation; fast, as a rule from its header alone.

    Raises:
        ImageError: as ``open_image``, but for what only decoding shows.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_frame(Path(path), image)
            return image.size
    except _DECODER_ERRORS:
        return open_image(path).size  # which says what is wrong


def pixel_digest(path: Path) -> str:
    """sha256 over mode, size and RGB bytes of ``open_image(path)``: equal for equal pictures in different files.

    Raises:
        ImageError: as ``open_image``.
    """
    image = open_image(path)
    digest = hashlib.sha256(f"{image.mode} {image.width} {image.height}\n".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def _check_frame(path: Path, image: Image.Image) -> None:
    """Size and number of frames, from the header alone."""
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(path, f"{image.width} x {image.height} pixels")
    if max(image.size) > MAX_ASPECT * min(image.size):
        reason = (
            f"it is {image.width} x {image.height} pixels, and one side may be {MAX_ASPECT} times the other at most"
        )
        raise ImageError(path, reason, "crop it, or pad its short side")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format in FORMATS:
        reason = f"it has {frames} frames, and a picture has one"
        raise ImageError(path, reason, "save the frames as files of their own; an example may have several images")


def _to_rgb(path: Path, image: Image.Image) -> Image.Image:
    # Asked before orientation is applied: the turned copy has lost its TIFF tags.
    white_is_zero = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO
    image = ImageOps.exif_transpose(image)
    if image.mode in _DEEP_GRAY_MODES:
        return _deep_gray_to_rgb(path, np.asarray(image), white_is_zero)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer).convert("RGB")
    return image.convert("RGB")


def _deep_gray_to_rgb(path: Path, values: np.ndarray, white_is_zero: bool) -> Image.Image:
    """``values`` (height, width), linear from minimum..maximum to 0..255."""
    if not np.isfinite(values).all():
        raise ImageError(path, "it holds values that are not finite", "replace them and save the picture again")
    gray = stretch_gray(values)
    if white_is_zero and values.min() < values.max():
        gray = np.invert(gray)
    return Image.fromarray(gray).convert("RGB")


def _too_large(path: Path, what: str) -> ImageError:
    return ImageError(
        path, f"it is too large: {what}, the limit is {MAX_PIXELS}", "scale it down, or crop what matters"
    )
