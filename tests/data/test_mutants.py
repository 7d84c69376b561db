"""Whatever is done to an image file, reading it ends in a picture or in one ImageError, soon and in little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pydicom")
pytest.importorskip("nibabel")
pytest.importorskip("openjpeg")

LIMIT_S = 2.0
LIMIT_MIB = 1024


SLOW = (pytest.mark.slow, pytest.mark.timeout(3600))


def read_mutants(count: int, seed: int) -> dict:
    script = Path(__file__).with_name("mutants.py")
    done = subprocess.run([sys.executable, str(script), str(count), str(seed)], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("count", "seed"), [(1000, 0), *(pytest.param(2500, seed, marks=SLOW) for seed in range(1, 5))]
)
def test_no_mutant_crashes_hangs_or_fills_memory(count, seed):
    seen = read_mutants(count, seed)
    assert seen["odd"] == []
    assert seen["slowest_s"] < LIMIT_S and seen["peak_mib"] < LIMIT_MIB
    # Both happen often, so that neither side of the rule is empty.
    assert seen["opened"] > count / 10 and seen["refused"] > count / 10
