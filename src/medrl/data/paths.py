"""Paths that come from data: they stay under their root, or they are refused."""

import re
import unicodedata
import urllib.parse
from pathlib import Path, PurePosixPath

from medrl.errors import DataError

_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 1024
_MOST_ENCODINGS = 4
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_BROKEN_ESCAPE = "\ufffd"
_DIRECTION_MARKS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_WINDOWS_PORTS = {f"{port}{number}" for port in ("com", "lpt") for number in range(10)}
_WINDOWS_DEVICES = frozenset({"con", "prn", "aux", "nul", "clock$", "conin$", "conout$"} | _WINDOWS_PORTS)


def safe_path(root: Path, relative: str) -> Path:
    """``root / relative``, where ``relative`` comes from data and must not lead out of ``root``.

    What would lead out on another system, or after decoding, is refused here too: a data set is copied, and other
    programs read it.

    Raises:
        DataError: ``relative`` is empty, too long, absolute, a URL, has ``..``, a backslash or a control character, in
            any encoding or form; is a device or a drive of Windows; or passes through a symbolic link that leaves
            ``root``.
    """
    if not relative.strip():
        raise DataError("the image path is empty")
    for form in _forms(relative):
        fault = _fault(form)
        if fault:
            raise DataError(f"image path {_shown(relative)} {fault}: give a plain path relative to its folder")
    pure = PurePosixPath(relative)
    if len(relative.encode()) > _MAX_PATH_BYTES or any(len(part.encode()) > _MAX_NAME_BYTES for part in pure.parts):
        raise DataError(f"image path {relative[:40]!r}... is longer than file systems take")
    try:
        inside = (root / pure).resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError) as error:
        raise DataError(f"image path {relative!r} cannot be followed under {root}: {error}") from error
    if not inside:
        raise DataError(f"image path {relative!r} leads out of {root} through a symbolic link")
    return root / pure


def _forms(relative: str) -> list[str]:
    """``relative`` as it is, percent-decoded as often as it can be, and each with look-alike characters made plain."""
    forms = [relative]
    for _ in range(_MOST_ENCODINGS):
        decoded = urllib.parse.unquote(forms[-1], errors="replace")
        if decoded == forms[-1]:
            break
        forms.append(decoded)
    return forms + [unicodedata.normalize("NFKC", form) for form in forms]


def _fault(relative: str) -> str | None:
    """What is wrong with one form of a path; None: nothing."""
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in relative) or "\\" in relative:
        return "holds a backslash or a control character"
    if _BROKEN_ESCAPE in relative or not _DIRECTION_MARKS.isdisjoint(relative):
        return "holds a character that hides what it says"
    if relative.startswith(("/", "~")) or _SCHEME.match(relative):
        return "is not a plain path, it starts at a root, a home, a drive or a scheme"
    for part in relative.split("/"):
        # Windows drops dots and blanks at the end of a name, so that '.. ' is '..' there.
        if part.strip() == ".." or (part.startswith("..") and not part.strip(". ")):
            return "is not a plain path, it goes up with '..'"
        if ":" in part or part.rstrip(". ").split(".")[0].strip().casefold() in _WINDOWS_DEVICES:
            return "holds the name of a Windows device or stream"
    return None


def _shown(relative: str) -> str:
    return repr(relative if len(relative) <= 80 else relative[:80] + "...")
