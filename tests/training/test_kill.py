"""SIGKILL at random moments: what is left continues to the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medrl.runs import Run
from medrl.training.checkpoint import list_checkpoints, load_state

TIMED = ("time/", "tokens_per_s", "eta_s")


def end_of(folder: Path) -> dict[str, object]:
    """All that a run leaves, without the seconds it took."""
    run = Run.open(folder)
    (*_, last) = list_checkpoints(run.checkpoints)
    files = sorted(
        path for path in last.rglob("*") if path.is_file() and path.name not in ("state.json", "MANIFEST.json")
    )
    _, state = load_state(last)
    state["log_offsets"].pop("metrics.jsonl")  # its seconds have more or fewer digits
    return {
        **{path.relative_to(last).as_posix(): path.read_bytes() for path in files},
        "state": {**state, "seconds": None},
        "rollouts": (folder / "rollouts.jsonl").read_bytes(),
        "recipe": (folder / "recipe.yaml").read_bytes(),
        "metrics": [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in run.metrics()],
        "rubbish": [path.name for path in folder.rglob("*") if "tmp" in path.name],
    }


def kill_and_compare(model: Path, image: Path, out: Path, kills: int) -> dict:
    out.mkdir(exist_ok=True)
    (out / "image.png").write_bytes(image.read_bytes())
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed.py")), str(model), str(out), str(kills), "11"],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    whole = end_of(out / "whole")
    assert len(whole["metrics"]) == 8 and whole["rubbish"] == []
    for number in range(report["runs"]):
        ours = end_of(out / str(number))
        assert ours.keys() == whole.keys()
        for part in whole:
            assert ours[part] == whole[part], (number, part)
    return report


def test_thirty_sigkills_at_random_moments_change_no_bit(model_folder, examples, tmp_path):
    report = kill_and_compare(model_folder, examples[0].images[0], tmp_path / "out", 30)
    assert report["kills"] == 30
    assert len(set(report["steps_at_kill"])) > 2  # at different places


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_three_hundred_sigkills_at_random_moments_change_no_bit(model_folder, examples, tmp_path):
    report = kill_and_compare(model_folder, examples[0].images[0], tmp_path / "out", 300)
    assert report["kills"] == 300
