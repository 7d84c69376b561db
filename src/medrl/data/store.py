"""A data set on disk <-> Examples. A store is a folder:

data.parquet   one row per example, the columns of ``Example``; ``datasets.load_dataset("parquet", ...)`` reads it
images/        each image once, under a readable name and without metadata; or a link to the folder where they lie;
               ``images`` in the rows are paths relative to the store
store.json     where it came from, under which license, counts, and a fingerprint over every field and byte
"""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import unicodedata
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

from medrl.data.paths import safe_path
from medrl.errors import DataError
from medrl.types import KINDS, LETTERS, Example

FORMAT_VERSION = 1
COLUMNS = tuple(column.name for column in fields(Example))
# Stores written before there were kinds of question or rationales lack these columns; their rows mean the defaults.
_LATER_COLUMNS: dict[str, Any] = {"kind": "choice", "references": [], "tolerance": "", "rationale": None}
_SPARE_BYTES = 64 * 2**20
_LIST_COLUMNS = ("images", "options", "references")
_OPTIONAL_COLUMNS = ("patient", "rationale")
"""May be null."""
_WHAT_A_STORE_IS = (
    "a store is a folder with data.parquet, store.json and images/; make one with "
    "`medrl import ... --out STORE` or medrl.data.store.write_store"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """What store.json says."""

    format_version: int
    source: str
    license: str
    citation: str
    rows: int
    images: int
    """Image files, each counted once however many rows show it."""
    modalities: dict[str, int]
    """Rows by modality."""
    question_types: dict[str, int]
    """Rows by question type."""
    fingerprint: str
    """sha256 over all rows and image bytes: two stores with the same one hold the same data."""
    created_by: str
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever the reader of the source wanted to keep, e.g. the seed of a split."""


def write_store(
    out: Path,
    examples: Iterable[Example],
    *,
    source: str,
    license: str,
    citation: str = "",
    extra: dict[str, Any] | None = None,
    copy: bool = True,
) -> StoreInfo:
    """Write ``examples`` and their images as a new store at ``out``.

    Everything is written into a hidden folder beside ``out`` and renamed at the end, so ``out`` is whole or absent.

    Args:
        out: folder to make; it may exist if it is empty.
        examples: at least one; their images may lie anywhere.
        source, license, citation: where the data came from and on what terms.
        extra: more facts for store.json; must be JSON.
        copy: write the images into the store, without their metadata; False leaves them where they are, and makes
            ``images/`` a link to the folder they share.

    Raises:
        DataError: ``out`` is taken, an example is malformed, an image is missing, or the disk is too small.
    """
    out, rows = Path(out), list(examples)
    _check_vacant(out)
    _check_examples(rows)
    names = _name_images(rows) if copy else _names_in_place(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    if copy:
        _check_space(out.parent, names)
    draft = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        draft.mkdir()
        digests = _copy_images(names, draft) if copy else _link_images(names, draft)
        stored = [replace(row, images=tuple(Path(names[image]) for image in row.images)) for row in rows]
        _write_rows(draft / "data.parquet", stored)
        totals = counts(stored)
        info = StoreInfo(
            format_version=FORMAT_VERSION,
            source=source,
            license=license,
            citation=citation,
            rows=len(rows),
            images=len(digests),
            modalities=totals["modality"],
            question_types=totals["question_type"],
            fingerprint=_fingerprint(stored, digests),
            created_by=f"medrl {_version()}",
            extra=extra or {},
        )
        (draft / "store.json").write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        draft.rename(out)
    except OSError as error:
        raise DataError(f"store {out} could not be written, nothing is left of it: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return info


def load(path: Path) -> list[Example]:
    """The examples of the store at ``path``, in their order, with images as paths under ``path``.

    Raises:
        DataError: not a store, a newer format, a malformed row, or an image that is missing or lies outside the store.
    """
    path, info = Path(path), read_info(path)
    stored = _read_rows(path)
    if len(stored) != info.rows:
        raise DataError(f"store {path} has {len(stored)} rows, but its store.json says {info.rows}: import it again")
    found: dict[Path, Path] = {}
    for number, row in enumerate(stored):
        for image in row.images:
            if image not in found:
                found[image] = _find_image(path, image, number)
    return [replace(row, images=tuple(found[image] for image in row.images)) for row in stored]


def read_info(path: Path) -> StoreInfo:
    """What store.json of the store at ``path`` says; DataError when there is none or it is not ours."""
    path = Path(path)
    for name in ("store.json", "data.parquet"):
        if not (path / name).is_file():
            raise DataError(f"{path} is not a store: it has no {name}; {_WHAT_A_STORE_IS}")
    try:
        content = json.loads((path / "store.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path / 'store.json'} is not JSON ({error}); import the data again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path / 'store.json'} has format_version {version!r}, this medrl reads {FORMAT_VERSION}: "
            "update medrl, or import the data again"
        )
    known = {item.name for item in fields(StoreInfo)}
    missing = known - content.keys()
    if missing:
        raise DataError(f"{path / 'store.json'} lacks {', '.join(sorted(missing))}; import the data again")
    return StoreInfo(**{name: content[name] for name in known})


def verify(path: Path) -> StoreInfo:
    """Recompute the fingerprint of the store at ``path``; DataError when a field or an image byte has changed."""
    info, examples = read_info(path), load(path)
    names = {image: image.relative_to(path).as_posix() for row in examples for image in row.images}
    digests = {name: _digest_file(image) for image, name in names.items()}
    stored = [replace(row, images=tuple(Path(names[image]) for image in row.images)) for row in examples]
    fingerprint = _fingerprint(stored, digests)
    if fingerprint != info.fingerprint:
        raise DataError(
            f"store {path} has changed since it was written: its fingerprint is {fingerprint[:16]}..., "
            f"store.json says {info.fingerprint[:16]}...; import the data again"
        )
    return info


def counts(examples: Iterable[Example]) -> dict[str, dict[str, int]]:
    """Number of examples, ``{"modality": {name: n}, "question_type": {name: n}}``, the most frequent first."""
    rows = list(examples)
    return {
        "modality": dict(Counter(row.modality for row in rows).most_common()),
        "question_type": dict(Counter(row.question_type for row in rows).most_common()),
    }


# --- writing ---------------------------------------------------------------------------------------------------------


def _check_vacant(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DataError(f"{out} exists and is not a folder: choose another --out")
    if out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out} exists and is not empty: choose another --out, or remove it first")


def _check_examples(rows: Sequence[Example]) -> None:
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


def _name_images(rows: Sequence[Example]) -> dict[Path, str]:
    """Path of each image -> its name in the store, ``images/...``; a file met under two paths gets one name."""
    from medrl.data.clean import must_be_redrawn

    absolute = _absolute_images(rows)
    depth = len(_shared_folder(absolute.values()).parts)
    names: dict[Path, str] = {}
    name_of_file: dict[Path, str] = {}
    taken: set[str] = set()
    for image, path in absolute.items():
        file = path.resolve()
        if file not in name_of_file:
            name = "/".join(map(_safe_part, path.parts[depth:]))
            if must_be_redrawn(path):
                name = str(PurePosixPath(name).with_suffix(".png"))
            name_of_file[file] = _free_name(name, taken)
        names[image] = name_of_file[file]
    return names


def _names_in_place(rows: Sequence[Example]) -> dict[Path, str]:
    """The same where ``images/`` is a link to the folder that all images share."""
    absolute = _absolute_images(rows)
    folder = _shared_folder(absolute.values())
    names = {image: path.relative_to(folder).as_posix() for image, path in absolute.items()}
    for name in names.values():
        try:
            safe_path(folder, name)
        except DataError as error:
            raise DataError(
                f"{error}; or copy the images into the store (--copy), which gives them plain names"
            ) from error
    return {image: f"images/{name}" for image, name in names.items()}


def _absolute_images(rows: Sequence[Example]) -> dict[Path, Path]:
    return {image: Path(os.path.abspath(image)) for row in rows for image in row.images}


def _shared_folder(paths: Iterable[Path]) -> Path:
    folders = {str(path.parent) for path in paths}
    return Path(os.path.commonpath(folders)) if folders else Path()


def _link_images(names: dict[Path, str], draft: Path) -> dict[str, str]:
    """Make ``images/`` a link to the folder of the images; name of each -> sha256 of its bytes."""
    if names:
        (draft / "images").symlink_to(_shared_folder(Path(os.path.abspath(image)) for image in names))
    else:
        (draft / "images").mkdir()
    return {name: _digest_file(image) for image, name in names.items()}


def _safe_part(part: str) -> str:
    """A file name that every file system takes; blanks, ``&`` and brackets survive."""
    name = re.sub(r'[\x00-\x1f\x7f\\/:*?"<>|\ud800-\udfff]', "_", unicodedata.normalize("NFC", part))
    name = re.sub(r"^[.\s]|[.\s]$", "_", name)
    stem, suffix = PurePosixPath(name).stem, PurePosixPath(name).suffix[:20]
    while len((stem + suffix).encode()) > 200:
        stem = stem[:-1]
    return stem + suffix


def _free_name(name: str, taken: set[str]) -> str:
    """``images/name``, numbered when a file of that name, in any case, is already there."""
    pure = PurePosixPath("images", name)
    candidate, number = pure, 1
    while str(candidate).casefold() in taken:
        number += 1
        candidate = pure.with_name(f"{pure.stem}-{number}{pure.suffix}")
    taken.add(str(candidate).casefold())
    return str(candidate)


def _check_space(folder: Path, names: dict[Path, str]) -> None:
    sizes = {name: image.stat().st_size for image, name in names.items()}
    needed, free = sum(sizes.values()) + _SPARE_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"the store needs {needed / 2**20:.0f} MiB, but {folder} has {free / 2**20:.0f} MiB free: "
            "free some space, or choose another --out"
        )


def _copy_images(names: dict[Path, str], draft: Path) -> dict[str, str]:
    """Copy each image once under ``draft``; its name -> sha256 of the bytes that were written."""
    from medrl.data.clean import copy_picture

    (draft / "images").mkdir()
    digests: dict[str, str] = {}
    for image, name in names.items():
        if name in digests:
            continue
        target = draft / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_picture(image, target)
        digests[name] = _digest_file(target)
    return digests


def _write_rows(path: Path, rows: Sequence[Example]) -> None:
    import pyarrow
    import pyarrow.parquet

    kinds = {name: pyarrow.list_(pyarrow.string()) if name in _LIST_COLUMNS else pyarrow.string() for name in COLUMNS}
    columns = {name: [_plain(getattr(row, name)) for row in rows] for name in COLUMNS}
    table = pyarrow.table(columns, schema=pyarrow.schema(list(kinds.items())))
    pyarrow.parquet.write_table(table, path, compression="zstd")


def _plain(value: str | tuple[Any, ...] | None) -> str | list[str] | None:
    if isinstance(value, tuple):
        return [item.as_posix() if isinstance(item, Path) else item for item in value]
    return value


def _is_utf8(value: str | list[str] | None) -> bool:
    """False for half a surrogate pair, which JSON can spell and no file can hold."""
    texts = [value] if isinstance(value, str) else value or []
    return not any("\ud800" <= character <= "\udfff" for text in texts for character in text)


def _fingerprint(rows: Sequence[Example], digests: dict[str, str]) -> str:
    """sha256 over the rows in order, each with its fields and the sha256 of its images' bytes."""
    total = hashlib.sha256(f"medrl store {FORMAT_VERSION}\n".encode())
    for row in rows:
        plain = {name: _plain(getattr(row, name)) for name in COLUMNS}
        # Left out at their defaults, so that stores written before these columns keep their fingerprint.
        plain = {key: value for key, value in plain.items() if _LATER_COLUMNS.get(key, ...) != value}
        plain["bytes"] = [digests[image.as_posix()] for image in row.images]
        total.update(json.dumps(plain, sort_keys=True).encode() + b"\n")
    return total.hexdigest()


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version() -> str:
    try:
        return importlib.metadata.version("medrl")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_rows(path: Path) -> list[Example]:
    """Rows of data.parquet, images relative as they stand there."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path / "data.parquet")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path / 'data.parquet'} is not readable Parquet ({error}); import the data again") from error
    missing = [name for name in COLUMNS if name not in table.column_names and name not in _LATER_COLUMNS]
    if missing:
        raise DataError(f"{path / 'data.parquet'} has no column {', '.join(missing)}; {_WHAT_A_STORE_IS}")
    rows = table.select([name for name in COLUMNS if name in table.column_names]).to_pylist()
    return [_to_example(path, number, {**_LATER_COLUMNS, **row}) for number, row in enumerate(rows)]


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


def _find_image(path: Path, image: Path, number: int) -> Path:
    if not (path / image).is_file():
        raise DataError(f"store {path}, row {number}: image {image} does not exist; import the data again")
    return path / image
