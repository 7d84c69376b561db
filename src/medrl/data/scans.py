"""What scanners write -> 8-bit gray or RGB slices: DICOM and NIfTI.

DICOM, in this order: rows, columns, samples and frames are checked against the limits and against the length of the
data before pixels are touched; one frame is decoded; bits beyond BitsStored are dropped (old overlays, which may hold a
name, live there); modality LUT or rescale; then the named window (CT only), or the file's own VOI LUT, or its own first
window, or minimum..maximum; MONOCHROME1 is turned; palettes become RGB. Enhanced files' per-frame values are used.

NIfTI: turned to the nearest canonical axes by its affine, shown as a radiologist sees it (the patient's right at the
left, anterior or head at the top), pixels made square; of a 4-D file the first volume. Without a named window the
slice's own minimum..maximum; NaN counts as the minimum.
"""

import contextlib
import importlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from medrl.data.gray import MAX_PIXELS, View, chosen_slices, named_windows, stretch_gray, window_gray
from medrl.errors import ImageError, MissingExtraError, SettingsError

MAX_FRAMES = 100_000
MAX_VOXELS = 4_000_000_000
"""Of a whole volume or stack; only the slices asked for are ever in memory."""
_DEFLATE_LIMIT = 1100
"""No deflate stream grows more than this: a compressed volume that claims more is not read at all."""
_MOST_PIXEL_ASPECT = 20
_AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
_ENCAPSULATED_HELP = (
    "pip install 'medrl[dicom]' brings JPEG 2000 and RLE; convert other compressions with gdcmconv --raw"
)


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


def read_scan(path: Path, view: View) -> list[Image.Image]:
    """The slices of a DICOM or NIfTI file that ``view`` asks for, mode ``RGB``.

    Raises:
        ImageError: too large, of a kind without pixels, or damaged. What DICOM libraries say is left out of the
            message: it may quote the header, and so the patient.
        MissingExtraError: the library is not installed.
    """
    read = _dicom_slices if scan_kind(path) == "DICOM" else _nifti_slices
    return [Image.fromarray(slice_).convert("RGB") for slice_ in read(path, view)]


def _extra(package: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(package, extra) from error


# --- DICOM -----------------------------------------------------------------------------------------------------------


def read_dicom_header(path: Path) -> Any:
    """The pydicom data set at ``path`` with its pixels still undecoded.

    Raises:
        ImageError, MissingExtraError: it is not DICOM, or pydicom is not installed. pydicom's own errors, and its
            warnings, which quote values, stay inside.
    """
    pydicom = _extra("pydicom", "dicom")
    try:
        with _silence():
            dataset = pydicom.dcmread(path, force=scan_kind(path) == "DICOM")
            if "TransferSyntaxUID" not in getattr(dataset, "file_meta", {}):
                _guess_transfer_syntax(dataset)
            return dataset
    except FileNotFoundError as error:
        raise ImageError(path, "the file does not exist", "check the path, or import the data again") from error
    except (*_DECODER_ERRORS, pydicom.errors.BytesLengthException, pydicom.errors.InvalidDicomError) as error:
        raise _damaged(path, "DICOM", error) from None


def dicom_pixels(path: Path, dataset: Any, view: View) -> list[np.ndarray]:
    """The frames of ``dataset`` that ``view`` asks for: uint8 (height, width) or (height, width, 3)."""
    pydicom = _extra("pydicom", "dicom")
    try:
        with _silence():
            frames = _check_dicom(path, dataset)
            return [_dicom_frame(path, dataset, index, view) for index in chosen_slices(view.slices, frames)]
    except (ImageError, SettingsError):
        raise
    except (*_DECODER_ERRORS, pydicom.errors.BytesLengthException, pydicom.errors.InvalidDicomError) as error:
        raise _damaged(path, "DICOM", error) from None


def _dicom_slices(path: Path, view: View) -> list[np.ndarray]:
    return dicom_pixels(path, read_dicom_header(path), view)


def _check_dicom(path: Path, dataset: Any) -> int:
    """Number of frames, when the header's sizes are possible and the data is as long as they say."""
    if "PixelData" not in dataset and "FloatPixelData" not in dataset and "DoubleFloatPixelData" not in dataset:
        raise ImageError(path, "it is DICOM without an image (a report, a plan, a waveform)", "leave it out")
    rows, columns, samples = int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel", 1))
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    if not (rows > 0 and columns > 0 and samples in (1, 3) and 0 < frames <= MAX_FRAMES):
        what = f"{rows} rows x {columns} columns x {samples} samples x {frames} frames"
        raise ImageError(path, f"its header says {what}", "export it again; medrl reads 1 or 3 samples a pixel")
    if rows * columns > MAX_PIXELS or rows * columns * frames > MAX_VOXELS:
        what = f"it is too large: {rows} x {columns} pixels x {frames} frames, the limit is {MAX_PIXELS} pixels a frame"
        raise ImageError(path, what, "scale it down, or crop what matters")
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        _check_decoder(path, syntax)
    else:
        data = next(dataset[name].value for name in _PIXEL_ELEMENTS if name in dataset)
        color = "422" in str(dataset.PhotometricInterpretation)
        needed = rows * columns * (2 if color else samples) * frames * int(dataset.BitsAllocated) // 8
        if len(data) < needed:
            reason = f"its header asks for {needed} bytes of pixels, it holds {len(data)}"
            raise ImageError(path, reason, "the file is damaged or cut off: fetch it again, or leave its row out")
    return frames


_PIXEL_ELEMENTS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


def _check_decoder(path: Path, syntax: Any) -> None:
    from pydicom.pixels.decoders.base import get_decoder

    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise ImageError(
            path, f"it is compressed as {syntax.name}, which no installed decoder reads", _ENCAPSULATED_HELP
        )


def _guess_transfer_syntax(dataset: Any) -> None:
    """A file without a header names no encoding: take the one its elements were read with."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    implicit, little = dataset.original_encoding
    explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def _dicom_frame(path: Path, dataset: Any, index: int, view: View) -> np.ndarray:
    from pydicom.pixels.processing import apply_color_lut
    from pydicom.pixels.utils import pixel_array
    from pydicom.uid import RLELossless

    # The faster RLE plug-in is in Rust and ends in a panic, which no `except` should have to catch, on damaged data.
    plugin = "pydicom" if dataset.file_meta.TransferSyntaxUID == RLELossless else ""
    values = np.asarray(pixel_array(dataset, index=index, decoding_plugin=plugin))
    photometric = str(dataset.PhotometricInterpretation)
    if photometric == "PALETTE COLOR":
        return _top_bits(apply_color_lut(values, dataset), 16 if values.dtype.itemsize > 1 else None)
    if values.ndim == 3:
        return _top_bits(values, int(dataset.BitsStored))
    gray = _dicom_gray(path, dataset, _drop_unused_bits(values, dataset), index, view)
    return np.invert(gray) if photometric == "MONOCHROME1" else gray


def _drop_unused_bits(values: np.ndarray, dataset: Any) -> np.ndarray:
    if values.dtype.kind not in "iu" or not 0 < int(dataset.BitsStored) < values.dtype.itemsize * 8:
        return values
    # Shifted up and down again: the sign bit of signed values is spread by the shift down.
    spare = values.dtype.itemsize * 8 - int(dataset.BitsStored)
    return np.right_shift(np.left_shift(values, spare), spare)


def _top_bits(color: np.ndarray, bits: int | None) -> np.ndarray:
    """(height, width, 3) of ``bits`` bits -> uint8; None: as many as the values use, 8 or 16."""
    bits = bits or (16 if int(color.max(initial=0)) > 255 else 8)
    return (color >> max(0, bits - 8)).astype(np.uint8)


def _dicom_gray(path: Path, dataset: Any, values: np.ndarray, index: int, view: View) -> np.ndarray:
    from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

    values = apply_modality_lut(values, _frame_group(dataset, index, "PixelValueTransformationSequence"))
    if not np.isfinite(values).all():
        raise ImageError(path, "it holds values that are not finite", "replace them and save the picture again")
    if view.windows:
        if dataset.get("Modality") != "CT":
            raise ImageError(
                path, f"window {view.window!r} is in Hounsfield units, and it is not CT", "use --window file"
            )
        return named_windows(values, view.windows)
    voi = _frame_group(dataset, index, "FrameVOILUTSequence")
    if "VOILUTSequence" in voi:
        table = apply_voi_lut(values.astype(np.int64), voi, prefer_lut=True)
        return _top_bits(table, int(voi.VOILUTSequence[0].LUTDescriptor[2]) if table.dtype.kind == "u" else None)
    center, width = _first(voi.get("WindowCenter")), _first(voi.get("WindowWidth"))
    if center is None or width is None or not width > 0:
        return stretch_gray(values)
    return window_gray(values, center, width, str(voi.get("VOILUTFunction") or "LINEAR").upper())


def _frame_group(dataset: Any, index: int, name: str) -> Any:
    """Where an enhanced file keeps a frame's ``name``; the data set itself for every other file."""
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for group in [*frames[index : index + 1], *shared[:1]]:
        if group.get(name):
            return group[name].value[0]
    return dataset


def _first(value: Any) -> float | None:
    """Of a value that may be one number or several; None when there is none."""
    if value is None or value == "":
        return None
    return float(value[0]) if hasattr(value, "__len__") and not isinstance(value, str) else float(value)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- NIfTI -----------------------------------------------------------------------------------------------------------


def _nifti_slices(path: Path, view: View) -> list[np.ndarray]:
    nibabel = _extra("nibabel", "nifti")
    header_errors = (nibabel.spatialimages.HeaderDataError, nibabel.wrapstruct.WrapStructError)
    errors = (nibabel.filebasedimages.ImageFileError, *header_errors, *_DECODER_ERRORS)
    try:
        with _silence(), np.errstate(all="ignore"):
            _check_nifti(path, nibabel)
            volume = nibabel.load(path)
            axis = _AXES[view.plane]
            order = nibabel.io_orientation(volume.affine)
            if np.isnan(order).any():
                raise ImageError(path, "its affine gives an axis no direction", "repair its sform or qform")
            count = volume.shape[int(np.flatnonzero(order[:, 0] == axis)[0])]
            chosen = chosen_slices(view.slices, count)
            return [_nifti_gray(path, _canonical_slice(volume, order, axis, index), view) for index in chosen]
    except (ImageError, SettingsError):
        raise
    except FileNotFoundError as error:
        raise ImageError(path, "the file does not exist", "check the path, or import the data again") from error
    except errors as error:
        raise _damaged(path, "NIfTI", error) from None


def _check_nifti(path: Path, nibabel: ModuleType) -> None:
    """The header's sizes against the limits and against the size of the file, before any voxel is read."""
    import gzip

    size = path.stat().st_size
    packed = path.name.lower().endswith(".gz")
    with gzip.open(path) if packed else path.open("rb") as file:
        head = file.read(540)
    kind = nibabel.Nifti2Header if head[4:8] in (b"n+2\0", b"ni2\0") else nibabel.Nifti1Header
    header = kind.from_fileobj(io.BytesIO(head[: kind.sizeof_hdr]), check=False)
    shape = [int(extent) for extent in header.get_data_shape()]
    if len(shape) < 3 or min(shape) < 1:
        raise ImageError(path, f"its shape is {shape}", "medrl reads volumes of three or four dimensions")
    voxels = int(np.prod(shape, dtype=object))
    if (
        voxels > MAX_VOXELS
        or max(a * b for a, b in ((0, 1), (0, 2), (1, 2)) for a, b in [(shape[a], shape[b])]) > MAX_PIXELS
    ):
        raise ImageError(path, f"it is too large: {shape}", f"a slice has at most {MAX_PIXELS} pixels: crop it")
    needed = voxels * header.get_data_dtype().itemsize
    if needed > size * (_DEFLATE_LIMIT if packed else 1):
        reason = f"its header asks for {needed} bytes of voxels, more than its {size} bytes can hold"
        raise ImageError(path, reason, "the file is damaged or cut off: fetch it again, or leave its row out")


def _canonical_slice(volume: Any, order: np.ndarray, axis: int, index: int) -> tuple[np.ndarray, tuple[float, float]]:
    """Slice ``index`` across canonical ``axis`` as (rows, columns), and the size of a pixel (row, column) in mm."""
    place: list[Any] = [slice(None)] * 3 + [0] * (len(volume.shape) - 3)
    raw = int(np.flatnonzero(order[:, 0] == axis)[0])
    place[raw] = index if order[raw, 1] > 0 else volume.shape[raw] - 1 - index
    values = np.asarray(volume.dataobj[tuple(place)])
    if values.dtype.names:
        values = np.stack([values[name] for name in values.dtype.names[:3]], axis=-1)
    first, second = (i for i in range(3) if i != raw)
    for number, source in enumerate((first, second)):
        if order[source, 1] < 0:
            values = np.flip(values, number)
    if order[first, 0] > order[second, 0]:
        values, first, second = np.swapaxes(values, 0, 1), second, first
    # Now (x or y, y or z), both rising to right, anterior, head: rows become the second axis, and both are turned.
    zooms = volume.header.get_zooms()
    return np.swapaxes(values, 0, 1)[::-1, ::-1], (float(zooms[second]), float(zooms[first]))


def _nifti_gray(path: Path, slice_: tuple[np.ndarray, tuple[float, float]], view: View) -> np.ndarray:
    values, (row_mm, column_mm) = slice_
    if values.ndim == 3:
        picture = values.astype(np.uint8)
    else:
        if values.dtype.kind == "c":
            raise ImageError(path, "its voxels are complex numbers", "save their magnitude")
        known = np.isfinite(values)
        values = np.where(known, values, values[known].min() if known.any() else 0)
        picture = named_windows(values, view.windows) if view.windows else stretch_gray(values)
    aspect = row_mm / column_mm if row_mm > 0 and column_mm > 0 else 1.0
    if not np.isfinite(aspect) or abs(aspect - 1) < 0.01:
        return picture
    if not 1 / _MOST_PIXEL_ASPECT < aspect < _MOST_PIXEL_ASPECT:
        raise ImageError(path, f"its voxels are {row_mm:g} x {column_mm:g} mm", "correct the sizes in its header")
    height, width = picture.shape[:2]
    size = (width, max(1, round(height * aspect))) if aspect > 1 else (max(1, round(width / aspect)), height)
    if size[0] * size[1] > MAX_PIXELS:
        raise ImageError(path, f"it is too large: {size[0]} x {size[1]} square pixels", "crop what matters")
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize(size, Image.Resampling.BILINEAR))


def _damaged(path: Path, kind: str, error: BaseException) -> ImageError:
    reason = f"it cannot be read as {kind} ({type(error).__name__})"
    return ImageError(path, reason, "the file is damaged or of another kind: fetch it again, or leave its row out")


# What the libraries are known to raise on broken files. KeyError and IndexError are LookupErrors.
_DECODER_ERRORS = (
    OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, NotImplementedError,
    RuntimeError, MemoryError, AssertionError, ImportError, StopIteration, BufferError, struct.error, zlib.error,
)  # fmt: skip
