"""A disk on which every step of a save can be the last: it counts them, fails at one, shows what a power cut leaves.

    with Disk(root) as disk:                     # counts: open, create, write, sync, replace, mkdir, unlink, ...
        save(...)
    with Disk(root, fatal=17) as disk:           # raises Killed in place of operation 17, and of each one after it
        save(...)
    disk.after_power_cut(elsewhere)              # what is left where only what was synced is on the disk
    disk.after_power_cut(elsewhere, names=True)  # every name, but of the bytes only those that were synced
    # root itself: what the death of a process leaves, all that was handed to the system

A write that fails has half of its bytes in the file.
"""

import builtins
import errno
import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from medrl.training import checkpoint

NAMED = ("mkdir", "replace", "rename", "unlink", "rmdir", "truncate")
"""Operations of ``os`` on a path."""
REAL = {name: getattr(os, name) for name in (*NAMED, "open")}
REAL_OPEN, REAL_SAVE = io.open, checkpoint.save_file


class Killed(BaseException):
    """The process ends here: nothing runs after it, not even cleaning up."""


class Disk:
    """Everything below ``root``, which must exist."""

    def __init__(
        self, root: Path, *, fatal: int | None = None, error: OSError | None = None, room: int | None = None
    ) -> None:
        """
        Args:
            fatal: number of the operation that fails, from 1; None counts only.
            error: what that one operation raises; None kills, and whatever is tried after it fails too.
            room: bytes that can be written before the disk is full; None has enough.
        """
        self.root, self.fatal, self.error, self.room = root, fatal, error, room
        self.operations: list[str] = []
        self.bytes = 0
        self._files: dict[int, bytes] = {}
        self._folders: dict[int, dict[str, int]] = {}
        """What was synced, by inode."""
        self._grave = root.with_name(f"{root.name}-grave")
        self._patch = pytest.MonkeyPatch()

    @property
    def count(self) -> int:
        return len(self.operations)

    def __enter__(self) -> "Disk":
        self._grave.mkdir()
        for path in [self.root, *self.root.rglob("*")]:  # what is there is on the disk
            self._keep(path)
        for name in NAMED:
            self._patch.setattr(os, name, self._counted(name))
        self._patch.setattr(os, "open", self._os_open)
        self._patch.setattr(os, "fsync", self._fsync)
        self._patch.setattr(io, "open", self._open)
        self._patch.setattr(builtins, "open", self._open)
        self._patch.setattr(checkpoint, "save_file", self._save_file)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
        shutil.rmtree(self._grave)

    def after_power_cut(self, target: Path, *, names: bool = False) -> Path:
        """Build what is left into ``target``; see the module."""
        if not names:
            self._rebuild(self.root.stat().st_ino, target)
            return target
        shutil.copytree(self.root, target)
        for path in [path for path in target.rglob("*") if path.is_file()]:
            inode = (self.root / path.relative_to(target)).stat().st_ino
            path.write_bytes(self._files.get(inode, b""))
        return target

    def _rebuild(self, inode: int, target: Path) -> None:
        target.mkdir()
        for name, child in self._folders[inode].items():
            if child in self._folders:
                self._rebuild(child, target / name)
            else:
                (target / name).write_bytes(self._files.get(child, b""))

    # ---------------------------------------------------------------- operations

    def _step(self, operation: str, path: Path) -> bool:
        """Count an operation on something below root; True when it is the one that fails."""
        if not path.is_relative_to(self.root):
            return False
        self.operations.append(f"{operation} {path.relative_to(self.root)}")
        if self.fatal is None or self.count < self.fatal:
            return False
        return self.count == self.fatal or self.error is None

    def _fail(self) -> None:
        raise Killed if self.error is None else self.error

    def _counted(self, name: str) -> Any:
        def operation(path: Any, *rest: Any, dir_fd: int | None = None, **options: Any) -> None:
            full = _full(path, dir_fd)
            if self._step(name, full):
                self._fail()
            if name in ("unlink", "rmdir") and full.is_relative_to(self.root):
                # Kept elsewhere, so that its inode is not given to something new.
                REAL["rename"](full, self._grave / str(len(self.operations)))
                return
            REAL[name](path, *rest, **options, **({} if dir_fd is None else {"dir_fd": dir_fd}))
            if name == "mkdir":
                self._folders[full.stat().st_ino] = {}

        return operation

    def _os_open(self, path: Any, flags: int, *rest: Any, dir_fd: int | None = None) -> int:
        if self._step("open", _full(path, dir_fd)):
            self._fail()
        return REAL["open"](path, flags, *rest, dir_fd=dir_fd)

    def _fsync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if self._step("sync", path):
            self._fail()
        self._keep(path)  # and no real sync, which takes its time and proves nothing here

    def _keep(self, path: Path) -> None:
        """The present state of a file or folder reaches the disk."""
        inode = path.stat().st_ino
        if path.is_dir():
            self._folders[inode] = {child.name: child.stat().st_ino for child in path.iterdir()}
        else:
            with REAL_OPEN(path, "rb") as stream:
                self._files[inode] = stream.read()

    def _open(self, path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if isinstance(path, int):
            return REAL_OPEN(path, mode, *rest, **options)
        if self._step("create" if set(mode) & set("wx") else "open", Path(path)):
            self._fail()
        stream = REAL_OPEN(path, mode, *rest, **options)
        return _Writing(self, stream, Path(path)) if set(mode) & set("wax+") else stream

    def _save_file(self, tensors: Any, path: Path) -> None:
        """safetensors writes outside of Python: here as the creation of a file and one write."""
        if self._step("create", path):
            self._fail()
        REAL_SAVE(tensors, path)
        with REAL_OPEN(path, "rb") as stream:
            content = stream.read()
        fits, error = self._write(path, len(content))
        if error is not None:
            with REAL_OPEN(path, "wb") as stream:
                stream.write(content[:fits])
            if isinstance(error, OSError):  # in safetensors' words, as a full tmpfs makes it say them
                words = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                raise SafetensorError(words)
            raise error

    def _write(self, path: Path, size: int) -> tuple[int, BaseException | None]:
        """Count a write of ``size`` bytes: how many of them it writes, and how it fails."""
        if self._step("write", path):
            return size // 2, Killed() if self.error is None else self.error
        if self.room is not None and path.is_relative_to(self.root) and self.bytes + size > self.room:
            fits, self.bytes = self.room - self.bytes, self.room
            return fits, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.bytes += size
        return size, None


class _Writing:
    """An open file whose writes count."""

    def __init__(self, disk: Disk, stream: Any, path: Path) -> None:
        self._disk, self._stream, self._path = disk, stream, path

    def write(self, content: Any) -> int:
        fits, error = self._disk._write(self._path, len(content))
        self._stream.write(content[:fits])
        if error is not None:
            self._stream.flush()
            raise error
        return len(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> "_Writing":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __iter__(self) -> Any:
        return iter(self._stream)


def _full(path: Any, dir_fd: int | None) -> Path:
    folder = Path() if dir_fd is None else Path(os.readlink(f"/proc/self/fd/{dir_fd}"))
    return folder / os.fspath(path)
