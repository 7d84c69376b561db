"""A long run takes no more memory and no more files than a short one, and leaves one line a step."""

import os
from pathlib import Path
from statistics import median

import pytest

from medrl.grpo import GRPO
from medrl.policy.policy import Policy
from medrl.rollout.sampling import Sampling
from medrl.runs import Run
from medrl.training.train import train

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def soak(model_folder, examples, reward, small, out: Path, steps: int) -> tuple[list[int], list[int]]:
    """Train ``steps`` tiny steps; resident bytes and open files after each."""
    memory, files = [], []
    inner = Run.append_rollouts

    def look(self, rows):
        inner(self, rows)
        memory.append(resident_bytes())
        files.append(open_files())

    settings = small.model_copy(
        update={"steps": steps, "prompts_per_step": 1, "sampling": Sampling(max_new_tokens=2), "save_every": 10}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "append_rollouts", look)
        run = train(
            Policy.load(model_folder), examples, reward, GRPO(group_size=2, kl_coef=0.04),
            out=out, settings=settings, quiet=True,
        )  # fmt: skip
    assert (out / "metrics.jsonl").read_bytes().count(b"\n") == steps
    assert [row["step"] for row in run.metrics()] == list(range(steps))
    assert (out / "rollouts.jsonl").read_bytes().count(b"\n") == 2 * steps
    return memory, files


def test_forty_steps_open_no_file_that_stays_open(model_folder, examples, lively, small, tmp_path):
    _, files = soak(model_folder, examples, lively, small, tmp_path / "run", 40)
    assert max(files[20:]) <= max(files[:20])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.timeout(3000)
def test_two_thousand_steps_grow_by_less_than_two_percent(model_folder, examples, lively, small, tmp_path):
    memory, files = soak(model_folder, examples, lively, small, tmp_path / "run", 2000)
    start, end = median(memory[180:220]), median(memory[-40:])  # caches have filled by then
    assert end / start < 1.02, f"{start / 1e6:.1f} MB after 200 steps, {end / 1e6:.1f} MB after 2000"
    assert max(files[1000:]) <= max(files[:1000])
