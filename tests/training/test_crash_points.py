"""Every operation of a save can be its last: killed, cut off from power, refused, or on a disk that is full."""

import errno
import os
import random
import re
import shutil
import warnings
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from power import Disk, Killed

from medrl.errors import CheckpointError
from medrl.runs import Run, is_run
from medrl.training.checkpoint import latest_checkpoint, list_checkpoints, load_state, save_checkpoint
from medrl.training.manifest import read_manifest, verify

LEFT = ("process died", "power cut", "power cut, names kept")
WEIGHTS = bytes(range(256)) * 4


def write_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(WEIGHTS[:100])


def save(root: Path, step: int, value: int, keep: int = 2) -> Path:
    tensors = {"w.exp_avg": torch.full((2, 3), float(value)), "random.torch": torch.arange(5, dtype=torch.uint8)}
    return save_checkpoint(root, step, write_model, tensors, {"value": value}, {"code": "1.2.3"}, keep)


@pytest.fixture(autouse=True)
def no_real_sync(monkeypatch):
    """A disk takes its time to sync, and outside of ``Disk`` nothing here depends on it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def value_of(path: Path | None) -> int | None:
    return load_state(path)[1]["value"] if path else None


SCENARIOS = {"first": (2, 2), "next step": (2, 2), "same step": (1, 2), "keep one": (2, 1)}


def one_save(root: Path, scenario: str) -> None:
    """The save under test, whose value is 2."""
    step, keep = SCENARIOS[scenario]
    save(root / "run" / "checkpoints", step, value=2, keep=keep)


@pytest.fixture(scope="module")
def befores(tmp_path_factory) -> dict[str, Path]:
    """The folder as each scenario finds it."""
    places = {}
    for scenario in SCENARIOS:
        places[scenario] = tmp_path_factory.mktemp("before")
        if scenario != "first":
            save(places[scenario] / "run" / "checkpoints", 1, value=1)
    return places


def operations_of(before: Path, root: Path, scenario: str) -> list[str]:
    shutil.copytree(before, root)
    with Disk(root) as disk:
        one_save(root, scenario)
    return disk.operations


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_crash_at_any_operation_leaves_the_previous_or_the_new_checkpoint(befores, tmp_path, scenario):
    operations = operations_of(befores[scenario], tmp_path / "count", scenario)
    assert {name.split()[0] for name in operations} >= {"mkdir", "open", "create", "write", "sync", "replace"}
    old = None if scenario == "first" else 1
    seen: dict[str, list[int | None]] = {left: [] for left in LEFT}
    for fatal in range(1, len(operations) + 1):
        root = tmp_path / str(fatal)
        shutil.copytree(befores[scenario], root)
        with pytest.raises(Killed), Disk(root, fatal=fatal) as disk:
            one_save(root, scenario)
        cut = disk.after_power_cut(tmp_path / f"{fatal}-cut")
        named = disk.after_power_cut(tmp_path / f"{fatal}-named", names=True)
        for left, place in zip(LEFT, (root, cut, named), strict=True):
            checkpoints = place / "run" / "checkpoints"
            value = value_of(latest_checkpoint(checkpoints))
            assert value in (old, 2), (left, operations[fatal - 1])
            for path in list_checkpoints(checkpoints):
                verify(path)  # nothing has to be set aside
            seen[left].append(value)
            one_save(place, scenario)  # and the run goes on
            assert value_of(latest_checkpoint(checkpoints)) == 2
            assert not [path for path in checkpoints.iterdir() if path.name.startswith(".tmp") or path.suffix]
            shutil.rmtree(place)
    for left in LEFT:  # first the old one, from some operation on the new one
        assert seen[left] == sorted(seen[left], key=lambda value: value == 2), left
        assert set(seen[left]) == {old, 2}, left


def test_a_power_cut_right_after_a_save_takes_nothing_of_it(tmp_path):
    root = tmp_path / "disk"
    root.mkdir()
    with Disk(root) as disk:
        save(root / "deep" / "run" / "checkpoints", 1, value=1)
    left = disk.after_power_cut(tmp_path / "left")
    assert value_of(latest_checkpoint(left / "deep" / "run" / "checkpoints")) == 1


def test_the_disk_of_these_tests_does_lose_what_is_not_synced(tmp_path):
    root = tmp_path / "disk"
    root.mkdir()
    with Disk(root) as disk:
        (root / "synced").write_text("whole")
        for path in (root / "synced", root):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        (root / "synced").write_text("changed since")
        (root / "new").write_text("bytes")
    cut = disk.after_power_cut(tmp_path / "cut")
    named = disk.after_power_cut(tmp_path / "named", names=True)
    assert {path.name: path.read_text() for path in cut.iterdir()} == {"synced": "whole"}
    assert {path.name: path.read_text() for path in named.iterdir()} == {"synced": "whole", "new": ""}


def begin_and_save(path: Path) -> None:
    """A run from its folder to its first checkpoint, as training makes one, or goes on with one."""
    run = Run.open(path) if is_run(path) else Run.create(path, {"steps": 2}, {"data_fingerprint": "f"})
    checkpoint = latest_checkpoint(run.checkpoints)
    offsets = load_state(checkpoint)[1]["log_offsets"] if checkpoint else dict.fromkeys(run.offsets(), 0)
    run.truncate(offsets)
    for step in range(read_manifest(checkpoint)["step"] if checkpoint else 0, 2):
        run.append_metrics({"step": step})
        run.append_rollouts([{"step": step, "completion": "x"}])
        state = {"log_offsets": run.offsets()}
        save_checkpoint(run.checkpoints, step + 1, write_model, {}, state, {})


@pytest.mark.parametrize("left", LEFT)
def test_a_run_that_crashes_anywhere_from_its_first_file_on_goes_on_with_whole_logs(tmp_path, left):
    (tmp_path / "count").mkdir()
    with Disk(tmp_path / "count") as disk:
        begin_and_save(tmp_path / "count" / "runs" / "a")
    for fatal in range(1, disk.count + 1):
        root = tmp_path / str(fatal)
        root.mkdir()
        with pytest.raises(Killed), Disk(root, fatal=fatal) as crashed:
            begin_and_save(root / "runs" / "a")
        place = root
        if left != "process died":
            place = crashed.after_power_cut(tmp_path / f"{fatal}-left", names=left != "power cut")
        begin_and_save(place / "runs" / "a")
        run = Run.open(place / "runs" / "a")
        assert [row["step"] for row in run.metrics()] == [0, 1], disk.operations[fatal - 1]
        assert [row["step"] for row in run.rollouts()] == [0, 1]
        assert not [path for path in run.path.iterdir() if path.suffix == ".tmp"]


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("scenario", ["next step", "same step", "keep one"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_an_operation_that_is_refused_is_a_checkpoint_error_and_the_previous_or_new_checkpoint_stands(
    befores, tmp_path, scenario, number
):
    operations = operations_of(befores[scenario], tmp_path / "count", scenario)
    for fatal in range(1, len(operations) + 1):
        root = tmp_path / str(fatal)
        shutil.copytree(befores[scenario], root)
        saved = True
        with (
            warnings.catch_warnings(record=True) as caught,
            Disk(root, fatal=fatal, error=OSError(number, os.strerror(number))),
        ):
            try:
                one_save(root, scenario)
            except CheckpointError:
                saved = False
        assert all("cannot be deleted" in str(warning.message) for warning in caught)
        value = value_of(latest_checkpoint(root / "run" / "checkpoints"))
        assert value == 2 or (value == 1 and not saved), operations[fatal - 1]


@pytest.mark.parametrize("tenth", range(10))
def test_a_disk_that_fills_up_at_any_offset_leaves_the_previous_checkpoint_and_says_what_is_missing(
    befores, tmp_path, monkeypatch, tenth
):
    shutil.copytree(befores["next step"], tmp_path / "whole")
    with Disk(tmp_path / "whole") as disk:
        one_save(tmp_path / "whole", "next step")
    root = tmp_path / "full"
    shutil.copytree(befores["next step"], root)
    before = files_of(root)
    # The room looks ample when the save begins: somebody else takes it meanwhile.
    usage = namedtuple("usage", "total used free")
    free = iter([10**9, 7])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, next(free)))
    with pytest.raises(CheckpointError) as caught, Disk(root, room=disk.bytes * tenth // 10):
        one_save(root, "next step")
    said = re.search(
        r"step 2 needs at least (\d+) bytes .* room for (\d+): at least (\d+) bytes are", str(caught.value)
    )
    assert str(caught.value).startswith("the disk is full: ") and said
    needs, room, missing = map(int, said.groups())
    assert room >= 7 and missing == needs - room > 0
    assert files_of(root) == before
    assert value_of(latest_checkpoint(root / "run" / "checkpoints")) == 1


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_first_checkpoint_also_asks_for_room_before_it_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 100, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs at least 1024 bytes .* at least 924 bytes are missing"):
        save_checkpoint(tmp_path / "new", 1, write_model, {"w": torch.zeros(6)}, {}, {}, model_bytes=1000)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_named(befores, tmp_path):
    root = tmp_path / "disk"
    shutil.copytree(befores["next step"], root)
    (root / "run" / "checkpoints").chmod(0o500)
    try:
        if os.geteuid() == 0:  # whom no mode stops
            with pytest.raises(CheckpointError) as caught, Disk(root, fatal=1, error=PermissionError(errno.EACCES, "")):
                one_save(root, "next step")
        else:
            with pytest.raises(CheckpointError) as caught:
                one_save(root, "next step")
    finally:
        (root / "run" / "checkpoints").chmod(0o700)
    assert f"the checkpoint of step 2 cannot be written to {root / 'run' / 'checkpoints'}" in str(caught.value)
    assert value_of(latest_checkpoint(root / "run" / "checkpoints")) == 1


def test_a_rename_that_fails_leaves_the_previous_checkpoint_and_no_rubbish(befores, tmp_path, monkeypatch):
    root = tmp_path / "disk"
    shutil.copytree(befores["next step"], root)
    before = files_of(root)

    def refuse(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match="Invalid cross-device link; checkpoints saved before are whole"):
        one_save(root, "next step")
    assert files_of(root) == before


# ---------------------------------------------------------------- damaged


def damage(folder: Path, draw: random.Random) -> str:
    """Damage one file at random; says which and how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = draw.choice(files)
    content = path.read_bytes()
    place = draw.randrange(len(content))
    kind = draw.choice(["bit", "cut", "zeros", "longer", "gone", "emptied", "swapped", "noise"])
    if kind == "bit":
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
    elif kind == "cut":
        path.write_bytes(content[:place])
    elif kind == "zeros":
        zeroed = content[:place] + bytes(min(64, len(content) - place)) + content[place + 64 :]
        path.write_bytes(zeroed if zeroed != content else content[:-1])
    elif kind == "longer":
        path.write_bytes(content + draw.randbytes(draw.randrange(1, 9)))
    elif kind == "gone":
        path.unlink()
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "swapped":
        other = draw.choice([each for each in files if each != path])
        theirs = other.read_bytes()
        other.write_bytes(content)
        path.write_bytes(theirs)
    else:
        path.write_bytes(draw.randbytes(len(content)))
    return f"{kind} {path.relative_to(folder)}"


def test_two_hundred_random_corruptions_of_the_newest_are_all_found_and_none_is_loaded(tmp_path):
    root = tmp_path / "checkpoints"
    save(root, 1, value=1)
    save(root, 2, value=2)
    newest = (root / "step-000002").rename(tmp_path / "whole")
    draw = random.Random(7)
    done = set()
    for _ in range(200):
        shutil.copytree(newest, root / "step-000002")
        what = damage(root / "step-000002", draw)
        done.add(what)
        with pytest.raises(CheckpointError):
            verify(root / "step-000002")
        with pytest.warns(UserWarning, match="set aside as step-000002"):
            assert value_of(latest_checkpoint(root)) == 1, what
        (aside,) = root.glob("*.corrupt")
        shutil.rmtree(aside)
    assert len(done) > 30  # files times ways
    kinds = {"bit", "cut", "zeros", "longer", "gone", "emptied", "swapped", "noise"}
    assert {name.split()[0] for name in done} == kinds
