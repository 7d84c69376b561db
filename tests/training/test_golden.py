"""Checkpoints of earlier development versions load for ever.

What golden/ holds is never changed, only added to (make_golden.py).
"""

import json
import shutil
import warnings
from pathlib import Path

import make_golden
import pytest
import torch

from medrl.policy.policy import Policy
from medrl.runs import Run
from medrl.training.checkpoint import latest_checkpoint, list_checkpoints, load_state
from medrl.training.train import train

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*/*"))


def test_there_is_one_of_each_kind():
    assert {folder.name for folder in GOLDEN} == {"weights", "adapters"}


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_a_checkpoint_of_an_earlier_version_verifies_loads_and_trains_on(folder, tmp_path):
    place = tmp_path / "golden"
    shutil.copytree(folder, place)
    expected = json.loads((place / "expected.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing may have to be set aside
        checkpoint = latest_checkpoint(place / "run" / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "step-000002"
    tensors, state = load_state(checkpoint)
    assert state["step"] == 2 and state["sampler_position"] == 4 and any(".exp_avg" in name for name in tensors)

    policy = make_golden.load(place, folder.name)
    policy.restore(checkpoint)
    assert policy.fingerprint() == expected["fingerprint"]  # to the bit

    policy = make_golden.load(place, folder.name)
    examples = make_golden.make_examples(tmp_path / "images")
    options = {"out": place / "run", "settings": make_golden.SETTINGS, "resume": "must", "quiet": True}
    run = train(policy, examples, make_golden.reward, make_golden.OBJECTIVE, **options)
    assert [row["step"] for row in Run.open(place / "run").metrics()] == [0, 1, 2, 3]
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step-000004"]
    assert policy.fingerprint() != expected["fingerprint"]


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_it_is_a_model_folder_too(folder):
    policy = Policy.load(folder / "run" / "checkpoints" / "step-000002")
    assert all(bool(torch.isfinite(parameter).all()) for parameter in policy.model.parameters())
