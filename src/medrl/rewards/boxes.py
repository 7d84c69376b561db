"""Boxes in an image: four numbers read out of an answer, and their overlap."""

import re

Box = tuple[float, float, float, float]
"""``(x1, y1, x2, y2)``: left, top, right, bottom, in the units of the target (pixels, or shares of the image)."""

_KEYS = {
    "x1": ("x1", "x0", "xmin", "x_min", "left"),
    "y1": ("y1", "y0", "ymin", "y_min", "top"),
    "x2": ("x2", "xmax", "x_max", "right"),
    "y2": ("y2", "ymax", "y_max", "bottom"),
    "x": ("x",),
    "y": ("y",),
    "w": ("w", "width"),
    "h": ("h", "height"),
}
_NAMES = {spelling: name for name, spellings in _KEYS.items() for spelling in spellings}
_VALUE = r"-?\d+(?:\.\d+)?(?![\w.]*[A-Za-z_])"
_KEYED = re.compile(
    rf"(?i)(?<![\w-])(?<!top )(?<!bottom )(?<!upper )(?<!lower )[\"']?({'|'.join(_NAMES)})[\"']?\s*[:=]\s*({_VALUE})"
)
_LISTED = re.compile(
    r"(?i)[\"']?\b(?:bbox(?:_2d)?|box(?:_2d)?|bounding[_ ]box|coordinates)[\"']?\s*[:=]\s*\[([^\[\]]*)\]"
)
# A number that is no part of a name: the 2 of "bbox_2d" and the 1 of "x1" are no coordinates.
_NUMBER = re.compile(rf"(?<![\w.]){_VALUE}")
_PIXELS = re.compile(r"(?i)(?<=\d)\s?(?:px|pixels?)\b")
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
_TAKEN_BACK = re.compile(
    r"(?i)\b(?:no|not|nor|none|never|neither|isn['’]?t|wrong|incorrect|false|except|outside|cannot|can['’]?t|unsure|maybe|or)\b"
    r"|不"
)
"""Beside a box: it is denied, doubted or one of several."""
_MAX_CHARS = 400


def read_box(text: str) -> tuple[Box | None, str]:
    """The one box that ``text`` holds, or None and the problem.

    Numbers with names are read by them: ``x1, y1, x2, y2`` (also ``xmin``, ``left``, ...) in any order, or ``x, y`` of
    the upper left corner with ``w, h``; so is a list called ``bbox_2d``, ``bbox`` or ``box``. Without names any writing
    with exactly four numbers will do, such as ``[10, 20, 30, 40]`` or ``(10,20),(30,40)``. The box must be wider and
    higher than nothing, and not be denied or doubted in the words around it.
    """
    if len(text) > _MAX_CHARS:
        return None, "answer is too long"
    text = _PIXELS.sub("", " ".join(text.split()))
    if _TAKEN_BACK.search(_QUOTED.sub("", text)):
        return None, "says what is not the box"
    corners, problem = _find_corners(text)
    if corners is None:
        return None, problem
    x1, y1, x2, y2 = corners
    return (corners, "") if x1 < x2 and y1 < y2 else (None, "box without an area")


def _find_corners(text: str) -> tuple[Box | None, str]:
    keyed = [(_NAMES[name.lower()], float(number)) for name, number in _KEYED.findall(text)]
    if keyed:
        return _by_name(keyed)
    lists = _LISTED.findall(text)
    if len(lists) > 1:
        return None, "more than one box"
    numbers = [float(number) for number in _NUMBER.findall(lists[0] if lists else text)]
    if len(numbers) != 4:
        return None, "no box" if len(numbers) < 4 else "more than one box"
    x1, y1, x2, y2 = numbers
    return (x1, y1, x2, y2), ""


def _by_name(keyed: list[tuple[str, float]]) -> tuple[Box | None, str]:
    named = dict(keyed)
    if len(named) < len(keyed):
        return None, "more than one box"
    if named.keys() == {"x1", "y1", "x2", "y2"}:
        return (named["x1"], named["y1"], named["x2"], named["y2"]), ""
    for x, y in (("x", "y"), ("x1", "y1")):
        if named.keys() == {x, y, "w", "h"}:
            return (named[x], named[y], named[x] + named["w"], named[y] + named["h"]), ""
    return None, "no box"


def iou(a: Box, b: Box) -> float:
    """Area that both boxes cover over the area that either covers, 0 to 1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    return both / (_area(a) + _area(b) - both)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
