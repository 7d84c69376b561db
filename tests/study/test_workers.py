"""Workers that the command starts by itself."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from medrl.study import workers


def command(recipe, out, *words):
    return [sys.executable, "-m", "medrl", "study", str(recipe), "--out", str(out), "--no-calibrate", *words]


@pytest.fixture
def small(mini):
    """Overrides that leave five cells."""
    return ["axes={modality: {train: [CT]}}"]


def test_two_workers_of_one_command_do_every_cell_once(mini, small, tmp_path):
    done = subprocess.run(
        command(mini / "study.yaml", tmp_path / "out", "--workers", "2", "--json", *small),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    taken = [line.split("] ")[1].split(",")[0] for line in done.stderr.splitlines() if line.startswith("[")]
    printed = json.loads(done.stdout)
    assert sorted(taken) == sorted(printed["done"]) and len(taken) == 5
    holders = {json.loads(file.read_text())["pid"] for file in (tmp_path / "out" / "cells").glob("*/claims/0001.json")}
    assert len(holders) == 2
    assert printed["matrices"] == json.loads((tmp_path / "out" / "matrices.json").read_text())


@pytest.mark.slow  # four programs start and load torch
def test_asked_to_stop_all_workers_stop_and_the_same_command_goes_on(mini, small, tmp_path):
    words = command(mini / "study.yaml", tmp_path / "out", "--workers", "2", "--json", *small)
    first = subprocess.Popen(
        [*words, "recipe.training.steps=2000"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not list((tmp_path / "out").glob("cells/train-*/run/checkpoints/step-*")):
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 143 and "the same command continues" in said
    holders = [json.loads(file.read_text())["pid"] for file in tmp_path.glob("out/cells/*/claims/0001.json")]
    assert holders and not any(os.path.exists(f"/proc/{pid}") for pid in holders)


def test_each_worker_has_a_gpu_in_turn_and_its_part_of_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-7f")
    given = [workers.environment(number, 3) for number in range(3)]
    assert [own["CUDA_VISIBLE_DEVICES"] for own in given] == ["3", "GPU-7f", "3"]
    assert {own["OMP_NUM_THREADS"] for own in given} == {"2"}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert "CUDA_VISIBLE_DEVICES" not in workers.environment(0, 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert workers.environment(0, 3) == {"OMP_NUM_THREADS": "5"}
