"""Where the demo's images come from: sources that installed packages ship, and one crop or slice of one of them.

No neighbor leaks. A flat picture is cut in two with a gap, one side trains and the other tests; a volume is cut into
bands of slices at least 4 mm apart, folded about the midline where left and right are mirror images. What stays alike
on both sides of a cut picture is the body's own symmetry. Crops of one side overlap each other, so an interval over
these items speaks of this data set and not of new patients.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from medrl.errors import MissingExtraError

Split = Literal["train", "test"]
Facts = Mapping[str, str]
Box = tuple[float, float, float, float]
"""left, top, right, bottom as fractions of the picture."""

STORED_PX = 168


@dataclass(frozen=True, kw_only=True)
class View:
    """One rendered image and what is known of it."""

    image: Image.Image
    facts: Facts
    """``modality`` always; ``anatomy``, ``plane`` and ``kind`` where they are known."""
    source: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A flat image (or a stack of frames) that is divided into a train box and a test box."""

    name: str
    package: str
    license: str
    load: Callable[[], np.ndarray]
    """-> (H, W), (H, W, 3) or (frames, H, W, 3), floats in [0, 1]."""
    facts: Facts
    train: Box
    test: Box
    crop: tuple[float, float]
    """Smallest and largest side of a crop, as a fraction of the shorter side of its box."""
    any_way_up: bool = False
    """True where orientation means nothing (tissue sections, vessels): crops are turned by quarter turns."""

    def render(self, split: Split, rng: np.random.Generator) -> View:
        pixels = self.load()
        if pixels.ndim == 4:
            pixels = pixels[rng.integers(len(pixels))]
        height, width = pixels.shape[:2]
        left, top, right, bottom = self.train if split == "train" else self.test
        x0, y0, x1, y1 = int(left * width), int(top * height), int(right * width), int(bottom * height)
        side = max(8, int(min(x1 - x0, y1 - y0) * rng.uniform(*self.crop)))
        x = int(rng.integers(x0, x1 - side + 1))
        y = int(rng.integers(y0, y1 - side + 1))
        crop = pixels[y : y + side, x : x + side]
        if self.any_way_up:
            crop = np.rot90(crop, int(rng.integers(4)))
        return View(image=to_image(vary(crop, rng)), facts=self.facts, source=self.name)


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A volume in RAS order whose slices are divided into bands."""

    name: str
    package: str
    license: str
    load: Callable[[], np.ndarray]
    """-> (X, Y, Z) floats in [0, 1]; X grows to the right, Y to the front, Z to the top."""
    facts: Facts
    mm: float
    """Voxel size."""
    mirrored: bool = False
    """True where left and right are mirror images, or nearly: slices then differ by their distance from the midline."""

    def render(self, split: Split, rng: np.random.Generator, plane: str | None = None) -> View:
        volume = self.load()
        plane = plane or str(rng.choice(PLANES))
        axis = PLANES.index(plane)
        index = int(rng.choice(self.slices(split, axis)))
        pixels = np.rot90(np.moveaxis(volume, axis, 0)[index])
        facts = {**self.facts, "plane": plane}
        return View(image=to_image(vary(square(pixels), rng, move=True)), facts=facts, source=self.name)

    def slices(self, split: Split, axis: int) -> np.ndarray:
        """Indices of the slices of one side of the division that show enough to be recognized."""
        shown, middle = slices_that_show(self.load, axis)
        position_mm = shown * self.mm
        if self.mirrored and axis == 0:
            position_mm = np.abs(shown - middle) * self.mm
        phase = position_mm % BAND_PERIOD_MM
        low, high = TRAIN_BAND_MM if split == "train" else TEST_BAND_MM
        return shown[(phase >= low) & (phase < high)]


@cache
def slices_that_show(load: Callable[[], np.ndarray], axis: int) -> tuple[np.ndarray, float]:
    """Indices of the slices that are filled at least a third as much as the fullest, and the middle of the axis."""
    volume = load()
    filled = (volume > 0.1).mean(axis=tuple(a for a in range(3) if a != axis))
    return np.flatnonzero(filled > 0.35 * filled.max()), (volume.shape[axis] - 1) / 2


PLANES = ("sagittal", "coronal", "axial")
# In every 24 mm of a volume: 13 mm train, 4 mm unused, 3 mm test, 4 mm unused.
BAND_PERIOD_MM = 24.0
TRAIN_BAND_MM = (0.0, 13.0)
TEST_BAND_MM = (17.0, 20.0)


def _file(package: str, *parts: str) -> Path:
    if find_spec(package) is None:
        raise MissingExtraError({"skimage": "scikit-image"}.get(package, package), "demo")
    return Path(str(files(package).joinpath(*parts)))


def _skimage(name: str) -> np.ndarray:
    with Image.open(_file("skimage", "data", name)) as image:
        return np.asarray(image.convert("RGB" if image.mode != "L" else "L"), dtype=np.float32) / 255


def _nifti(package: str, *parts: str) -> np.ndarray:
    path = _file(package, *parts)
    if find_spec("nibabel") is None:
        raise MissingExtraError("nibabel", "demo")
    import nibabel

    volume = np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj, dtype=np.float32)
    return np.ascontiguousarray(stretch(volume), dtype=np.float32)


def _dicom(name: str, low: float | None = None, high: float | None = None) -> np.ndarray:
    path = _file("pydicom", "data", "test_files", name)
    import pydicom

    dataset = pydicom.dcmread(path)
    pixels = dataset.pixel_array.astype(np.float32)
    if pixels.ndim >= 3:
        return np.clip(pixels / (high or 255), 0, 1)
    pixels = pixels * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))
    return stretch(pixels) if low is None or high is None else np.clip((pixels - low) / (high - low), 0, 1)


def stretch(pixels: np.ndarray) -> np.ndarray:
    """Linear from the 1st to the 99.5th percentile to [0, 1]."""
    low, high = np.percentile(pixels, [1, 99.5])
    return np.clip((pixels - low) / max(float(high - low), 1e-6), 0, 1)


MNI = "MNI ICBM152 2009a, (C) 1993-2009 L. Collins, McGill: free use with this notice"
BSD, MIT = "BSD-3-Clause (scikit-image)", "MIT (pydicom test files)"
T1, GRAY, WHITE = "T1-weighted", "gray-matter map", "white-matter map"

VOLUMES: tuple[Volume, ...] = tuple(
    Volume(
        name=f"MNI152 {kind}",
        package="nilearn",
        license=MNI,
        load=cache(
            lambda part=part: _nifti(
                "nilearn", "datasets", "data", f"mni_icbm152_{part}_tal_nlin_sym_09a_converted.nii.gz"
            )
        ),
        facts={"modality": "MRI", "anatomy": "brain", "kind": kind},
        mm=1.0,
        mirrored=True,
    )
    for part, kind in (("t1", T1), ("gm", GRAY), ("wm", WHITE))
)

HEAD_SLAB = Volume(
    name="nibabel anatomical",
    package="nibabel",
    license="PDDL 1.0 (nibabel test data)",
    load=cache(lambda: _nifti("nibabel", "tests", "data", "anatomical.nii")),
    facts={"modality": "MRI", "anatomy": "brain"},
    mm=2.0,
    mirrored=True,
)

PICTURES: tuple[Picture, ...] = (
    Picture(
        name="pydicom CT_small",
        package="pydicom",
        license=MIT,
        load=cache(lambda: _dicom("CT_small.dcm")),
        facts={"modality": "CT", "anatomy": "spine", "plane": "axial"},
        train=(0.0, 0.0, 0.48, 1.0),
        test=(0.52, 0.0, 1.0, 1.0),
        crop=(0.7, 1.0),
    ),
    Picture(
        name="pydicom examples_overlay",
        package="pydicom",
        license=MIT,
        load=cache(lambda: _dicom("examples_overlay.dcm")),
        facts={"modality": "MRI", "anatomy": "abdomen", "plane": "axial"},
        train=(0.03, 0.03, 0.48, 0.95),
        test=(0.52, 0.03, 0.95, 0.95),
        crop=(0.65, 1.0),
    ),
    Picture(
        name="pydicom MR_small",
        package="pydicom",
        license=MIT,
        load=cache(lambda: _dicom("MR_small.dcm")),
        facts={"modality": "MRI"},
        train=(0.0, 0.0, 0.48, 1.0),
        test=(0.52, 0.0, 1.0, 1.0),
        crop=(0.8, 1.0),
    ),
    # The boxes of the ultrasound images leave out the burned-in text.
    Picture(
        name="pydicom examples_rgb_color",
        package="pydicom",
        license=MIT,
        load=cache(lambda: _dicom("examples_rgb_color.dcm")),
        facts={"modality": "ultrasound", "anatomy": "lymph node", "kind": "color Doppler"},
        train=(0.09, 0.32, 0.49, 0.69),
        test=(0.53, 0.32, 0.9, 0.69),
        crop=(0.75, 1.0),
    ),
    Picture(
        name="pydicom examples_ybr_color",
        package="pydicom",
        license=MIT,
        load=cache(lambda: _dicom("examples_ybr_color.dcm", 0, 140)),
        facts={"modality": "ultrasound", "anatomy": "heart", "kind": "B-mode"},
        train=(0.22, 0.12, 0.5, 0.85),
        test=(0.53, 0.12, 0.8, 0.85),
        crop=(0.75, 1.0),
    ),
    Picture(
        name="scikit-image retina",
        package="scikit-image",
        license="CC0 (M. Haggstrom 2014)",
        load=cache(lambda: _skimage("retina.jpg")),
        facts={"modality": "fundus photography", "anatomy": "retina", "kind": "color photograph"},
        train=(0.1, 0.12, 0.56, 0.88),
        test=(0.6, 0.12, 0.93, 0.88),
        crop=(0.5, 0.95),
        any_way_up=True,
    ),
    Picture(
        name="scikit-image microaneurysms",
        package="scikit-image",
        license="CC0 (A. Maier, HRF)",
        load=cache(lambda: _skimage("microaneurysms.png")),
        facts={"modality": "fundus photography", "anatomy": "retina", "kind": "green-channel image"},
        train=(0.0, 0.0, 1.0, 0.56),
        test=(0.0, 0.61, 1.0, 1.0),
        crop=(0.8, 1.0),
        any_way_up=True,
    ),
    Picture(
        name="scikit-image ihc",
        package="scikit-image",
        license=f"no known restrictions (CMMI); {BSD}",
        load=cache(lambda: _skimage("ihc.png")),
        facts={"modality": "microscopy", "anatomy": "colon", "kind": "immunostained section"},
        train=(0.0, 0.0, 0.58, 1.0),
        test=(0.62, 0.0, 1.0, 1.0),
        crop=(0.5, 0.95),
        any_way_up=True,
    ),
    Picture(
        name="scikit-image cell",
        package="scikit-image",
        license="CC0 (P. Muller 2018)",
        load=cache(lambda: _skimage("cell.png")),
        facts={"modality": "microscopy", "anatomy": "single cell", "kind": "phase image"},
        train=(0.5, 0.38, 0.79, 0.76),
        test=(0.81, 0.38, 1.0, 0.76),
        crop=(0.8, 1.0),
    ),
)

Source = Volume | Picture
SOURCES: tuple[Source, ...] = (*VOLUMES, HEAD_SLAB, *PICTURES)


def square(pixels: np.ndarray) -> np.ndarray:
    """Pad the shorter side with black."""
    side = max(pixels.shape[:2])
    out = np.zeros((side, side, *pixels.shape[2:]), dtype=np.float32)
    top, left = (side - pixels.shape[0]) // 2, (side - pixels.shape[1]) // 2
    out[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return out


def vary(pixels: np.ndarray, rng: np.random.Generator, *, move: bool = False) -> np.ndarray:
    """Mirror half of them, change contrast and brightness a little, and with ``move`` also zoom, angle and place.

    No question asks for a side, and left and right halves of a body look alike only in the mirror.
    """
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if move:
        image = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))
        side = image.width
        angle = np.deg2rad(rng.uniform(-8, 8))
        scale = rng.uniform(0.8, 1.0)
        dx, dy = rng.uniform(-0.03, 0.03, 2) * side
        cos, sin, c = np.cos(angle) * scale, np.sin(angle) * scale, side / 2
        affine = (cos, -sin, c - cos * c + sin * c + dx, sin, cos, c - sin * c - cos * c + dy)
        moved = image.transform(image.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
        pixels = np.asarray(moved, dtype=np.float32) / 255
    return pixels * rng.uniform(0.8, 1.15) + rng.uniform(-0.05, 0.08)


def to_image(pixels: np.ndarray) -> Image.Image:
    """(H, W) or (H, W, 3) floats in [0, 1] -> RGB of ``STORED_PX`` squared."""
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8)).convert("RGB")
    return image.resize((STORED_PX, STORED_PX), Image.Resampling.BICUBIC)
