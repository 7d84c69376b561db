"""The pictures that rows name or carry -> files that can be opened, each checked once."""

import base64
import binascii
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medrl.data.images import View, check_image, open_image, open_slices
from medrl.data.paths import safe_path
from medrl.data.phi import MODALITIES, check_burned_in
from medrl.data.readers.rows import RowError
from medrl.data.scan_dicom import read_dicom_header
from medrl.data.scan_files import scan_kind
from medrl.errors import DataError, ImageError

_SUFFIXES = {
    b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"BM": ".bmp", b"II*\0": ".tif", b"MM\0*": ".tif",
}  # fmt: skip
_DATA_URI = "data:image/"
_MAX_EMBEDDED_BYTES = 256 * 2**20


def _digest(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()[:16]


class Pictures:
    """Finds the pictures of rows: under ``root`` by path, inside the row as bytes or data URI, in a scan as slices.

    Attributes:
        unpacked: whether files were written into ``unpack``; such pictures must be copied into the store.
    """

    def __init__(
        self,
        root: Path,
        unpack: Path,
        *,
        view: View | None = None,
        decode: bool = False,
        square_px: int | None = None,
        folders: Sequence[str] = (),
        pixels_are_clean: bool = False,
        name_of: Callable[[str], str] = _digest,
    ) -> None:
        """
        Args:
            root: paths in rows are relative to it and must stay under it.
            unpack: folder for pictures that come inside rows, and for slices of scans; made when needed.
            view: which slices of a scan, through which window.
            decode: decode every picture now; otherwise only what can be told cheaply is checked.
            square_px: redraw every picture as a PNG of this many pixels squared, as Med-R1's data was (384).
            folders: sub-folders of ``root`` in which a source's bare file names may lie.
            pixels_are_clean: the user says that no text is burned into DICOM pixels, see ``phi.py``.
            name_of: path of a scan -> name of its slices; a scan's own name may be a patient's.
        """
        self.root, self.unpack, self.view = root, unpack, view or View()
        self.decode, self.square_px, self.folders = decode, square_px, ("", *folders)
        self.pixels_are_clean, self.name_of = pixels_are_clean, name_of
        self.unpacked = False
        self._found_by_name: set[str] = set()
        self._unwindowed: Counter[str] = Counter()
        self._names: dict[str, list[str]] | None = None
        self._found: dict[Path, tuple[Path, ...]] = {}

    def find(self, cell: Any) -> tuple[Path, ...]:
        """The picture files of one cell: a path, bytes, ``{"bytes", "path"}``, a data URI, or a list of these.

        Raises:
            RowError, ImageError: it names nothing that is here, leads out of the root, or cannot be decoded.
        """
        if isinstance(cell, list | tuple):
            return tuple(path for item in cell for path in self.find(item))
        named = None
        if isinstance(cell, dict):
            named = cell.get("name") or cell.get("path")
            cell = next((cell[key] for key in ("bytes", "image", "url", "path") if cell.get(key) is not None), None)
        if isinstance(cell, str) and cell.startswith(_DATA_URI):
            cell = _decode_uri(cell)
        if isinstance(cell, bytes):
            return self._embedded(cell, named)
        if not isinstance(cell, str) or not cell.strip():
            raise RowError(f"image is {str(cell)[:80]!r}, not a path")
        return self._checked(self._locate(cell))

    def notes(self) -> list[str]:
        """What the user should know of how pictures were found and drawn, a sentence each."""
        notes = []
        if count := len(self._found_by_name):
            were = "picture was" if count == 1 else "pictures were"
            notes.append(f"{count} {were} found by its file's name alone, elsewhere below {self.root}")
        if self._unwindowed:
            others = ", ".join(f"{count} {what}" for what, count in sorted(self._unwindowed.items()))
            notes.append(f"--window {self.view.window} is for CT; drawn without it: {others}")
        return notes

    def is_here(self, relative: str) -> bool:
        """Whether there is a file ``relative`` under the root; says nothing of whether it can be decoded.

        Raises:
            RowError: the path leads out of the root.
        """
        return any(path.is_file() for path in self._candidates(relative))

    def by_name(self, name: str) -> str | None:
        """Path below the root of the one file that is called ``name``, in whatever folder; None where there is none.

        Raises:
            RowError: several files are called so, and it would be a guess.
        """
        if self._names is None:
            self._names = {}
            for path in self.root.rglob("*"):
                if path.is_file():
                    self._names.setdefault(path.name, []).append(path.relative_to(self.root).as_posix())
        found = self._names.get(name, [])
        if len(found) > 1:
            raise RowError(
                f"image {name} is not where the row says, and {len(found)} files have its name: {found[0]}, ..."
            )
        self._found_by_name.update(found)
        return found[0] if found else None

    def _locate(self, relative: str) -> Path:
        found = next((path for path in self._candidates(relative) if path.is_file()), None)
        if found is None:
            named = "image" if scan_kind(Path(relative)) else f"image {relative}"  # a scan's name may be a patient's
            raise RowError(f"{named} does not exist")
        return found

    def _candidates(self, relative: str) -> Iterator[Path]:
        for folder in self.folders:
            try:
                yield safe_path(self.root, f"{folder}/{relative}" if folder else relative)
            except DataError as error:
                raise RowError(str(error)) from error

    def _checked(self, path: Path) -> tuple[Path, ...]:
        if path not in self._found:
            self._found[path] = self._prepare(path)
        return self._found[path]

    def _prepare(self, path: Path) -> tuple[Path, ...]:
        kind = scan_kind(path)
        view = self.view
        if kind is None and view.windows:
            self._unwindowed["not DICOM"] += 1
        if kind is None and self.square_px is None:
            if self.decode:
                open_image(path)
            else:
                check_image(path)
            return (path,)
        if kind == "DICOM":
            header = read_dicom_header(path)
            check_burned_in(path, header, self.pixels_are_clean)
            modality = str(header.get("Modality", ""))
            if view.windows and modality != "CT":
                view = replace(view, window="file")
                self._unwindowed[modality if modality in MODALITIES else "DICOM of another kind"] += 1
        slices = open_slices(path, view)
        stem = path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.name
        stem = self.name_of(stem) if kind else stem.removesuffix(path.suffix)
        names = [f"{stem}-{i}.png" if len(slices) > 1 else f"{stem}.png" for i in range(len(slices))]
        return tuple(self._draw(image, name) for image, name in zip(slices, names, strict=True))

    def _draw(self, image: Any, name: str) -> Path:
        stem, number, target = name.removesuffix(".png"), 1, self._place(name)
        while target.exists():  # 1.jpg beside 1.png: each picture is drawn once, so what is there is another's
            number += 1
            target = self._place(f"{stem}-{number}.png")
        if self.square_px:
            image = image.resize((self.square_px, self.square_px))
        image.save(target, format="PNG")
        return target

    def _embedded(self, content: Any, named: Any) -> tuple[Path, ...]:
        if not isinstance(content, bytes) or not content or len(content) > _MAX_EMBEDDED_BYTES:
            raise RowError("the image inside the row is empty, too large or no bytes")
        suffix = next((suffix for magic, suffix in _SUFFIXES.items() if content.startswith(magic)), ".bin")
        name = f"{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
        if isinstance(named, str) and named:
            try:
                name = safe_path(self.unpack, named).relative_to(self.unpack).as_posix()
            except DataError:
                name = f"{Path(name).stem}{suffix}"
        target = self._place(name)
        if target.is_file() and target.read_bytes() != content:
            target = self._place(f"{hashlib.sha256(content).hexdigest()[:16]}-{target.name}")
        if not target.is_file():
            target.write_bytes(content)
        try:
            return self._checked(target)
        except ImageError:
            target.unlink()
            raise

    def _place(self, name: str) -> Path:
        self.unpacked = True
        target = self.unpack / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


def _decode_uri(uri: str) -> bytes:
    head, _, body = uri.partition(",")
    if not head.endswith(";base64"):
        raise RowError(f"image {uri[:40]!r}... is a data URI without base64")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise RowError(f"image {uri[:40]!r}... is not base64: {error}") from error
