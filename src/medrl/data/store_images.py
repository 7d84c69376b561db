"""The pictures of a store: what each is called there, and how it gets there: copied without metadata, or by a link."""

import hashlib
import os
import re
import shutil
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from medrl.data.paths import safe_path
from medrl.errors import DataError
from medrl.types import Example

Names = Literal["keep", "digest"]
"""What images are called in a store: after their own path below the folder they share, or after their bytes."""

_SPARE_BYTES = 64 * 2**20
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Of what is copied as it is."""


def name_images(rows: Sequence[Example], wanted: Names = "keep") -> dict[Path, str]:
    """Path of each image -> its name in the store, ``images/...``; a file met under two paths gets one name.

    A scan is always called by a digest of its bytes: its own name, and its folder's, may be a patient's.
    """
    from medrl.data.clean import must_be_redrawn
    from medrl.data.scan_files import scan_kind

    absolute = _absolute_images(rows)
    depth = len(_shared_folder(absolute.values()).parts)
    names: dict[Path, str] = {}
    name_of_file: dict[Path, str] = {}
    taken: set[str] = set()
    for image, path in absolute.items():
        file = path.resolve()
        if file not in name_of_file:
            name = "/".join(map(_safe_part, path.parts[depth:]))
            if scan_kind(path):
                name = f"scan-{digest_file(path)[:16]}.png"
            else:
                if wanted == "digest":
                    suffix = path.suffix.lower()
                    name = f"image-{digest_file(path)[:16]}{suffix if suffix in _SUFFIXES else ''}"
                if must_be_redrawn(path):
                    name = str(PurePosixPath(name).with_suffix(".png"))
            name_of_file[file] = _free_name(name, taken)
        names[image] = name_of_file[file]
    return names


def names_in_place(rows: Sequence[Example]) -> dict[Path, str]:
    """The same where ``images/`` is a link to the folder that all images share.

    Raises:
        DataError: a name cannot stand in a row, or a file is a scan: its header would be a part of the store.
    """
    from medrl.data.scan_files import scan_kind

    absolute = _absolute_images(rows)
    folder = _shared_folder(absolute.values())
    names = {image: path.relative_to(folder).as_posix() for image, path in absolute.items()}
    for number, (image, name) in enumerate(names.items()):
        if kind := scan_kind(image):
            raise DataError(
                f"image {number} is a {kind} file, whose header may name a patient: a store does not link to it. Copy "
                "its pixels into the store (--copy, copy=True), or import it with `medrl import dicom`"
            )
        try:
            safe_path(folder, name)
        except DataError as error:
            raise DataError(
                f"{error}; or copy the images into the store (--copy), which gives them plain names"
            ) from error
    return {image: f"images/{name}" for image, name in names.items()}


def check_space(folder: Path, names: dict[Path, str]) -> None:
    sizes = {name: image.stat().st_size for image, name in names.items()}
    needed, free = sum(sizes.values()) + _SPARE_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"the store needs {needed / 2**20:.0f} MiB, but {folder} has {free / 2**20:.0f} MiB free: "
            "free some space, or choose another --out"
        )


def copy_images(names: dict[Path, str], draft: Path) -> dict[str, str]:
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
        digests[name] = digest_file(target)
    return digests


def link_images(names: dict[Path, str], draft: Path) -> dict[str, str]:
    """Make ``images/`` a link to the folder of the images; name of each -> sha256 of its bytes."""
    if names:
        (draft / "images").symlink_to(_shared_folder(Path(os.path.abspath(image)) for image in names))
    else:
        (draft / "images").mkdir()
    return {name: digest_file(image) for image, name in names.items()}


def digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _absolute_images(rows: Sequence[Example]) -> dict[Path, Path]:
    return {image: Path(os.path.abspath(image)) for row in rows for image in row.images}


def _shared_folder(paths: Iterable[Path]) -> Path:
    folders = {str(path.parent) for path in paths}
    return Path(os.path.commonpath(folders)) if folders else Path()


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
