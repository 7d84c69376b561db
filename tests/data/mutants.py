"""Damaged images in numbers, read in a process of their own: ``python mutants.py COUNT SEED`` prints JSON.

Not a test itself: a crash must end this process and not the suite.
"""

import io
import json
import logging
import random
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from PIL import Image

from medrl.data.images import check_image, open_image
from medrl.errors import ImageError


def peak_bytes() -> int:
    """Most memory this program has held; ``ru_maxrss`` would count the process that started it, too."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def originals() -> dict[str, bytes]:
    """One small whole file of every format and depth that is read."""
    rng = np.random.default_rng(0)
    color, deep = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8), rng.integers(0, 65536, (40, 56), dtype=np.uint16)
    made: dict[str, bytes] = {}
    for name, format, values, options in (
        ("rgb.png", "PNG", color, {}),
        ("deep.png", "PNG", deep, {}),
        ("rgb.jpg", "JPEG", color, {}),
        ("progressive.jpg", "JPEG", color, {"progressive": True}),
        ("rgb.webp", "WEBP", color, {}),
        ("lossless.webp", "WEBP", color, {"lossless": True}),
        ("rgb.bmp", "BMP", color, {}),
        ("deep.tif", "TIFF", deep, {}),
        ("lzw.tif", "TIFF", color, {"compression": "tiff_lzw"}),
        ("jpeg.tif", "TIFF", color, {"compression": "jpeg"}),
    ):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, format=format, **options)
        made[name] = buffer.getvalue()
    for name in ("CT_small.dcm", "MR_small_RLE.dcm", "JPEG2000.dcm", "SC_rgb_small_odd.dcm"):
        made[name] = Path(str(pydicom.data.get_testdata_file(name, download=False))).read_bytes()
    volume = nibabel.Nifti1Image(rng.integers(-1000, 1000, (12, 10, 8)).astype(np.int16), np.diag([1, 1, 2, 1]))
    with tempfile.TemporaryDirectory() as folder:
        for name in ("v.nii", "v.nii.gz"):
            nibabel.save(volume, Path(folder, name))
            made[name] = Path(folder, name).read_bytes()
    return made


def mutate(data: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, most of them near the start where the header is; then perhaps cut, doubled or shifted."""
    raw = bytearray(data)
    for _ in range(draw.choice((1, 2, 4, 8, 32))):
        place = draw.randrange(min(len(raw), draw.choice((64, 512, len(raw)))))
        raw[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    kind = draw.randrange(6)
    if kind == 0:
        return bytes(raw[: draw.randrange(len(raw))])
    place, length = draw.randrange(len(raw)), draw.randrange(1, 64)
    if kind == 1:
        return bytes(raw[:place] + raw[place : place + length] + raw[place:])
    return bytes(raw[:place] + raw[place + length :]) if kind == 2 else bytes(raw)


def main(count: int, seed: int) -> None:
    logging.disable(logging.CRITICAL)
    whole = originals()
    names, draw = sorted(whole), random.Random(seed)
    opened, refused, slowest, odd = 0, 0, 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            name = names[number % len(names)]
            path = Path(folder, name)
            path.write_bytes(mutate(whole[name], draw))
            for read in (open_image, check_image):
                start = time.process_time()
                try:
                    read(path)
                    opened += 1
                except ImageError as error:
                    refused += 1
                    if not (error.reason and error.fix and error.path == path):
                        odd.append(f"{number} {name}: {error}")
                except BaseException as error:  # noqa: BLE001  what must not happen, whatever it is
                    odd.append(f"{number} {name}: {type(error).__name__}: {error}")
                    path.rename(Path(tempfile.gettempdir(), f"odd-{name}"))
                    break
                finally:
                    slowest = max(slowest, time.process_time() - start)
    peak_mib = peak_bytes() / 2**20
    json.dump(
        {"opened": opened, "refused": refused, "slowest_s": slowest, "peak_mib": peak_mib, "odd": odd}, sys.stdout
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
