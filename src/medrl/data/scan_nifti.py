"""NIfTI -> 8-bit gray or RGB slices.

Turned to the nearest canonical axes by its affine, shown as a radiologist sees it (the patient's right at the left,
anterior or head at the top), pixels made square; of a 4-D file the first volume. Without a named window the slice's own
minimum..maximum; NaN counts as the minimum.
"""

import io
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from medrl.data.gray import MAX_PIXELS, View, chosen_slices, named_windows, stretch_gray
from medrl.data.scan_files import DECODER_ERRORS, MAX_VOXELS, damaged, extra, silence
from medrl.errors import ImageError, SettingsError

_DEFLATE_LIMIT = 1100
"""No deflate stream grows more than this: a compressed volume that claims more is not read at all."""
_MOST_PIXEL_ASPECT = 20
_AXES = {"sagittal": 0, "coronal": 1, "axial": 2}


def nifti_slices(path: Path, view: View) -> list[np.ndarray]:
    nibabel = extra("nibabel", "nifti")
    header_errors = (nibabel.spatialimages.HeaderDataError, nibabel.wrapstruct.WrapStructError)
    errors = (nibabel.filebasedimages.ImageFileError, *header_errors, *DECODER_ERRORS)
    try:
        with silence(), np.errstate(all="ignore"):
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
        raise damaged(path, "NIfTI", error) from None


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
