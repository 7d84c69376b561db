"""Image files -> 8-bit RGB pictures. The only file that touches pixels.

Rules, in this order:

* formats: PNG, JPEG, TIFF, WebP, BMP, by content and not by suffix; one frame; at most ``MAX_PIXELS``, checked before
  decoding;
* orientation: the EXIF tag is applied;
* grey of more than 8 bits (16-bit, 32-bit, float): linear from the picture's own minimum..maximum to 0..255; a constant
  picture is black; TIFF's white-is-zero is turned. Absolute values (Hounsfield units) are lost: window those first;
* alpha and transparent palette entries: over black;
* everything else as Pillow converts it to RGB; color profiles are not applied.
"""

import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from medrl.errors import ImageError

FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP")
MAX_PIXELS = 64_000_000
"""Below Pillow's own limit of 89 million, so whatever Pillow would only warn about is refused here."""

_DEEP_GREY_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_WHITE_IS_ZERO = 0
_PHOTOMETRIC_TAG = 262

# All that Pillow's decoders are known to raise on broken files. The Warning is raised only where warnings are errors.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, EOFError,
    MemoryError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip

_SCANNER_FORMATS = {
    "DICOM": "convert it to PNG with the window its question needs; pip install 'medrl[dicom]' brings a reader",
    "NIfTI": "save its slices as PNG, with the window they need; pip install 'medrl[nifti]' brings a reader",
}


def open_image(path: Path) -> Image.Image:
    """The picture at ``path``, upright, mode ``RGB``, (width, height) as stored after orientation.

    Raises:
        ImageError: the file is missing, no picture, of another format, too large, of several frames, or broken.
    """
    path = Path(path)
    _refuse_scanner_formats(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_frame(path, image)
            image.load()
            return _to_rgb(path, image)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise _error(path, "the file does not exist", "check the path, or import the data again") from error
    except Image.UnidentifiedImageError as error:
        raise _error(path, f"it is none of {', '.join(FORMATS)}", "convert it to PNG, or fetch it again") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(path, str(error)) from error
    except _DECODER_ERRORS as error:
        reason = f"it cannot be decoded ({type(error).__name__}: {error})"
        raise _error(path, reason, "the file is damaged or cut off: fetch it again, or leave its row out") from error


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


def _refuse_scanner_formats(path: Path) -> None:
    name = path.name.lower()
    kind = "DICOM" if name.endswith((".dcm", ".dicom")) else "NIfTI" if name.endswith((".nii", ".nii.gz")) else None
    if kind is None and not path.suffix and path.is_file():
        with path.open("rb") as file:
            kind = "DICOM" if file.read(132)[128:] == b"DICM" else None
    if kind:
        raise _error(path, f"it is {kind}, not a picture", _SCANNER_FORMATS[kind])


def _check_frame(path: Path, image: Image.Image) -> None:
    """Size and number of frames, from the header alone."""
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(path, f"{image.width} x {image.height} pixels")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format in FORMATS:
        reason = f"it has {frames} frames, and a picture has one"
        raise _error(path, reason, "save the frames as files of their own; an example may have several images")


def _to_rgb(path: Path, image: Image.Image) -> Image.Image:
    # Asked before orientation is applied: the turned copy has lost its TIFF tags.
    white_is_zero = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO
    image = ImageOps.exif_transpose(image)
    if image.mode in _DEEP_GREY_MODES:
        return _deep_grey_to_rgb(path, np.asarray(image, dtype=np.float64), white_is_zero)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer).convert("RGB")
    return image.convert("RGB")


def _deep_grey_to_rgb(path: Path, values: np.ndarray, white_is_zero: bool) -> Image.Image:
    """``values`` (height, width), linear from minimum..maximum to 0..255."""
    if not np.isfinite(values).all():
        raise _error(path, "it holds values that are not finite", "replace them and save the picture again")
    low, high = values.min(), values.max()
    # Each divided first: the span of two finite floats can overflow.
    scale = max(abs(low), abs(high)) or 1.0
    span = high / scale - low / scale
    gray = (values / scale - low / scale) / span if span > 0 else np.zeros_like(values)
    if white_is_zero and span > 0:
        gray = 1.0 - gray
    return Image.fromarray(np.rint(gray * 255).astype(np.uint8), mode="L").convert("RGB")


def _too_large(path: Path, what: str) -> ImageError:
    return _error(path, f"it is too large: {what}, the limit is {MAX_PIXELS}", "scale it down, or crop what matters")


def _error(path: Path, reason: str, fix: str) -> ImageError:
    return ImageError(f"image {path}: {reason}; {fix}")
