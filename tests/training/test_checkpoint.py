import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from power import Killed

from medrl.errors import CheckpointError
from medrl.training import checkpoint
from medrl.training.checkpoint import latest_checkpoint, list_checkpoints, load_state, save_checkpoint
from medrl.training.manifest import read_manifest


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
    stats = [file.stat() for file in (tmp_path / "step-000001").rglob("*") if file.is_file()]
    size = sum(max(stat.st_size, 512 * stat.st_blocks) for stat in stats)
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 100, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(checkpoint, "_write", lambda *args: pytest.fail("written"))
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 2)
    assert str(caught.value) == (
        f"the disk is full: the checkpoint of step 2 needs at least {size} bytes in {tmp_path}, but there is room for "
        f"100: at least {size - 100} bytes are missing; delete something or give another folder, then resume; "
        "checkpoints saved before are whole"
    )
    assert value_of(latest_checkpoint(tmp_path)) == 1


def test_an_unwritable_folder_is_a_checkpoint_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"the checkpoint of step 1 cannot be written to .*Not a directory"):
        save(tmp_path / "file" / "checkpoints", 1)


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
