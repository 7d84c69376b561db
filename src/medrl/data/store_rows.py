"""The rows of a store: examples checked, written as Parquet, read back, and the fingerprint over them."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from medrl.data.paths import safe_path
from medrl.errors import DataError
from medrl.types import KINDS, LETTERS, Example

FORMAT_VERSION = 1
COLUMNS = tuple(column.name for column in fields(Example))
WHAT_A_STORE_IS = (
    "a store is a folder with data.parquet, store.json and images/; make one with "
    "`medrl import ... --out STORE` or medrl.data.store.write_store"
)
# Stores written before there were kinds of question or rationales lack these columns; their rows mean the defaults.
_LATER_COLUMNS: dict[str, Any] = {"kind": "choice", "references": [], "tolerance": "", "rationale": None}
_LIST_COLUMNS = ("images", "options", "references")
_OPTIONAL_COLUMNS = ("patient", "rationale")
"""May be null."""


def check_examples(rows: Sequence[Example]) -> None:
    if not rows:
        raise DataError("there are no examples to store: a store has at least one row")
    repeated = [id for id, count in Counter(row.id for row in rows).items() if count > 1]
    if repeated:
        raise DataError(f"{len(repeated)} ids occur more than once, e.g. {repeated[0]!r}: a store needs unique ids")
    for number, row in enumerate(rows):
        if problem := find_problem(row.kind, row.options, row.target):
            raise DataError(f"row {number} ({row.id!r}) has {problem}")
        broken = [name for name in COLUMNS if not _is_utf8(_plain(getattr(row, name)))]
        if broken:
            raise DataError(f"row {number} ({row.id!r}): {broken[0]} is not valid Unicode text")
        for image in row.images:
            if not image.is_file():
                raise DataError(f"row {number} ({row.id!r}): image {image} does not exist or is not a file")


def find_problem(kind: str, options: Sequence[str], target: str) -> str:
    """What is wrong with the kind, options or target of a row; empty when nothing is."""
    if kind not in KINDS:
        return f"kind {kind!r}; the kinds are {', '.join(KINDS)}"
    asks_for_letters = kind in ("choice", "multi_select")
    if len(options) > len(LETTERS) or (asks_for_letters and len(options) < 2):
        return f"{len(options)} options; there must be 2 to {len(LETTERS)}"
    offered = LETTERS[: len(options)]
    chosen = target.split(", ") if kind == "multi_select" else [target]
    if asks_for_letters and not all(len(letter) == 1 and letter in offered for letter in chosen):
        return f"target {target!r}, but its options are {', '.join(offered)}"
    if kind == "yes_no" and target not in ("yes", "no"):
        return f"target {target!r}; the target of a yes_no question is yes or no"
    return "" if target.strip() else "an empty target"


def write_rows(path: Path, rows: Sequence[Example]) -> None:
    import pyarrow
    import pyarrow.parquet

    kinds = {name: pyarrow.list_(pyarrow.string()) if name in _LIST_COLUMNS else pyarrow.string() for name in COLUMNS}
    columns = {name: [_plain(getattr(row, name)) for row in rows] for name in COLUMNS}
    table = pyarrow.table(columns, schema=pyarrow.schema(list(kinds.items())))
    pyarrow.parquet.write_table(table, path, compression="zstd")


def read_rows(path: Path) -> list[Example]:
    """Rows of data.parquet, images relative as they stand there."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path / "data.parquet")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path / 'data.parquet'} is not readable Parquet ({error}); import the data again") from error
    missing = [name for name in COLUMNS if name not in table.column_names and name not in _LATER_COLUMNS]
    if missing:
        raise DataError(f"{path / 'data.parquet'} has no column {', '.join(missing)}; {WHAT_A_STORE_IS}")
    rows = table.select([name for name in COLUMNS if name in table.column_names]).to_pylist()
    return [_to_example(path, number, {**_LATER_COLUMNS, **row}) for number, row in enumerate(rows)]


def fingerprint_of(rows: Sequence[Example], digests: dict[str, str]) -> str:
    """sha256 over the rows in order, each with its fields and the sha256 of its images' bytes."""
    total = hashlib.sha256(f"medrl store {FORMAT_VERSION}\n".encode())
    for row in rows:
        plain = {name: _plain(getattr(row, name)) for name in COLUMNS}
        # Left out at their defaults, so that stores written before these columns keep their fingerprint.
        plain = {key: value for key, value in plain.items() if _LATER_COLUMNS.get(key, ...) != value}
        plain["bytes"] = [digests[image.as_posix()] for image in row.images]
        total.update(json.dumps(plain, sort_keys=True).encode() + b"\n")
    return total.hexdigest()


def _to_example(path: Path, number: int, row: dict[str, Any]) -> Example:
    for name in COLUMNS:
        value = row[name]
        fits = isinstance(value, str) or (value is None and name in _OPTIONAL_COLUMNS)
        if name in _LIST_COLUMNS:
            fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if not fits:
            raise DataError(f"store {path}, row {number}: {name} is {value!r}; import the data again")
    if problem := find_problem(row["kind"], row["options"], row["target"]):
        raise DataError(f"store {path}, row {number} has {problem}; import the data again")
    images = tuple(_stored_name(path, number, image) for image in row["images"])
    lists = {"images": images, "options": tuple(row["options"]), "references": tuple(row["references"])}
    return Example(**{**row, **lists})


def _stored_name(path: Path, number: int, image: str) -> Path:
    try:
        # images/ itself may be a link, to where the images lie; nothing may lead out of that folder.
        if image.startswith("images/"):
            return safe_path(path / "images", image.removeprefix("images/")).relative_to(path)
        return safe_path(path, image).relative_to(path)
    except DataError as error:
        raise DataError(f"store {path}, row {number}: {error}") from error


def _plain(value: str | tuple[Any, ...] | None) -> str | list[str] | None:
    if isinstance(value, tuple):
        return [item.as_posix() if isinstance(item, Path) else item for item in value]
    return value


def _is_utf8(value: str | list[str] | None) -> bool:
    """False for half a surrogate pair, which JSON can spell and no file can hold."""
    texts = [value] if isinstance(value, str) else value or []
    return not any("\ud800" <= character <= "\udfff" for text in texts for character in text)
