"""Near-duplicates: the same picture resized, compressed anew, mirrored, cropped by about 5 %, or windowed anew.

perceptual hashes -> candidate pairs -> a quick look at detail -> laid over each other -> detail compared on pixels

Medical pictures of one kind look alike, so a hash alone accuses thousands of strangers. What convicts a pair is fine
structure that agrees everywhere, after the two have been brought into register and whatever monotone change of gray
levels lies between them has been undone. Neighboring slices can agree that well; they are not told apart from copies.
"""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from medrl.data.fingerprints import SIDE_PX, TURNS, equalize, local_detail, shrink
from medrl.progress import Progress

MAX_BITS = 14
"""Of 64: hashes that differ in more are no candidates."""
QUICK_AGREEMENT = 0.70
COARSE_AGREEMENT = 0.76
AGREEMENT = 0.78
"""Correlation of fine structure from which two pictures are one; see LOG.md for how it was chosen."""

_TURN: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    0: lambda grid: grid,
    1: lambda grid: grid[..., ::-1],
    2: lambda grid: grid[..., ::-1, :],
    3: lambda grid: grid[..., ::-1, ::-1],
}
_SIDES = ((0, 0), (1, 0), (0, 1))
"""Whole against whole, and cropped against whole either way."""
_BLOCK = 64
_MAX_THREADS = 8
"""Each holds some 150 MB where there are 80,000 pictures."""
_TILE = 4096
_PAIRS = 256
_MAX_SHIFT_PX = 6.0
_MAX_ZOOM = 1.18
_GRAY_BINS = 24


@dataclass(frozen=True, slots=True)
class NearPair:
    """Two pictures that are one."""

    a: int
    """Place in the first set."""
    b: int
    """Place in the second set."""
    agreement: float
    """Correlation of their fine structure, at most 1."""
    turn: int
    """How the first is to be turned, a place in ``fingerprints.TURNS``."""


def find_near(a: np.ndarray, b: np.ndarray | None = None, *, quiet: bool = True) -> list[NearPair]:
    """Pairs of near-duplicates between two sets of pictures, or within one.

    Which of two is laid over which may tip a close case. It is always that of the smaller digest, so the verdict on two
    pictures is the same in any order of a set, and whichever of two sets they lie in.

    Args:
        a: (n,) of ``fingerprints.RECORD``, all different pictures.
        b: (m,) of the same; None: pairs within ``a``, each once with ``a < b``.
        quiet: show no progress.

    Pictures with next to nothing in them are left out: they are the same only if their pixels are. Two of one digest
    are one picture, and no near-duplicates.
    """
    sets = [(a, _Likeness.of(a))] if b is None else [(a, _Likeness.of(a)), (b, _Likeness.of(b))]
    if not all(len(likeness.places) for _, likeness in sets):
        return []
    best: dict[tuple[int, int], NearPair] = {}
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    total = sum(len(likeness.places) for _, likeness in sets)
    with (
        ThreadPoolExecutor(threads) as pool,
        Progress(total, noun="compare images, image", quiet=quiet) as progress,
    ):
        for number, (records, likeness) in enumerate(sets):
            compare = functools.partial(_compare, (records, likeness), sets[-1 - number])
            starts = range(0, len(likeness.places), _BLOCK)
            for start, pairs in zip(starts, pool.map(compare, starts), strict=True):
                for pair in pairs:
                    if number == 1 or (b is None and pair.a > pair.b):
                        pair = replace(pair, a=pair.b, b=pair.a)
                    known = best.get((pair.a, pair.b))
                    if known is None or pair.agreement > known.agreement:
                        best[pair.a, pair.b] = pair
                progress.advance({}, len(likeness.places[start : start + _BLOCK]))
    return [best[key] for key in sorted(best)]


@dataclass(frozen=True, slots=True)
class _Likeness:
    """What is compared of pictures that are not flat, in the order of their digests and side by side in memory: there
    may be a thousand million pairs."""

    places: np.ndarray
    """(k,) in the set."""
    keys: np.ndarray
    """(k,) the beginning of each digest, rising."""
    hashes: np.ndarray
    """(2, turns, k)."""
    details: np.ndarray
    """(2, k, DETAIL_PX, DETAIL_PX)."""

    @classmethod
    def of(cls, records: np.ndarray) -> "_Likeness":
        places = np.flatnonzero(~records["flat"])
        keys = np.ascontiguousarray(records["digest"][places, :8]).view(">u8")[:, 0].astype(np.uint64)
        order = np.argsort(keys)
        places = places[order]
        hashes, details = records["hashes"][places], records["detail"][places]
        return cls(
            places,
            keys[order],
            np.ascontiguousarray(hashes.transpose(1, 2, 0)),
            np.ascontiguousarray(details.transpose(1, 0, 2, 3), np.float32),
        )


_Set = tuple[np.ndarray, "_Likeness"]
"""Records, and what is compared of them."""


def _compare(moving: _Set, fixed: _Set, start: int) -> list[NearPair]:
    """The pairs of a block of one set with pictures of larger digest of the other, which may be the same."""
    (moving_records, mine), (fixed_records, theirs) = moving, fixed
    block = slice(start, start + _BLOCK)
    after = np.searchsorted(theirs.keys, mine.keys[block], side="right")
    pairs = []
    for turn in range(len(TURNS)):
        i, j = _candidates(mine, theirs, block, after, turn)
        for begin in range(0, len(i), _PAIRS):
            chunk = slice(begin, begin + _PAIRS)
            pairs += _confirm(moving_records, fixed_records, i[chunk], j[chunk], turn)
    return pairs


def _candidates(
    a: _Likeness, b: _Likeness, block: slice, after: np.ndarray, turn: int
) -> tuple[np.ndarray, np.ndarray]:
    """Places of pairs whose hashes are close and whose coarse detail agrees, the first of each within ``block``.

    Args:
        after: (block,) where in ``b`` the pictures of a larger digest begin; others are no partners.
    """
    found = [np.empty((0, 2), int)]
    room = np.empty((_BLOCK, _TILE), np.uint64), np.empty((_BLOCK, _TILE), np.uint8)
    for one, other in _SIDES:
        turned = _TURN[turn](a.details[one, block])
        for start in range(int(after[0]), len(b.places), _TILE):
            i, j = _close(a.hashes[one, turn, block], b.hashes[other, 0, start : start + _TILE], room)
            j = j + start
            i, j = i[(larger := j >= after[i])], j[larger]
            agreement = np.einsum("nyx,nyx->n", turned[i], b.details[other, j])
            kept = agreement >= QUICK_AGREEMENT
            found.append(np.stack([a.places[block][i[kept]], b.places[j[kept]]], axis=1))
    pairs = np.unique(np.concatenate(found), axis=0)
    return pairs[:, 0], pairs[:, 1]


def _close(left: np.ndarray, right: np.ndarray, room: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Places of the pairs of hashes that differ in few bits. This is done a thousand million times, so it works in
    ``room``, which stays in the processor's cache, and looks for hits in one flat array: four times as fast."""
    differing, bits = (buffer[: len(left), : len(right)] for buffer in room)
    np.bitwise_xor(left[:, None], right[None], out=differing)
    np.bitwise_count(differing, out=bits)
    return np.divmod(np.flatnonzero(bits <= MAX_BITS), len(right))


def _confirm(a: np.ndarray, b: np.ndarray, i: np.ndarray, j: np.ndarray, turn: int) -> list[NearPair]:
    moving = _TURN[turn](_equalized(a["thumb"], i))
    return [
        NearPair(int(i[place]), int(j[place]), float(agreement), turn)
        for place, agreement in enumerate(agreements(moving, _equalized(b["thumb"], j)))
        if agreement >= AGREEMENT
    ]


def _equalized(thumbs: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(N, SIDE_PX, SIDE_PX), each picture's ranks computed once."""
    used, again = np.unique(places, return_inverse=True)
    return np.stack([equalize(thumbs[place]) for place in used])[again]


def agreements(moving: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """(N,) how well the fine structure of pictures agrees once they are laid over each other, at most 1.

    ``moving`` and ``fixed`` (N, SIDE_PX, SIDE_PX) are equalized, pair by pair. Pairs that disagree at half resolution
    have that disagreement for an answer: most candidates are strangers, and this is a quarter of the work.
    """
    shift, zoom = np.zeros((len(moving), 2)), np.ones((len(moving), 2))
    shift, zoom = _register(moving, fixed, shift, zoom, side=SIDE_PX // 2, steps=5)
    laid, over_x, over_y = _lay(shrink(moving, SIDE_PX // 2), shift, zoom)
    known = over_y[:, :, None] & over_x[:, None, :]
    one, other = (local_detail(grid, 1.5) * known for grid in (laid, shrink(fixed, SIDE_PX // 2)))
    lengths = np.sqrt((one * one).sum((1, 2)) * (other * other).sum((1, 2)))
    found = (one * other).sum((1, 2)) / np.maximum(lengths, 1e-9)
    kept = np.flatnonzero(found >= COARSE_AGREEMENT)
    if len(kept):
        moving, fixed = moving[kept], fixed[kept]
        shift, zoom = _register(moving, fixed, shift[kept], zoom[kept], side=SIDE_PX, steps=5)
        laid, over_x, over_y = _lay(moving, shift, zoom)
        for place, mine, theirs, x, y in zip(kept, laid, fixed, over_x, over_y, strict=True):
            mine, theirs = mine[y][:, x], theirs[y][:, x]  # only what both show
            found[place] = max(_detail_correlation(mine, theirs), _detail_correlation(theirs, mine))
    return found


def _lay(moving: np.ndarray, shift: np.ndarray, zoom: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, side, side) pictures shifted (thumb pixels) and zoomed; columns and rows (N, side) that they reach."""
    side = moving.shape[-1]
    over_x, _, inside_x = _sampling(shift[:, 0] * side / SIDE_PX, zoom[:, 0], side)
    over_y, _, inside_y = _sampling(shift[:, 1] * side / SIDE_PX, zoom[:, 1], side)
    return over_y @ moving @ over_x.transpose(0, 2, 1), inside_x, inside_y


def _detail_correlation(source: np.ndarray, target: np.ndarray) -> float:
    """Of ``target`` with what ``source`` becomes when each of its gray levels is given its mean level in ``target``.

    That undoes any window; where a window has cut off what lay beyond it, the other direction still holds.
    """
    levels = np.minimum((source * _GRAY_BINS).astype(int), _GRAY_BINS - 1)
    counts = np.bincount(levels.ravel(), minlength=_GRAY_BINS)
    sums = np.bincount(levels.ravel(), target.ravel(), minlength=_GRAY_BINS)
    mapped = (sums / np.maximum(counts, 1))[levels]
    one, other = local_detail(mapped, 2.0), local_detail(target, 2.0)
    return float((one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other) or 1.0))


def _register(
    moving: np.ndarray, fixed: np.ndarray, shift: np.ndarray, zoom: np.ndarray, *, side: int, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Better shift (in thumb pixels) and zoom, each (N, 2) for x and y, of what lays ``moving`` over ``fixed``.

    Gauss-Newton on the squared difference at ``side`` pixels, up to gain and offset of the gray levels.
    Source: Lucas and Kanade 1981; in the form of Baker and Matthews 2004, IJCV 56:221.
    """
    from scipy.ndimage import gaussian_filter

    scale = side / SIDE_PX
    away = (np.arange(side) - (side - 1) / 2).astype(np.float32)
    source, target = (gaussian_filter(shrink(grid, side), 1.0, axes=(1, 2)) for grid in (moving, fixed))
    for _ in range(steps):
        over_x, slope_x, inside_x = _sampling(shift[:, 0] * scale, zoom[:, 0], side)
        over_y, slope_y, inside_y = _sampling(shift[:, 1] * scale, zoom[:, 1], side)
        known = (inside_y[:, :, None] & inside_x[:, None, :]).astype(np.float32)
        rows = over_y @ source
        laid = _centered(rows @ over_x.transpose(0, 2, 1), known)
        wanted = _centered(target, known)
        gain = (laid * wanted).sum((1, 2)) / np.maximum((laid * laid).sum((1, 2)), 1e-6)
        gain = np.clip(gain, 0.3, 3.0).astype(np.float32)[:, None, None]
        by_x = gain * known * (rows @ slope_x.transpose(0, 2, 1))
        by_y = gain * known * (slope_y @ source @ over_x.transpose(0, 2, 1))
        slopes = np.stack([by_x, by_y, by_x * away, by_y * away[:, None]], 1).reshape(len(moving), 4, -1)
        left_over = (wanted - gain * laid).reshape(len(moving), -1, 1)
        normal = slopes @ slopes.transpose(0, 2, 1) + 1e-3 * side * np.eye(4)
        step = np.linalg.solve(normal, slopes @ left_over)[..., 0]
        shift = np.clip(shift + step[:, :2] / scale, -_MAX_SHIFT_PX, _MAX_SHIFT_PX)
        zoom = np.clip(zoom + step[:, 2:], 1 / _MAX_ZOOM, _MAX_ZOOM)
    return shift, zoom


def _centered(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Minus their mean where known, 0 elsewhere."""
    mean = (values * known).sum((1, 2)) / np.maximum(known.sum((1, 2)), 1.0)
    return (values - mean[:, None, None]) * known


def _sampling(shift_px: np.ndarray, zoom: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Linear interpolation along one axis, as matrices (N, side, side); its slope; which samples lie in the picture."""
    middle = (side - 1) / 2
    position = middle + zoom[:, None] * (np.arange(side) - middle) + shift_px[:, None]
    inside = (position >= 0) & (position <= side - 1)
    position = np.clip(position, 0, side - 1 - 1e-6)
    below = position.astype(int)
    part = (position - below).astype(np.float32)
    values, slopes = np.zeros((2, len(zoom), side, side), np.float32)
    pair, sample = np.arange(len(zoom))[:, None], np.arange(side)[None, :]
    values[pair, sample, below], values[pair, sample, below + 1] = 1 - part, part
    slopes[pair, sample, below], slopes[pair, sample, below + 1] = -1, 1
    return values, slopes, inside


def clusters(size: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Per member of 0..size-1, the smallest member that a chain of pairs joins it to."""
    parent = list(range(size))

    def root(member: int) -> int:
        while parent[member] != member:
            parent[member] = parent[parent[member]]
            member = parent[member]
        return member

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return [root(member) for member in range(size)]
