"""MANIFEST.json: what a checkpoint must hold to be whole, and the check that it does.

format, step               of this layout; steps that were done
files                      {name: {bytes, sha256}} of every other file
recipe_sha256              of the run's recipe
data_fingerprint           of the training data
code, versions             of medrl, down to its source, and of what it computes with
world_size                 processes that trained
sha256                     of all of the above, so that damage to any byte shows
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medrl.errors import CheckpointError

MANIFEST = "MANIFEST.json"
FORMAT = 1


def verify(path: Path) -> None:
    """Raise ``CheckpointError`` naming the first file that is missing or not what was saved."""
    files = read_manifest(path)["files"]
    verify_files(path, files, sorted(files))


def read_manifest(path: Path) -> dict[str, Any]:
    """What MANIFEST.json holds: ``format``, ``step``, ``files`` and the fields given when it was saved."""
    try:
        content = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path}: {MANIFEST} cannot be read ({error.strerror}): it is incomplete"
        ) from None
    try:
        manifest = json.loads(content)
        own_hash = manifest.pop("sha256")
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is damaged") from None
    if content != manifest_bytes(manifest) or own_hash != hashlib.sha256(json_bytes(manifest)).hexdigest():
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is damaged")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {manifest.get('format')}, but this version of medrl reads format {FORMAT}"
        )
    return manifest


def make_manifest(folder: Path, step: int, facts: Mapping[str, Any]) -> bytes:
    """The manifest of the files that ``folder`` holds now; ``facts`` are further fields."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {path.relative_to(folder).as_posix(): _entry(path) for path in files}
    fields = {"format": FORMAT, "step": step, "files": entries}
    assert not fields.keys() & facts.keys(), f"manifest fields {sorted(facts)} use reserved names"
    return manifest_bytes(json.loads(json_bytes({**fields, **facts})))


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The manifest with its own hash, so that damage to any byte of it shows."""
    return json_bytes({**manifest, "sha256": hashlib.sha256(json_bytes(manifest)).hexdigest()})


def verify_files(path: Path, files: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> None:
    """The same for some of the files only."""
    for name in names:
        if name not in files:
            raise CheckpointError(f"checkpoint {path}: {MANIFEST} lists no {name}: it is not a training checkpoint")
        expected = files[name]
        try:
            size = (path / name).stat().st_size
            digest = _sha256(path / name) if size == expected["bytes"] else ""
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {path}: {name} cannot be read ({error.strerror}): copy it from "
                "another checkpoint of the run, or use that one"
            ) from None
        if size != expected["bytes"]:
            raise CheckpointError(f"checkpoint {path}: {name} has {size} bytes, but {expected['bytes']} were saved")
        if digest != expected["sha256"]:
            raise CheckpointError(f"checkpoint {path}: {name} is not what was saved: its SHA-256 differs")


def json_bytes(value: Any) -> bytes:
    """JSON with sorted keys: equal values give equal bytes. Raises ``ValueError`` for NaN and infinity."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def json_sha256(value: Any) -> str:
    """Hash of a JSON value, e.g. of a recipe."""
    return hashlib.sha256(json_bytes(value)).hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
