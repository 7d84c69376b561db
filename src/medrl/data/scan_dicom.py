"""DICOM -> 8-bit gray or RGB frames.

In this order: rows, columns, samples and frames are checked against the limits and against the length of the data
before pixels are touched; one frame is decoded; bits beyond BitsStored are dropped (old overlays, which may hold a
name, live there); modality LUT or rescale; then the named window (CT only), or the file's own VOI LUT, or its own first
window, or minimum..maximum; MONOCHROME1 is turned; palettes become RGB. Enhanced files' per-frame values are used.
"""

from pathlib import Path
from typing import Any

import numpy as np

from medrl.data.gray import MAX_PIXELS, View, chosen_slices, named_windows, stretch_gray, window_gray
from medrl.data.scan_files import DECODER_ERRORS, MAX_VOXELS, damaged, extra, scan_kind, silence
from medrl.errors import ImageError, SettingsError

MAX_FRAMES = 100_000
_ENCAPSULATED_HELP = (
    "pip install 'medrl[dicom]' brings JPEG 2000 and RLE; convert other compressions with gdcmconv --raw"
)


def read_dicom_header(path: Path) -> Any:
    """The pydicom data set at ``path`` with its pixels still undecoded.

    Raises:
        ImageError, MissingExtraError: it is not DICOM, or pydicom is not installed. pydicom's own errors, and its
            warnings, which quote values, stay inside.
    """
    pydicom = extra("pydicom", "dicom")
    try:
        with silence():
            dataset = pydicom.dcmread(path, force=scan_kind(path) == "DICOM")
            if "TransferSyntaxUID" not in getattr(dataset, "file_meta", {}):
                _guess_transfer_syntax(dataset)
            return dataset
    except FileNotFoundError as error:
        raise ImageError(path, "the file does not exist", "check the path, or import the data again") from error
    except (*DECODER_ERRORS, pydicom.errors.BytesLengthException, pydicom.errors.InvalidDicomError) as error:
        raise damaged(path, "DICOM", error) from None


def dicom_slices(path: Path, view: View) -> list[np.ndarray]:
    """The frames of the file at ``path`` that ``view`` asks for: uint8 (height, width) or (height, width, 3)."""
    dataset = read_dicom_header(path)
    pydicom = extra("pydicom", "dicom")
    try:
        with silence():
            frames = _check_dicom(path, dataset)
            return [_dicom_frame(path, dataset, index, view) for index in chosen_slices(view.slices, frames)]
    except (ImageError, SettingsError):
        raise
    except (*DECODER_ERRORS, pydicom.errors.BytesLengthException, pydicom.errors.InvalidDicomError) as error:
        raise damaged(path, "DICOM", error) from None


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
