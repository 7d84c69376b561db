"""What each tracker's own reader finds is what metrics.jsonl says, and nothing that belongs to a patient or a path."""

import subprocess
import sys
import time
from unittest.mock import MagicMock

import pytest

from medrl.errors import MissingExtraError, SettingsError
from medrl.runs import Run
from medrl.settings import load_settings
from medrl.training.recipe import Recipe
from medrl.training.trackers import OPEN, check_installed, flat, told, tracking

RECIPE = {
    "method": "grpo",
    "policy": {"model": "/home/anna/models/tiny", "dtype": "float32", "lora": None},
    "data": {"train": "/home/anna/patients/store"},
    "grpo": {"group_size": 8},
    "reward": {"choice_correct": 1.0},
}
ROWS = [
    {"step": n, "reward": 0.5 + n / 8, "pass@2": 0.25 * n, "answer_letters": {"A": n, "B": 3}, "time/step_s": 1.5}
    for n in range(3)
]


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "runs" / "ct", RECIPE, {})


def track(run: Run, name: str, rows=ROWS, first_step: int = 0) -> None:
    with tracking([name], run, first_step) as log:
        for row in rows:
            log(row["step"], row)


def everything_below(folder) -> bytes:
    return b"\n".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_tensorboard_reads_what_was_measured_and_a_step_taken_again_once(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track(run, "tensorboard")
    track(run, "tensorboard", [{**ROWS[2], "reward": 9.0}, {**ROWS[2], "step": 3}], first_step=2)
    folder = run.path / "trackers" / "tensorboard" / "ct"
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("reward")] == [
        (0, 0.5), (1, 0.625), (2, 9.0), (3, 0.75),
    ]  # fmt: skip
    assert [e.value for e in events.Scalars("answer_letters/B")] == [3.0] * 4
    assert "step" not in events.Tags()["scalars"]
    assert b"anna" not in everything_below(run.path / "trackers")


@pytest.mark.interop
def test_mlflow_reads_what_was_measured_and_a_resumed_run_goes_on_in_its_place(run, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    track(run, "mlflow", ROWS[:2])
    track(run, "mlflow", ROWS[2:], first_step=2)
    folder = run.path / "trackers" / "mlflow"
    client = mlflow.MlflowClient(tracking_uri=folder.as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "medrl"]
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "reward")
    assert sorted((m.step, m.value) for m in history) == [(0, 0.5), (1, 0.625), (2, 0.75)]
    assert client.get_metric_history(found.info.run_id, "pass_at_2")[-1].value == 0.5
    assert found.data.params["grpo/group_size"] == "8" and "data/train" not in found.data.params
    assert not any("anna" in value for value in found.data.params.values())


def records_of(log: bytes) -> list[bytes]:
    """Records of a W&B log, which is LevelDB's format: blocks of 32 kB, pieces with checksum, length and type."""
    at, piece, records = 7, b"", []
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        if at + 7 + length > len(log):
            break  # being written
        piece += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            records.append(piece)
            piece = b""
    return records


@pytest.mark.interop
def test_wandb_keeps_what_was_measured_offline(run, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    track(run, "wandb")
    (log,) = (run.path / "trackers" / "wandb").rglob("*.wandb")
    from wandb.proto import wandb_internal_pb2

    def steps() -> list[tuple[int, float, float]]:
        found = []
        for data in records_of(log.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                found.append((int(items["_step"]), float(items["reward"]), float(items["answer_letters/A"])))
        return found

    deadline = time.monotonic() + 120
    while len(found := steps()) < len(ROWS) and time.monotonic() < deadline:
        time.sleep(0.1)  # W&B's own process writes, and ends after ours has said goodbye
    assert found == [(0, 0.5, 0.0), (1, 0.625, 1.0), (2, 0.75, 2.0)]
    assert b"anna" not in log.read_bytes()
    assert wandb.run is None


def test_runs_in_folders_of_the_same_name_are_two_and_a_resumed_one_is_one(run, tmp_path, monkeypatch):
    opened = []

    def open_silent(folder, name, own, first_step):
        opened.append((name, own))
        return MagicMock()

    monkeypatch.setitem(OPEN, "wandb", open_silent)
    other = Run.create(tmp_path / "others" / "ct", RECIPE, {})
    track(run, "wandb", [])
    track(other, "wandb", [])
    track(Run.open(run.path), "wandb", [], first_step=2)
    (_, ours), (_, theirs), (_, again) = opened
    assert {name for name, _ in opened} == {"ct"} and ours != theirs and ours == again
    assert Run.open(run.path).provenance["tracker_id"] == ours


@pytest.mark.interop
def test_wandb_resumes_a_run_by_its_own_id(run, monkeypatch):
    pytest.importorskip("wandb")
    asked = []
    monkeypatch.setattr("accelerate.tracking.WandBTracker", lambda *_, **options: asked.append(options))
    OPEN["wandb"](run.path, "ct", "0f3a", 0)
    assert asked[0]["name"] == "ct" and asked[0]["id"] == "0f3a"


def test_a_model_of_the_hub_is_named_and_no_path_or_address_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    for model in ("Qwen/Qwen2-VL-2B-Instruct", "demo-base"):
        assert told({"policy": {"model": model}}) == {"policy/model": model}
    for model in ("/home/anna/tiny", "./tiny", "../tiny", "~/tiny", "models/tiny", "home/anna/models/tiny"):
        assert told({"policy": {"model": model, "dtype": "float32"}}) == {"policy/dtype": "float32"}
    by_source = {"by_source": {"VQA-RAD": {"/home/anna/mine.py:size": 1.0}, "default": "anna/mine.py:size"}}
    assert told({"reward": by_source}) == {
        "reward/by_source/VQA-RAD/mine.py:size": 1.0,
        "reward/by_source/default": "mine.py:size",
    }
    settings = {"rollout": {"endpoint": "http://anna:8000/v1", "server": "vllm"}, "data": {"train": "/home/anna"}}
    assert told({**settings, "training": {"template": "a/b"}}) == {"rollout/server": "vllm", "training/template": "a/b"}


@pytest.mark.interop
def test_trackio_keeps_what_was_measured(run):
    pytest.importorskip("trackio")
    code = (
        "import sys, json; from pathlib import Path; from medrl.runs import Run\n"
        "from medrl.training.trackers import tracking\n"
        f"rows = {ROWS!r}\n"
        f"with tracking(['trackio'], Run.open({str(run.path)!r}), 0) as log:\n"
        "    for row in rows: log(row['step'], row)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    import sqlite3

    (file,) = [f for f in (run.path / "trackers" / "trackio").rglob("*.db") if "medrl" in f.name]
    with sqlite3.connect(file) as db:
        steps = [row[0] for row in db.execute("select step from metrics order by step")]
    assert steps == [0, 1, 2]


def test_a_tracker_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("medrl.training.trackers.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"mlflow.*pip install 'medrl\[track\]'"):
        check_installed(["mlflow"])
    check_installed([])


def test_a_recipe_names_trackers_and_no_others():
    base = {"policy": {"model": "demo-base"}, "data": {"train": "store"}}
    assert load_settings(Recipe, base, ["trackers=[tensorboard, wandb]"]).trackers == ("tensorboard", "wandb")
    assert load_settings(Recipe, base).trackers == ()
    with pytest.raises(SettingsError, match="tensorboard"):
        load_settings(Recipe, base, ["trackers=[notebook]"])


def test_nested_numbers_get_names_with_slashes():
    assert flat({"a": {"b": 1, "c": None}, "d": [1, 2]}) == {"a/b": 1, "d": "1, 2"}
