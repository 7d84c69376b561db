"""Pictures that are made, not taken: with one outline and each with a structure of its own, as scans of a kind are."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter


def phantom(seed: int, side: int = 200) -> Image.Image:
    """A bright disc on black; what is in it depends on the seed."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / (side / 2) - 1
    disc = gaussian_filter((x * x + (y / 0.85) ** 2 < 0.8).astype(float), 1.5)
    texture = sum(weight * _noise(generator, side, sigma) for sigma, weight in ((18, 1.0), (7, 0.8), (3, 0.5)))
    values = disc * (0.5 + 0.17 * texture)
    return Image.fromarray(np.clip(values * 255, 0, 255).astype(np.uint8)).convert("RGB")


def _noise(generator: np.random.Generator, side: int, sigma: float) -> np.ndarray:
    noise = gaussian_filter(generator.standard_normal((side, side)), sigma)
    return noise / noise.std()


def _jpeg(image: Image.Image) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=50)
    return Image.open(io.BytesIO(data.getvalue())).convert("RGB")


def _cropped(image: Image.Image) -> Image.Image:
    """5 % of width and height gone, more of it on one side than on the other."""
    width, height = image.size
    left, top = round(0.01 * width), round(0.035 * height)
    return image.crop((left, top, left + round(0.95 * width), top + round(0.95 * height)))


def _windowed(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(float)
    low, high = np.percentile(values, [10, 92])
    return Image.fromarray((np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8))


LEAKS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "same": lambda image: image.copy(),
    "resized": lambda image: image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.BICUBIC),
    "jpeg": _jpeg,
    "mirrored": ImageOps.mirror,
    "cropped": _cropped,
    "windowed": _windowed,
}
"""What becomes of a picture on its way into another data set."""
