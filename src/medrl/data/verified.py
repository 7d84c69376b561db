"""Stores that were verified in their present state, so that not every start of a run reads every byte of them again.

What is remembered is an empty file, named by a digest of every file's place, size and times of change; no path and no
name is kept. Delete ``$MEDRL_CACHE/verified`` (default ``~/.cache/medrl/verified``) to have all bytes read once more.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def state_of(files: Iterable[Path]) -> str:
    """64 hex digits that change when a file changes, is replaced or moves. Raises ``OSError`` where one is missing."""
    digest = hashlib.sha256()
    for file in files:
        facts = file.stat()
        # The second time is the system's own: a file that was put back with its old date has a new one.
        state = f"{file.absolute()}\0{facts.st_size}\0{facts.st_mtime_ns}\0{facts.st_ctime_ns}\n"
        digest.update(state.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def is_verified(state: str) -> bool:
    """Whether files in this state were verified before."""
    with contextlib.suppress(OSError):
        return (_folder() / state).is_file()
    return False


def remember(state: str) -> None:
    """Note that files in this state were verified; where no note can be kept, the next start reads them again."""
    with contextlib.suppress(OSError):
        _folder().mkdir(parents=True, exist_ok=True)
        (_folder() / state).touch()


def _folder() -> Path:
    return Path(os.environ.get("MEDRL_CACHE") or Path.home() / ".cache" / "medrl") / "verified"
