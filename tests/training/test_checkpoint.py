import errno
import io
import json
import os
import random
import shutil
import warnings
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from medrl.errors import CheckpointError
from medrl.training import checkpoint
from medrl.training.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_state,
    read_manifest,
    save_checkpoint,
    verify,
)


class Killed(BaseException):
    """The process ends here: nothing runs after it, not even cleaning up."""


def write_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)))


def save(root: Path, step: int, value: int | None = None, keep: int = 2) -> Path:
    value = step if value is None else value
    tensors = {"w.exp_avg": torch.full((2, 3), float(value)), "random": torch.arange(5, dtype=torch.uint8)}
    return save_checkpoint(root, step, write_model, tensors, {"value": value}, {"code": "1.2.3"}, keep)


def value_of(path: Path | None) -> int | None:
    return load_state(path)[1]["value"] if path else None


def files_of(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def test_what_was_saved_is_what_is_loaded(tmp_path):
    path = save(tmp_path / "run" / "checkpoints", 300)
    assert path == tmp_path / "run" / "checkpoints" / "step-000300" == latest_checkpoint(path.parent)
    assert files_of(path) == [
        "MANIFEST.json",
        "config.json",
        "model.safetensors",
        "trainer/optimizer.safetensors",
        "trainer/state.json",
    ]
    tensors, state = load_state(path)
    assert tensors["w.exp_avg"].tolist() == [[300.0] * 3] * 2
    assert tensors["random"].dtype == torch.uint8
    assert state == {"value": 300}


def test_the_manifest_lists_every_other_file_and_the_fields_it_was_given(tmp_path):
    path = save(tmp_path, 7)
    manifest = read_manifest(path)
    assert (manifest["format"], manifest["step"], manifest["code"]) == (1, 7, "1.2.3")
    assert sorted(manifest["files"]) == [name for name in files_of(path) if name != "MANIFEST.json"]
    assert manifest["files"]["model.safetensors"] == {
        "bytes": 256,
        "sha256": "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880",
    }


def test_bfloat16_and_views_survive(tmp_path):
    tensors = {"half": torch.tensor([1.5, -2.25], dtype=torch.bfloat16), "view": torch.arange(6.0).reshape(2, 3).T}
    loaded, _ = load_state(save_checkpoint(tmp_path, 1, write_model, tensors, {}, {}))
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_run_without_tensors_can_be_saved(tmp_path):
    assert load_state(save_checkpoint(tmp_path, 1, write_model, {}, {"a": None}, {})) == ({}, {"a": None})


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 30, 400, 1_000_000):
        save(tmp_path, step, keep=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000030", "step-000400", "step-1000000"]
    save(tmp_path, 1_000_001, keep=1)
    assert os.listdir(tmp_path) == ["step-1000001"]


def test_newest_goes_by_number_not_by_name(tmp_path):
    save(tmp_path, 999_999)
    save(tmp_path, 1_000_000)
    assert value_of(latest_checkpoint(tmp_path)) == 1_000_000


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, value=1)
    save(tmp_path, 5, value=2)
    assert value_of(latest_checkpoint(tmp_path)) == 2
    assert os.listdir(tmp_path) == ["step-000005"]


def test_a_folder_without_checkpoints_has_no_latest(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    (tmp_path / ".tmp-step-000004-abcd" / "trainer").mkdir(parents=True)
    (tmp_path / ".tmp-step-000004-abcd" / "model.safetensors").write_text("half")
    assert latest_checkpoint(tmp_path) is None
    save(tmp_path, 5)
    assert os.listdir(tmp_path) == ["step-000005"]


# Every way a save touches the disk, so that each can be made the one at which the process dies.
OPERATIONS = [
    (os, "mkdir"),
    (os, "open"),
    (os, "fsync"),
    (os, "replace"),
    (os, "unlink"),
    (os, "rmdir"),
    (io, "open"),
    ("builtins", "open"),
    (checkpoint, "save_file"),
]


class Disk:
    """Counts operations; from operation ``fatal`` on, each raises ``error`` (only that one, if ``once``)."""

    def __init__(self, monkeypatch, fatal: int | None, error: BaseException, once: bool = False) -> None:
        self.count = 0
        for module, name in OPERATIONS:
            target = f"{module}.{name}" if isinstance(module, str) else None
            original = getattr(__import__(module), name) if isinstance(module, str) else getattr(module, name)

            def guarded(*args, original=original, **kwargs):
                self.count += 1
                if fatal is not None and (self.count == fatal if once else self.count >= fatal):
                    raise error
                return original(*args, **kwargs)

            monkeypatch.setattr(*((target, guarded) if target else (module, name, guarded)))


def one_save(root: Path, scenario: str) -> None:
    step, keep = {"next step": (2, 2), "same step": (1, 2), "keep one": (2, 1), "first": (2, 2)}[scenario]
    save(root, step, value=2, keep=keep)


def prepare(root: Path, scenario: str) -> None:
    root.mkdir()
    if scenario != "first":
        save(root, 1, value=1)


def count_operations(root: Path, scenario: str) -> int:
    prepare(root, scenario)
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = Disk(monkeypatch, None, Killed())
        one_save(root, scenario)
    return disk.count


@pytest.mark.parametrize("scenario", ["next step", "same step", "keep one", "first"])
def test_a_kill_at_any_operation_leaves_the_old_or_the_new_checkpoint(tmp_path, scenario):
    total = count_operations(tmp_path / "count", scenario)
    assert total > 25
    seen = []
    for fatal in range(1, total + 1):
        root = tmp_path / str(fatal)
        prepare(root, scenario)
        with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Killed):
            Disk(monkeypatch, fatal, Killed())
            one_save(root, scenario)
        for path in list_checkpoints(root):
            verify(path)
        seen.append(value_of(latest_checkpoint(root)))
        one_save(root, scenario)  # and the run goes on
        assert value_of(latest_checkpoint(root)) == 2
        assert not [path for path in root.iterdir() if path.name.startswith(".tmp") or path.suffix]
    before = None if scenario == "first" else 1
    assert seen == sorted(seen, key=lambda value: value == 2)
    assert set(seen) == {before, 2}


@pytest.mark.parametrize("scenario", ["next step", "same step", "keep one"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_failing_operation_is_a_checkpoint_error_and_the_old_or_new_checkpoint_stands(tmp_path, scenario, number):
    total = count_operations(tmp_path / "count", scenario)
    for fatal in range(1, total + 1):
        root = tmp_path / str(fatal)
        prepare(root, scenario)
        with pytest.MonkeyPatch.context() as monkeypatch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Disk(monkeypatch, fatal, OSError(number, os.strerror(number)), once=True)
            try:
                one_save(root, scenario)
                saved = True
            except CheckpointError:
                saved = False
        assert all("cannot be deleted" in str(warning.message) for warning in caught)
        value = value_of(latest_checkpoint(root))
        assert value in (1, 2)
        assert value == 2 or not saved


def test_a_kill_while_the_model_is_written_leaves_the_old_checkpoint(tmp_path):
    save(tmp_path, 1)

    def killed_half_way(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise Killed

    with pytest.raises(Killed):
        save_checkpoint(tmp_path, 2, killed_half_way, {}, {}, {})
    assert value_of(latest_checkpoint(tmp_path)) == 1


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    size = sum(file.stat().st_size for file in (tmp_path / "step-000001").rglob("*") if file.is_file())
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 100, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(checkpoint, "_write", lambda *args: pytest.fail("written"))
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 2)
    assert str(caught.value) == (
        f"the disk is full: the checkpoint of step 2 needs at least {size} bytes in {tmp_path}, but 100 are free, "
        f"{size - 100} bytes are missing; delete something or give another folder, then resume; "
        "checkpoints saved before are whole"
    )
    assert value_of(latest_checkpoint(tmp_path)) == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_while_writing_leaves_the_old_checkpoint_and_no_rubbish(tmp_path, monkeypatch, error):
    save(tmp_path, 1)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"the disk is full: .* \d+ bytes are missing"):
        save(tmp_path, 2)
    assert os.listdir(tmp_path) == ["step-000001"]
    assert value_of(latest_checkpoint(tmp_path)) == 1


def test_an_unwritable_folder_is_a_checkpoint_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"the checkpoint of step 1 cannot be written to .*Not a directory"):
        save(tmp_path / "file" / "checkpoints", 1)


def test_every_bit_flip_truncation_or_loss_in_the_newest_is_detected(tmp_path):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    draw = random.Random(0)
    for name in files_of(newest):
        path = newest / name
        content = path.read_bytes()
        flips = [(draw.randrange(len(content)), draw.randrange(8)) for _ in range(40)]
        damaged = [content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1 :] for i, bit in flips]
        for broken in [*damaged, content[:-1], b"", content + b"\n"]:
            path.write_bytes(broken)
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                verify(newest)
        path.unlink()
        with pytest.raises(CheckpointError, match=rf"{name} cannot be read \(No such file or directory\)"):
            verify(newest)
        path.write_bytes(content)
        verify(newest)


def test_every_single_bit_of_the_manifest_is_guarded(tmp_path):
    path = save(tmp_path, 1) / "MANIFEST.json"
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
            with pytest.raises(CheckpointError):
                read_manifest(path.parent)


def test_a_corrupt_newest_is_set_aside_by_name_and_the_one_before_is_used(tmp_path):
    save(tmp_path, 100)
    newest = save(tmp_path, 300)
    (newest / "model.safetensors").write_bytes(b"\0" * 256)
    with pytest.warns(UserWarning) as caught:
        assert value_of(latest_checkpoint(tmp_path)) == 100
    assert str(caught[0].message) == (
        f"checkpoint {newest}: model.safetensors is not what was saved: its SHA-256 differs; "
        "it was set aside as step-000300.corrupt, an older one is used"
    )
    assert sorted(os.listdir(tmp_path)) == ["step-000100", "step-000300.corrupt"]
    assert value_of(save(tmp_path, 300)) == 300


def test_a_second_corrupt_save_of_a_step_does_not_overwrite_the_first(tmp_path):
    for _ in range(2):
        (save(tmp_path, 3) / "config.json").unlink()
        with pytest.warns(UserWarning, match="set aside"):
            assert latest_checkpoint(tmp_path) is None
    assert len(list(tmp_path.glob("step-000003*.corrupt"))) == 2


def test_the_old_checkpoint_is_kept_when_the_new_one_does_not_verify(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real = os.replace

    def rotten(source, target):
        real(source, target)
        (Path(target) / "config.json").write_text("rot")

    monkeypatch.setattr(os, "replace", rotten)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="set aside"):
        assert value_of(latest_checkpoint(tmp_path)) == 1


def test_state_that_was_changed_is_not_loaded(tmp_path):
    path = save(tmp_path, 1)
    (path / "trainer" / "state.json").write_text(json.dumps({"value": 2}))
    with pytest.raises(CheckpointError, match=r"trainer/state\.json has"):
        load_state(path)


def test_a_folder_that_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json cannot be read \(No such file or directory\)"):
        load_state(tmp_path)
