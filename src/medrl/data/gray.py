"""Gray values of any depth -> 8 bits, by stated rules: a window, a look-up table, or the picture's own range.

Work goes through strips of rows, so that a picture of 64 million pixels stays far below a gigabyte of temporary floats.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medrl.errors import SettingsError

MAX_PIXELS = 64_000_000
"""Per picture. Below Pillow's own limit of 89 million, so whatever Pillow would only warn about is refused here."""
_STRIP_PIXELS = 2_000_000

WINDOWS_HU: dict[str, tuple[float, float]] = {
    "lung": (-600, 1600),
    "mediastinum": (50, 400),
    "abdomen": (40, 400),
    "brain": (40, 80),
    "bone": (500, 2000),
    "stroke": (30, 30),
}
"""Center and width in Hounsfield units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Which slices of a scan are looked at, and through which window."""

    window: str = "file"
    """``file``: the file's own (its VOI LUT or window, else minimum..maximum); a key of ``WINDOWS_HU``; or three of
    them, ``lung,mediastinum,bone``, as red, green and blue."""
    plane: Literal["axial", "coronal", "sagittal"] = "axial"
    """Of a volume; a DICOM file has frames in the order they were stored."""
    slices: str = "middle"
    """``middle``; ``uniform:3``: the middles of three equal parts; ``index:0,5``: these, from 0."""

    def __post_init__(self) -> None:
        names = self.windows
        if len(names) not in (0, 1, 3) or not set(names) <= WINDOWS_HU.keys():
            raise SettingsError(
                f"window {self.window!r} is unknown: give file, one of {', '.join(WINDOWS_HU)}, "
                "or three of them with commas between for red, green and blue"
            )
        chosen_slices(self.slices, 1_000_000_000)

    @property
    def windows(self) -> tuple[str, ...]:
        """Names of the windows; none for the file's own."""
        return () if self.window == "file" else tuple(self.window.split(","))


def chosen_slices(slices: str, count: int) -> list[int]:
    """Which of ``count`` slices ``slices`` means, see ``View.slices``.

    Raises:
        SettingsError: it means nothing, or a slice that is not there.
    """
    word, _, rest = slices.partition(":")
    numbers = [int(item) for item in rest.split(",") if item.isascii() and item.isdigit()]
    if slices == "middle":
        return [count // 2]
    if word == "uniform" and rest.isascii() and rest.isdigit() and numbers[0] > 0:
        return [int((i + 0.5) * count / numbers[0]) for i in range(numbers[0])]
    if word == "index" and numbers and len(numbers) == len(rest.split(",")):
        if max(numbers) >= count:
            raise SettingsError(f"slices {slices!r}: there are {count}, so the last one is {count - 1}")
        return numbers
    raise SettingsError(f"slices {slices!r} means nothing here: give middle, uniform:3 or index:0,5")


def window_gray(values: np.ndarray, center: float, width: float, form: str = "LINEAR") -> np.ndarray:
    """``values`` (height, width) through a window -> uint8; ``form`` is LINEAR, LINEAR_EXACT or SIGMOID.

    Source: DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3.
    """
    if form == "SIGMOID":
        return _by_strips(values, lambda x: 1 / (1 + np.exp(np.clip(-4 * (x - center) / width, -700, 700))))
    if form == "LINEAR_EXACT" or width <= 1:
        return _by_strips(values, lambda x: (x - center) / max(width, 1e-9) + 0.5)
    return _by_strips(values, lambda x: (x - (center - 0.5)) / (width - 1) + 0.5)


def stretch_gray(values: np.ndarray) -> np.ndarray:
    """``values`` (height, width), all finite, linear from minimum..maximum to 0..255 as uint8; constant ones are 0."""
    low, high = float(values.min()), float(values.max())
    # Each divided first: the span of two finite floats can overflow.
    scale = max(abs(low), abs(high)) or 1.0
    span = high / scale - low / scale
    if not span > 0:
        return np.zeros(values.shape, np.uint8)
    return _by_strips(values, lambda x: (x / scale - low / scale) / span)


def _by_strips(values: np.ndarray, to_unit: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """``to_unit`` of float64 strips, clipped to 0..1, as uint8 0..255."""
    out = np.empty(values.shape, np.uint8)
    rows = max(1, _STRIP_PIXELS // max(1, values.shape[1]))
    for top in range(0, values.shape[0], rows):
        unit = to_unit(values[top : top + rows].astype(np.float64))
        out[top : top + rows] = np.rint(np.clip(unit, 0, 1) * 255)
    return out


def named_windows(values: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Hounsfield units (height, width) -> uint8 (height, width) for one name, (height, width, 3) for three."""
    shades = [window_gray(values, *WINDOWS_HU[name]) for name in names]
    return shades[0] if len(shades) == 1 else np.stack(shades, axis=-1)
