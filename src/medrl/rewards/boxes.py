"""Boxes in an image: four numbers read out of an answer, and their overlap."""

import re

Box = tuple[float, float, float, float]
"""``(x1, y1, x2, y2)``: left, top, right, bottom, in the units of the target (pixels, or shares of the image)."""

# A number that is no part of a name: the 2 of "bbox_2d" and the 1 of "x1" are no coordinates.
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.]*[A-Za-z_])")
_MAX_CHARS = 400


def read_box(text: str) -> tuple[Box | None, str]:
    """The one box that ``text`` holds, or None and the problem.

    Any writing with exactly four numbers will do, such as ``[10, 20, 30, 40]``, ``(10,20),(30,40)`` or
    ``{"bbox_2d": [10, 20, 30, 40]}``; the box must be wider and higher than nothing.
    """
    if len(text) > _MAX_CHARS:
        return None, "answer is too long"
    numbers = [float(number) for number in _NUMBER.findall(text)]
    if len(numbers) != 4:
        return None, "no box" if len(numbers) < 4 else "more than one box"
    x1, y1, x2, y2 = numbers
    return ((x1, y1, x2, y2), "") if x1 < x2 and y1 < y2 else (None, "box without an area")


def iou(a: Box, b: Box) -> float:
    """Area that both boxes cover over the area that either covers, 0 to 1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    return both / (_area(a) + _area(b) - both)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
