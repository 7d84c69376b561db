"""Files -> rows: JSON, JSON Lines, CSV, TSV, Parquet, a folder of these, or a data set of the Hugging Face hub."""

import codecs
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medrl.errors import DataError, SettingsError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_SPREADSHEETS = (".xlsx", ".xls", ".ods")
_SPLIT_FIELDS = ("split", "phrase_type")
"""Where a row says which split it is of; VQA-RAD's phrase types are ``test_freeform``, ``freeform`` and such."""
_BATCH_ROWS = 64
_MAX_FIELD_BYTES = 16 * 2**20


class RowError(ValueError):
    """Why a row is bad; caught where its file and position are known."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it stood."""

    file: Path
    """Name as shown to the user."""
    position: int
    """From 0; -1 when the whole file could not be read."""
    value: Any
    """A dict of fields, or the RowError that stood in the way of reading it."""

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.file.with_suffix("").as_posix()

    @property
    def id(self) -> str:
        """For rows that bring none: file and position."""
        return f"{self.name}/{self.position}"


class Rows:
    """The rows of some files, in order; Parquet and hub rows are read as they are asked for."""

    def __init__(self, parts: list[tuple[Path, int, Any]], split: str | None = None) -> None:
        """
        Args:
            parts: (name, number of rows, iterable of values or a RowError for the whole file).
            split: only rows that say so themselves; None: all.
        """
        self.parts, self.split = parts, split

    def only(self, *names: str) -> "Rows":
        """The parts whose path says one of ``names``; all where none does."""
        said = [part for part in self.parts if any(name in part[0].as_posix() for name in names)]
        return Rows(said or self.parts, self.split)

    def __len__(self) -> int:
        return sum(count for _, count, _ in self.parts)

    def __iter__(self) -> Iterator[Row]:
        for name, _, values in self.parts:
            if isinstance(values, RowError):
                yield Row(name, -1, values)
                continue
            for position, value in enumerate(values):
                if self.split is None or not isinstance(value, dict):
                    yield Row(name, position, value)
                elif (said := _split_said(value)) is None:
                    reason = f"its file's name does not say {self.split!r}, and the row has no field split"
                    yield Row(name, position, RowError(reason))
                elif said == self.split.casefold():
                    yield Row(name, position, value)


def _split_said(row: dict[str, Any]) -> str | None:
    """The split that the row says it is of; None where it says none."""
    name = next((name for name in _SPLIT_FIELDS if row.get(name)), None)
    if name is None:
        return None
    said = str(row[name]).strip().casefold()
    return said if name == "split" else "test" if said.startswith("test") else "train"


def rows_of(
    path: Path, what: str, split: str | None = None, config: str | None = None, apart: tuple[str, ...] = ()
) -> Rows:
    """Rows of a file, of a folder's files, or of the hub data set of that name.

    Args:
        what: the source's name, for the message.
        split: of a folder, the files with this in their name, or in the names of their folders. Of one file that is not
            called so, the rows that say it.
        config: of a hub data set.
        apart: sub-folders that hold no questions, whatever files lie there.

    Raises:
        DataError: there is nothing to read.
    """
    if _saved_to_disk(path):
        return hub_rows(str(path), split=split)
    if path.exists():
        files = find_files(path, what, apart=apart)
        root = path if path.is_dir() else None
        called = _called(files, path, split) if split else files
        if called:
            return rows_of_files(called, root)
        if len(files) > 1:
            raise DataError(
                f"{path} holds no {what}: there is no file ({', '.join(SUFFIXES)}) with {split} in its name"
            )
        return Rows(rows_of_files(files, root).parts, split)
    if path.is_absolute() or path.suffix in SUFFIXES or str(path).count("/") != 1:
        raise DataError(f"{path} does not exist: give a file or folder of {what}, or a hub id like owner/name")
    return hub_rows(str(path), config=config, split=split)


def rows_of_files(files: list[Path], root: Path | None = None, encoding: str | None = None) -> Rows:
    """The rows of ``files``, told apart by suffix. A file that cannot be read is one row with position -1.

    Args:
        root: files are called by their path below it; without it by their bare name.
        encoding: of text; by default what the file's first bytes say, else UTF-8.

    Raises:
        DataError: a file does not exist or is of no known kind.
        SettingsError: there is no such encoding.
    """
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError as error:
        raise SettingsError(f"--encoding {encoding!r} is none; give e.g. cp1252, latin-1 or utf-16") from error
    return Rows([(file.relative_to(root) if root else Path(file.name), *_read(file, encoding)) for file in files])


def find_files(path: Path, what: str, apart: tuple[str, ...] = ()) -> list[Path]:
    """``path`` itself, or the files of a known kind under the folder ``path``, sorted.

    Args:
        what: the source, for the message.
        apart: sub-folders that are not looked into.

    Raises:
        DataError: there is none.
    """
    if path.is_file():
        return [path]
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in SUFFIXES and not _hidden(file, path) and file.relative_to(path).parts[0] not in apart
    ]
    if not found:
        raise DataError(f"{path} holds no {what}: there is no file ({', '.join(SUFFIXES)})")
    return found


def _called(files: list[Path], path: Path, split: str) -> list[Path]:
    """The files with ``split`` in their names; where there are none, those in folders called so."""
    by_name = [file for file in files if split in file.name]
    return by_name or [file for file in files if path.is_dir() and split in file.relative_to(path).as_posix()]


def hub_rows(name: str, *, config: str | None = None, split: str | None = None) -> Rows:
    """The rows of the hub data set ``name``, of a local folder of the same form, or of one that ``save_to_disk`` wrote.

    Images stay encoded.

    Raises:
        DataError: ``datasets`` cannot load it; says what it said.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        if _saved_to_disk(Path(name)):
            loaded = datasets.load_from_disk(name)
            loaded = loaded[split] if split and isinstance(loaded, dict) else loaded
        else:
            loaded = datasets.load_dataset(name, config, split=split)
    except (ValueError, OSError, LookupError, RuntimeError) as error:
        raise DataError(f"{name} cannot be loaded through datasets: {type(error).__name__}: {error}") from error
    parts = loaded if isinstance(loaded, dict) else {split or "rows": loaded}
    return Rows(
        [
            (Path(f"{Path(name).name}-{part}"), len(rows), _with_names(_undecoded(rows), Path(name)))
            for part, rows in parts.items()
        ]
    )


def _saved_to_disk(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _undecoded(rows: Any) -> Any:
    """The same rows with images as the bytes they came in."""
    import datasets

    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(column, type(feature)(datasets.Image(decode=False)))
    return rows


def _with_names(rows: Any, folder: Path) -> Iterator[Any]:
    """The same rows with the names of classes for their numbers, and with the bytes of images that lie in files."""
    import datasets

    classes = {column: kind for column, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)}
    images = [column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    for row in rows:
        named = {column: kind.int2str(row[column]) for column, kind in classes.items() if row[column] is not None}
        yield {**row, **named, **{column: _with_bytes(row[column], folder) for column in images}}


def _with_bytes(image: Any, folder: Path) -> Any:
    """An image of a folder of images: ``datasets`` names its file by a whole path, which no other row may."""
    from datasets.config import HF_CACHE_HOME
    from huggingface_hub.constants import HF_HUB_CACHE

    if not isinstance(image, dict) or image.get("bytes") is not None or not Path(image.get("path") or "").is_absolute():
        return image
    path = Path(image["path"])
    for root in (folder, Path(HF_HUB_CACHE), Path(HF_CACHE_HOME)):
        if path.resolve().is_relative_to(root.resolve()) and path.is_file():
            name = (
                path.relative_to(folder.absolute()).as_posix() if path.is_relative_to(folder.absolute()) else path.name
            )
            return {"bytes": path.read_bytes(), "path": name}
    return image


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _read(file: Path, encoding: str | None = None) -> tuple[int, Any]:
    """Number of rows, and the rows or the RowError that stands for the whole file."""
    kind = file.suffix.lower()
    if file.is_dir():
        tables = [path.name for path in sorted(file.iterdir()) if path.suffix.lower() in SUFFIXES]
        raise DataError(
            f"{file} is a folder: give one file ({', '.join(tables) or 'it holds no table'}); medrl import folder "
            "reads DIR/LABEL/IMAGE, and medrl import dicom a folder of DICOM"
        )
    if not file.is_file():
        raise DataError(f"{file} does not exist: check the path")
    try:
        if kind == ".parquet":
            return _read_parquet(file)
        text = _decoded(file.read_bytes(), encoding)
        if kind == ".json":
            rows = _json_list(json.loads(text))
        elif kind in (".jsonl", ".ndjson"):
            rows = [_json_line(line) for line in text.split("\n") if line.strip()]
        elif kind in (".csv", ".tsv"):
            rows = _csv_rows(text, "\t" if kind == ".tsv" else ",")
        else:
            hint = "; save it as CSV (UTF-8) in the spreadsheet program" if kind in _SPREADSHEETS else ""
            raise DataError(f"{file} is of no kind that medrl reads: {', '.join(SUFFIXES)}{hint}")
    except DataError:
        raise
    except RowError as error:
        return 1, error
    except (ValueError, RecursionError, OSError, csv.Error) as error:
        return 1, RowError(f"not {kind[1:].upper()}: {error}")
    return len(rows), rows


def _decoded(content: bytes, encoding: str | None) -> str:
    """Text in ``encoding``, or in the one that its first bytes say, or UTF-8."""
    if encoding is None:
        encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeError as error:
        start = getattr(error, "start", None)
        where = "" if start is None else f" (byte {content[start]:#04x} at {start})"
        name = encoding.removesuffix("-sig").replace("utf", "UTF")
        raise RowError(
            f"not {name}{where}: if a spreadsheet program on Windows wrote it, medrl import table takes "
            "--encoding cp1252; or convert it: iconv -f cp1252 -t utf-8 OLD > NEW"
        ) from error


def _json_list(content: Any) -> list[Any]:
    """The list itself, or the one list that an object holds, as in ``{"data": [...]}``."""
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) == 1:
            return lists[0]
    if not isinstance(content, list):
        raise RowError(f"holds a {type(content).__name__}, not a list of rows")
    return content


def _json_line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return RowError(f"not JSON: {error}")


def _csv_rows(text: str, delimiter: str) -> list[Any]:
    csv.field_size_limit(_MAX_FIELD_BYTES)
    header = text.partition("\n")[0]
    if delimiter == "," and "," not in header and ";" in header:  # as spreadsheets write it where the comma is decimal
        delimiter = ";"
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter)
    rows: list[Any] = []
    for row in reader:
        if None in row:
            rows.append(RowError(f"has {len(row[None])} fields more than the header names"))
        else:
            rows.append({name.strip(): value for name, value in row.items() if name is not None})
    return rows


def _read_parquet(file: Path) -> tuple[int, Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        return 1, RowError(f"not Parquet: {error}")
    return table.metadata.num_rows, _parquet_rows(table)


def _parquet_rows(table: Any) -> Iterator[Any]:
    for batch in table.iter_batches(_BATCH_ROWS):
        yield from batch.to_pylist()
