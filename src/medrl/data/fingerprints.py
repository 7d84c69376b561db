"""What a picture is known by: the digest of its decoded pixels, and a small likeness to seek near-duplicates in.

files -> decoded in parallel -> one record each, kept by the sha256 of the file's bytes

The cache is one SQLite file. It holds no path and no name: a file's place is kept as a digest of path, size and time of
change. What was decoded stays, so work that was stopped goes on where it was, and a second audit decodes nothing.
"""

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from medrl.data.images import open_image
from medrl.errors import DataError, ImageError
from medrl.progress import Progress

SIDE_PX = 64
DETAIL_PX = 16
CROP = 0.035
"""Cut off each side of the second likeness: it meets pictures of which up to about 5 % was cropped."""
TURNS = ("as it is", "mirrored", "upside down", "turned by 180 degrees")

RECORD = np.dtype(
    [
        ("digest", "u1", 32),  # sha256 of mode, size and RGB bytes, as images.pixel_digest
        ("thumb", "u1", (SIDE_PX, SIDE_PX)),  # gray
        ("flat", "?"),  # too little in it to compare
        ("hashes", "u8", (2, len(TURNS))),  # perceptual hashes: whole and cropped, by turn
        ("detail", "f2", (2, DETAIL_PX, DETAIL_PX)),  # unit length: whole and cropped
    ]
)
"""One picture."""

_FLAT_SPREAD = 2.0
_HASH_PX, _HASH_FREQUENCIES = 32, 8
_VERSION = 1
_BATCH = 256


def fingerprint_images(paths: Iterable[Path], *, cache: Path | None = None, quiet: bool = True) -> dict[Path, np.void]:
    """Path -> its ``RECORD``, for every path once.

    Args:
        paths: image files.
        cache: folder of the cache; default: ``$MEDRL_CACHE``, else ``~/.cache/medrl``.
        quiet: show no progress.

    Raises:
        ImageError: a file is missing or no picture; what was decoded before it stays in the cache.
        DataError: the cache cannot be used.
    """
    wanted = list(dict.fromkeys(paths))
    if not wanted:
        return {}
    with _open_cache(cache) as database:
        found = _unchanged(database, wanted)
        missing = [path for path in wanted if path not in found]
        batches = [missing[start : start + _BATCH] for start in range(0, len(missing), _BATCH)]
        quiet = quiet or len(missing) <= _BATCH
        # Decoding and hashing leave Python's lock, so threads run beside each other.
        with ThreadPoolExecutor(os.cpu_count()) as pool, Progress(len(missing), noun="image", quiet=quiet) as progress:
            for batch in batches:
                found.update(_describe_batch(database, pool, batch))
                progress.advance({}, len(batch))
    return {path: np.frombuffer(found[path], RECORD)[0] for path in wanted}


def describe_picture(image: Image.Image) -> bytes:
    """The ``RECORD`` of one RGB picture, as bytes."""
    record = np.zeros((), RECORD)
    digest = hashlib.sha256(f"{image.mode} {image.width} {image.height}\n".encode())
    digest.update(image.tobytes())
    record["digest"] = np.frombuffer(digest.digest(), np.uint8)
    gray = image.convert("L")
    whole = gray.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR)
    record["thumb"] = np.asarray(whole)
    record["flat"] = np.asarray(whole).std() < _FLAT_SPREAD
    inner = (SIDE_PX * CROP, SIDE_PX * CROP, SIDE_PX * (1 - CROP), SIDE_PX * (1 - CROP))
    cropped = whole.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR, box=inner)
    for index, likeness in enumerate((whole, cropped)):
        ranks = equalize(np.asarray(likeness))
        record["hashes"][index] = perceptual_hashes(ranks)
        record["detail"][index] = unit(local_detail(shrink(ranks, DETAIL_PX), 1.5))
    return record.tobytes()


def equalize(gray: np.ndarray) -> np.ndarray:
    """Gray levels (H, W) -> their mid-ranks in 0..1: the same whatever window or gamma the picture was shown with."""
    counts = np.bincount(gray.ravel(), minlength=256)
    return ((counts.cumsum() - counts / 2) / gray.size).astype(np.float32)[gray]


def perceptual_hashes(ranks: np.ndarray) -> np.ndarray:
    """(H, W) -> one 64-bit hash per turn: which low frequencies lie above their median.

    Source: Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", pHash; as in imagehash,
    but of the equalized picture. Mirroring a picture changes the sign of its odd frequencies, so turns cost nothing.
    """
    from scipy.fft import dctn

    low = np.asarray(dctn(shrink(ranks, _HASH_PX)))[:_HASH_FREQUENCIES, :_HASH_FREQUENCIES]
    odd = 1 - 2 * (np.arange(_HASH_FREQUENCIES) % 2)
    turned = np.stack([low, low * odd, low * odd[:, None], low * odd * odd[:, None]]).reshape(len(TURNS), -1)
    bits = turned > np.median(turned, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def local_detail(ranks: np.ndarray, sigma_px: float) -> np.ndarray:
    """(..., H, W) without its slow changes, and with every neighborhood's contrast made alike: a strong rim counts no
    more than the structure inside it."""
    from scipy.ndimage import gaussian_filter

    axes = (ranks.ndim - 2, ranks.ndim - 1)
    fine = ranks - gaussian_filter(ranks, sigma_px, axes=axes)
    contrast = np.sqrt(gaussian_filter(fine * fine, 1.5 * sigma_px, axes=axes))
    return fine / (contrast + 0.05)


def shrink(values: np.ndarray, side: int) -> np.ndarray:
    """(..., H, H) -> (..., side, side) by means of whole blocks; H is ``side`` times a power of two."""
    while values.shape[-1] > side:
        rows = values[..., ::2, :] + values[..., 1::2, :]
        values = (rows[..., ::2] + rows[..., 1::2]) / 4
    return values


def unit(values: np.ndarray) -> np.ndarray:
    """Scaled to length 1; zeros stay."""
    return values / (np.linalg.norm(values) or 1.0)


# --- cache -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_cache(folder: Path | None) -> Iterator[sqlite3.Connection]:
    folder = folder or Path(os.environ.get("MEDRL_CACHE") or Path.home() / ".cache" / "medrl")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(folder / f"pictures-{_VERSION}.sqlite", timeout=60)
        with contextlib.closing(database):
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("CREATE TABLE IF NOT EXISTS places (place BLOB PRIMARY KEY, content BLOB) WITHOUT ROWID")
            database.execute("CREATE TABLE IF NOT EXISTS pictures (content BLOB PRIMARY KEY, record BLOB)")
            yield database
    except (OSError, sqlite3.Error) as error:
        raise DataError(
            f"the cache of image fingerprints in {folder} cannot be used ({error}): free space there or delete it, or "
            "set MEDRL_CACHE to a folder that can be written"
        ) from error


def _unchanged(database: sqlite3.Connection, paths: Sequence[Path]) -> dict[Path, bytes]:
    """Records of files that were read at this place before and have not changed since."""
    query = "SELECT record FROM places JOIN pictures USING (content) WHERE place = ?"
    rows = ((path, database.execute(query, (_place(path),)).fetchone()) for path in paths)
    return {path: row[0] for path, row in rows if row is not None}


def _describe_batch(database: sqlite3.Connection, pool: ThreadPoolExecutor, paths: Sequence[Path]) -> dict[Path, bytes]:
    """Records of some files; only contents never met before are decoded. Kept at once, all of them or none."""
    contents = dict(zip(paths, pool.map(_digest_file, paths), strict=True))
    query = "SELECT record FROM pictures WHERE content = ?"
    met = {content: database.execute(query, (content,)).fetchone() for content in set(contents.values())}
    new = {content: path for path, content in contents.items() if met[content] is None}
    described = dict(zip(new, pool.map(lambda path: describe_picture(open_image(path)), new.values()), strict=True))
    with database:
        database.executemany("INSERT OR REPLACE INTO pictures VALUES (?, ?)", described.items())
        places = [(_place(path), content) for path, content in contents.items()]
        database.executemany("INSERT OR REPLACE INTO places VALUES (?, ?)", places)
    return {path: described.get(content) or met[content][0] for path, content in contents.items()}


def _place(path: Path) -> bytes:
    """Names a file in its present state without telling its path; nothing is kept at the place of a missing file."""
    try:
        facts = path.stat()
    except OSError:
        return b""
    state = f"{path.absolute()}\0{facts.st_size}\0{facts.st_mtime_ns}"
    return hashlib.sha256(state.encode("utf-8", "surrogateescape")).digest()


def _digest_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise ImageError(path, f"it cannot be read ({error.strerror})", "import the data again") from error
