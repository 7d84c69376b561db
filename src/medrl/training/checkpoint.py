"""Checkpoints that are whole or absent: written aside, synced, hashed, moved into place, verified.

    checkpoints/step-000300/   Hugging Face files
                               trainer/optimizer.safetensors, trainer/state.json
                               MANIFEST.json     size and SHA-256 of each file, written last

At any instant a crash, a kill or a full disk leaves a checkpoint that verifies, if there was one before. There is no
pointer to the newest: it is found by looking. Only safetensors and JSON are read, so a checkpoint cannot run code.
"""

import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from medrl.errors import CheckpointError
from medrl.files import DISK_FULL, make_folder, sync
from medrl.training.manifest import MANIFEST, json_bytes, make_manifest, read_manifest, verify, verify_files

OPTIMIZER = "trainer/optimizer.safetensors"
STATE = "trainer/state.json"
FOLDER = re.compile(r"step-(\d+)(\.replaced)?")
"""A checkpoint; ``.replaced`` for the moment in which another takes the place of one of the same step."""


def save_checkpoint(
    root: Path,
    step: int,
    write_model: Callable[[Path], None],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    manifest: Mapping[str, Any],
    keep: int = 2,
    model_bytes: int = 0,
) -> Path:
    """Save a checkpoint as ``root/step-000300`` and delete all but the ``keep`` newest up to it. Returns its folder.

    ``write_model(folder)`` writes the Hugging Face files; ``tensors`` (optimizer, random states) and ``state`` (plain
    JSON values) are what ``load_state`` gives back; ``manifest`` holds further fields, such as the code version, to be
    kept in MANIFEST.json; ``model_bytes`` is about what the Hugging Face files will take. Raises ``CheckpointError``
    when the disk is full or cannot be written to; the checkpoints that were there stay whole.
    """
    assert keep >= 1, f"keep is {keep}: it would delete the checkpoint just saved"
    final = root / checkpoint_name(step)
    scratch = root / f".tmp-{final.name}-{secrets.token_hex(4)}"
    needed = 0
    try:
        make_folder(root)
        remove_leftovers(root)
        needed = _bytes_needed(root, tensors, model_bytes)
        _check_space(root, step, needed)
        _write(scratch, step, write_model, tensors, state, manifest)
        _move_into_place(scratch, final)
    except (OSError, SafetensorError) as error:
        message = _cannot_write(root, scratch, step, needed, error)
        shutil.rmtree(scratch, ignore_errors=True)
        raise CheckpointError(message) from error
    verify(final)
    _retire(root, step, keep)
    return final


def checkpoint_name(step: int) -> str:
    """Folder of the checkpoint after ``step`` steps."""
    return f"step-{step:06d}"


def latest_checkpoint(root: Path, *, set_aside: bool = True) -> Path | None:
    """The newest checkpoint that verifies, or None.

    One that does not is renamed to ``step-000300.corrupt``, with a warning that names the bad file, and the one before
    it is tried. With ``set_aside`` false nothing is renamed: for readers of a run that may still be training.
    """
    for folder in reversed(list_checkpoints(root)):
        try:
            verify(folder)
        except CheckpointError as error:
            fate = f"it was set aside as {_set_aside(folder).name}" if set_aside else "it is passed over"
            warnings.warn(f"{error}; {fate}, an older one is used", stacklevel=2)
        else:
            return folder
    return None


def list_checkpoints(root: Path) -> list[Path]:
    """All checkpoint folders, oldest step first, verified or not."""
    found = [(FOLDER.fullmatch(path.name), path) for path in root.iterdir()] if root.is_dir() else []
    ordered = sorted((int(match[1]), match[2] is None, path) for match, path in found if match and path.is_dir())
    return [path for *_, path in ordered]


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The ``tensors`` (on the CPU) and ``state`` given to ``save_checkpoint``; verifies the two files it reads."""
    verify_files(path, read_manifest(path)["files"], [OPTIMIZER, STATE])
    return load_file(path / OPTIMIZER), json.loads((path / STATE).read_text(encoding="utf-8"))


def remove_leftovers(root: Path) -> None:
    """Delete what saves that were killed left behind."""
    for leftover in root.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _write(
    folder: Path,
    step: int,
    write_model: Callable[[Path], None],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> None:
    """Write a complete checkpoint, its manifest last; on return all of it is on the disk, not in a cache."""
    folder.mkdir()
    write_model(folder)
    (folder / "trainer").mkdir()
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / OPTIMIZER)
    (folder / STATE).write_bytes(json_bytes(state))
    for path in sorted(folder.rglob("*")):
        sync(path)
    (folder / MANIFEST).write_bytes(make_manifest(folder, step, manifest))
    sync(folder / MANIFEST)
    sync(folder)


def _move_into_place(scratch: Path, final: Path) -> None:
    """rename() cannot replace a non-empty folder, so an existing checkpoint of this step is first renamed to
    ``.replaced``."""
    if final.exists():
        aside = final.with_name(f"{final.name}.replaced")
        if aside.exists():
            _discard(aside)
        os.replace(final, aside)
    os.replace(scratch, final)
    sync(final.parent)


def _retire(root: Path, step: int, keep: int) -> None:
    """Delete older checkpoints; only called once the newest has verified."""
    older = [path for path in list_checkpoints(root) if _step_of(path) < step]
    replaced = [path for path in list_checkpoints(root) if path.name.endswith(".replaced")]
    for path in {*older[: max(0, len(older) - (keep - 1))], *replaced}:
        try:
            _discard(path)
        except OSError as error:  # no reason to end a run that has just been saved
            warnings.warn(f"the old checkpoint {path} cannot be deleted: {error}", stacklevel=3)


def _discard(folder: Path) -> None:
    """Rename first: a deletion that is killed half-way must not leave a folder that looks like a checkpoint."""
    doomed = folder.with_name(f".tmp-deleted-{folder.name}-{secrets.token_hex(4)}")
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    aside = folder.with_name(f"{folder.name}.corrupt")
    while aside.exists():
        aside = folder.with_name(f"{folder.name}.{secrets.token_hex(2)}.corrupt")
    os.replace(folder, aside)
    return aside


def _step_of(path: Path) -> int:
    match = FOLDER.fullmatch(path.name)
    assert match, path
    return int(match[1])


def _folder_bytes(folder: Path) -> int:
    """What its files take on the disk, which counts in blocks."""
    found = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(max(each.st_size, 512 * each.st_blocks) for each in found)


def _bytes_needed(root: Path, tensors: Mapping[str, Tensor], model_bytes: int) -> int:
    """As much as the last checkpoint took, and at least the weights and the optimizer's tensors."""
    previous = list_checkpoints(root)
    known = model_bytes + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return max(known, _folder_bytes(previous[-1]) if previous else 0)


def _check_space(root: Path, step: int, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if free < needed:
        raise CheckpointError(_disk_full(root, step, needed, free))


def _cannot_write(root: Path, scratch: Path, step: int, needed: int, error: OSError | SafetensorError) -> str:
    # safetensors words its own errors around the one of the operating system.
    full = error.errno in DISK_FULL if isinstance(error, OSError) else "No space left" in str(error)
    if full:
        room = _folder_bytes(scratch) + shutil.disk_usage(root).free
        return _disk_full(root, step, max(needed, room + 1), room)  # it did not fit into that room
    return f"the checkpoint of step {step} cannot be written to {root}: {error}; checkpoints saved before are whole"


def _disk_full(root: Path, step: int, needed: int, room: int) -> str:
    return (
        f"the disk is full: the checkpoint of step {step} needs at least {needed} bytes in {root}, but there is room "
        f"for {room}: at least {needed - room} bytes are missing; delete something or give another folder, then "
        "resume; checkpoints saved before are whole"
    )
