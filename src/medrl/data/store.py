"""A data set on disk <-> Examples. A store is a folder:

data.parquet   one row per example, the columns of ``Example``; ``datasets.load_dataset("parquet", ...)`` reads it
images/        each image once, under its own name or a digest's, without metadata; or a link to where they lie;
               ``images`` in the rows are paths relative to the store
store.json     where it came from, under which license, counts, and a fingerprint over every field and byte
"""

import json
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from medrl.data import verified
from medrl.data.store_images import (
    Names,
    check_space,
    copy_images,
    digest_file,
    link_images,
    name_images,
    names_in_place,
)
from medrl.data.store_rows import FORMAT_VERSION, WHAT_A_STORE_IS, check_examples, fingerprint_of, read_rows, write_rows
from medrl.errors import DataError, SettingsError
from medrl.provenance import medrl_version
from medrl.types import Example

_FIRST_STORES = 8


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
    names: Names = "keep",
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
        names: ``digest`` calls images after their bytes, where their own names or folders may be a patient's.

    Raises:
        SettingsError: ``digest`` without ``copy``: images that are linked to keep their names.
        DataError: ``out`` is taken, an example is malformed, an image is missing, or the disk is too small.
    """
    out, rows = Path(out), list(examples)
    check_vacant(out)
    check_examples(rows)
    if names == "digest" and not copy:
        raise SettingsError("names='digest' needs copy=True: images that are linked to keep their names")
    name_of = name_images(rows, names) if copy else names_in_place(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    if copy:
        check_space(out.parent, name_of)
    draft = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        draft.mkdir()
        digests = copy_images(name_of, draft) if copy else link_images(name_of, draft)
        stored = [replace(row, images=tuple(Path(name_of[image]) for image in row.images)) for row in rows]
        write_rows(draft / "data.parquet", stored)
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
            fingerprint=fingerprint_of(stored, digests),
            created_by=f"medrl {medrl_version()}",
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
    stored = read_rows(path)
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
            inside = [*path.glob("*/store.json"), *path.glob("*/*/store.json")]
            names = ", ".join(
                sorted(file.parent.relative_to(path.parent).as_posix() for file in inside)[:_FIRST_STORES]
            )
            held = f"it holds stores: {names}" if inside else WHAT_A_STORE_IS
            raise DataError(f"{path} is not a store: it has no {name}; {held}")
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


def verify(path: Path, examples: Sequence[Example] | None = None) -> StoreInfo:
    """Recompute the fingerprint of the store at ``path``; DataError when a field or an image byte has changed.

    Where it was verified before, and no file of it has another size or time since, image bytes are not read again.

    Args:
        examples: what ``load`` gave for this path, where the caller has it.
    """
    path, info = Path(path), read_info(path)
    examples = load(path) if examples is None else examples
    images = dict.fromkeys(image for row in examples for image in row.images)
    state = verified.state_of([path / "store.json", path / "data.parquet", *images])
    if verified.is_verified(state):
        return info
    names = {image: image.relative_to(path).as_posix() for image in images}
    digests = {name: digest_file(image) for image, name in names.items()}
    stored = [replace(row, images=tuple(Path(names[image]) for image in row.images)) for row in examples]
    fingerprint = fingerprint_of(stored, digests)
    if fingerprint != info.fingerprint:
        raise DataError(
            f"store {path} has changed since it was written: its fingerprint is {fingerprint[:16]}..., "
            f"store.json says {info.fingerprint[:16]}...; import the data again"
        )
    verified.remember(state)
    return info


def store_of(examples: Iterable[Example]) -> Path | None:
    """The one store that all images lie in; None when there is none."""
    images = [image for example in examples for image in example.images]
    found = next(
        (folder for folder in (images[0].parents if images else ()) if (folder / "store.json").is_file()), None
    )
    return found if found is not None and all(image.is_relative_to(found) for image in images) else None


def counts(examples: Iterable[Example]) -> dict[str, dict[str, int]]:
    """Number of examples, ``{"modality": {name: n}, "question_type": {name: n}}``, the most frequent first."""
    rows = list(examples)
    return {
        "modality": dict(Counter(row.modality for row in rows).most_common()),
        "question_type": dict(Counter(row.question_type for row in rows).most_common()),
    }


def check_vacant(out: Path) -> None:
    """Raise ``DataError`` unless a store can be written to ``out``: nothing, or an empty folder, is there."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DataError(f"{out} exists and is not a folder: choose another --out")
    if out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out} exists and is not empty: choose another --out, or remove it first")


def _find_image(path: Path, image: Path, number: int) -> Path:
    if not (path / image).is_file():
        raise DataError(f"store {path}, row {number}: image {image} does not exist; import the data again")
    return path / image
