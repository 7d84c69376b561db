"""Files that survive kills and power cuts: text and JSON replaced whole or not at all, logs of JSON lines.

A process killed while it appends leaves at most one torn line, at the end: reading ignores it and the next append cuts
it off.
"""

import errno
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medrl.errors import RunError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_json_atomically(path: Path, value: Any) -> None:
    """Replace a JSON file whole or not at all, also across a crash. Raises RunError for NaN and infinity."""
    write_text_atomically(path, to_json(value, path, indent=2) + "\n")


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a text file whole or not at all, also across a crash. Raises RunError naming it when it cannot be."""
    data = text.encode()
    with _named(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)  # the new name itself must reach the disk, or a power cut brings the old file back


def make_folder(path: Path) -> None:
    """Make a folder and what is missing above it. On return all their names are on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Return once a file's bytes, or a folder's names, are on the disk and not in a cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _named(path: Path, size: int) -> Iterator[None]:
    """Within, what the operating system refuses becomes a RunError that says which file could not be written."""
    try:
        yield
    except OSError as error:
        full = error.errno in DISK_FULL
        why = f"the disk is full, and {size} bytes are to be written" if full else error.strerror or str(error)
        raise RunError(
            f"{path} cannot be written: {why}. What was saved before is whole: "
            f"{'make room' if full else 'see to that'}, then go on with the same command (training: --resume auto)"
        ) from error


def is_torn(path: Path) -> bool:
    """Whether this is what a kill left of a file that was being replaced."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def remove_torn(folder: Path) -> None:
    """Delete what kills left of files that were being replaced; for the one process that writes into the folder."""
    for path in [path for path in folder.iterdir() if is_torn(path)]:
        path.unlink()


def read_json(file: Path) -> dict[str, Any]:
    """The object a file holds. Raises RunError when it holds anything else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also UnicodeDecodeError
        raise RunError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{file} holds a {type(value).__name__}; expected an object")
    return value


def to_json(value: Any, path: Path, indent: int | None = None) -> str:
    """Keys keep the order they were given in. Paths become text; anything else JSON does not know is an error.

    Written as ASCII: model output may hold lone surrogates, which UTF-8 cannot.
    """
    try:
        return json.dumps(value, allow_nan=False, indent=indent, default=_plain)
    except ValueError as error:  # NaN or infinity: other programs could not read the file
        name = _first_non_finite(value, "")
        raise RunError(f"{path.name}: {name or 'a value'} is not finite; leave it out, or write None") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON; convert it to a plain number or text first")


def _first_non_finite(value: Any, name: str) -> str:
    """Dotted name of the first NaN or infinity in a nested value; empty when there is none."""
    if isinstance(value, float):
        return f"{name} = {value}" if value != value or value in (float("inf"), float("-inf")) else ""
    if isinstance(value, Mapping):
        children: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, Sequence) and not isinstance(value, str):
        children = enumerate(value)
    else:
        return ""
    found = (_first_non_finite(child, f"{name}.{key}" if name else str(key)) for key, child in children)
    return next(filter(None, found), "")


def append_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append in one write and hand it to the operating system: it then survives the death of this process.

    Raises RunError naming the file when it cannot be written.
    """
    data = "".join(to_json(row, file) + "\n" for row in rows).encode()
    with _named(file, len(data)):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+b") as stream:
            _mend_last_line(stream)
            stream.write(data)


def _mend_last_line(stream: Any) -> None:
    """Cut off a torn last line; a whole one that lacks only its line end gets it."""
    size = stream.seek(0, os.SEEK_END)
    if size == 0:
        return
    stream.seek(size - 1)
    if stream.read(1) == b"\n":
        return
    stream.seek(0)
    last = stream.read().rpartition(b"\n")[2]  # rare: only after a kill
    if _parse_line(last) is None:
        stream.truncate(size - len(last))
    else:
        stream.write(b"\n")


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None when it is torn, which always shows: no proper prefix of an object is an object."""
    try:
        row = json.loads(line)
    except ValueError:  # also UnicodeDecodeError
        return None
    return row if isinstance(row, dict) else None


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log, oldest first, read one by one; none where there is no file.

    Raises RunError naming a line in the middle that is no object.
    """
    if not file.exists():
        return
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            row = _parse_line(line)
            if row is not None:
                yield row
            elif line.endswith(b"\n"):
                raise RunError(f"{file} line {number} is not a JSON object: {line[:60]!r}; restore or remove that line")


def synced_size(file: Path) -> int:
    """Bytes of a file, once they are on the disk; 0 where there is none."""
    if not file.exists():
        return 0
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        return os.fstat(stream.fileno()).st_size
