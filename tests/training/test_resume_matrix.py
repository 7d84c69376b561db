"""Wherever a run is cut, and whatever it trains, it ends as the run that nobody cut: to the bit.

    {while completions are written, between two micro-batches, at the edge of an epoch, in the last step}
    x {all weights, adapters} x {GRPO, SFT} x {1, 2 updates per rollout}

There is no step that evaluates; supervised training has one update per batch.
"""

import itertools
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medrl.grpo import GRPO
from medrl.policy.lora import Lora
from medrl.policy.policy import Policy
from medrl.rollout import decoder
from medrl.runs import Run
from medrl.sft import SFT
from medrl.stopping import Stopped
from medrl.training import methods, update
from medrl.training.checkpoint import list_checkpoints, load_state
from medrl.training.train import train
from medrl.types import Score

STEPS, MICRO_BATCHES, TOKENS = 6, 2, 6
OBJECTIVES = {
    "GRPO": GRPO(group_size=2, kl_coef=0.04),
    "GRPO, 2 updates": GRPO(group_size=2, kl_coef=0.04, updates_per_rollout=2),
    "SFT": SFT(),
}
ROUNDS = {"GRPO": 1, "GRPO, 2 updates": 2, "SFT": 1}
TRAINS = ("all weights", "adapters")
POINTS = ("mid-rollout", "mid-accumulation", "epoch edge", "last step")
# Seven examples, two a step: step 3 takes the last of one epoch and the first of the next.


class Killed(BaseException):
    """The end of the process, as far as training can see."""


def with_dice(example, completion):
    """A reward that draws from every global generator: its dice are part of the run."""
    right = f"<answer>{example.target}</answer>" in completion.text
    if not completion.token_ids:  # the check of right answers
        return Score(value=float(right), answer=example.target)
    dice = random.random() + np.random.random() + float(torch.rand(()))  # noqa: NPY002
    value = sum(completion.token_ids) % 7 / 7 + 0.1 * dice
    return Score(value=value, parts={"dice": dice}, answer=example.target if right else None)


@pytest.fixture(scope="module")
def settings(small):
    """Six steps, saved after every second; each group is a micro-batch of its own."""
    return small.model_copy(update={"steps": STEPS, "save_every": 2, "tokens_per_micro_batch": 1})


@pytest.fixture(scope="module")
def go(model_folder, examples, settings):
    """Train, on from what is there."""

    def run(out: Path, trains: str, name: str) -> Run:
        policy = Policy.load(model_folder)
        if trains == "adapters":
            policy.add_lora(Lora(rank=2, alpha=4.0))
        return train(
            policy, examples, with_dice, OBJECTIVES[name], out=out, settings=settings, resume="auto", quiet=True
        )

    return run


@pytest.fixture(scope="module")
def wholes(go, tmp_path_factory):
    """The runs that nobody cuts, each made when it is first asked for."""
    made: dict[tuple[str, str], Run] = {}

    def whole(trains: str, name: str) -> Run:
        if (trains, name) not in made:
            made[trains, name] = go(tmp_path_factory.mktemp("whole") / "run", trains, name)
        return made[trains, name]

    return whole


def end_of(run: Run) -> dict[str, Any]:
    """All that a run leaves, without the seconds it took."""
    timed = ("time/", "tokens_per_s", "eta_s")
    checkpoints = list_checkpoints(run.checkpoints)
    files: dict[str, Any] = {"rollouts": (run.path / "rollouts.jsonl").read_bytes()}
    files["metrics"] = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in run.metrics()]
    for checkpoint in checkpoints:
        for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
            name = path.relative_to(run.checkpoints).as_posix()
            if path.suffix == ".safetensors":  # weights or adapters; optimizer, reference and generators
                files[name] = path.read_bytes()
        _, state = load_state(checkpoint)
        # Rows of metrics.jsonl hold seconds, of more or fewer digits.
        files[f"{checkpoint.name}/state"] = {
            **state,
            "seconds": None,
            "log_offsets": state["log_offsets"]["rollouts.jsonl"],
        }
    return files


def cut_at(point: str, trains: str, name: str, how: str, patch: pytest.MonkeyPatch) -> None:
    """Make the run end at a point, once."""
    micro_batches = MICRO_BATCHES * ROUNDS[name]
    owner, function, nth = {
        # The second step after the save of step 2: there is something to do again.
        "mid-rollout": (decoder, "draw_tokens", 3 * TOKENS + 3),
        "mid-accumulation": (update, "_backward", 3 * micro_batches + 2),
        "epoch edge": (update, "_backward", 3 * micro_batches + 1),
        "last step": (update, "_backward", 5 * micro_batches + 1),
    }[point]
    if point == "mid-rollout" and name == "SFT":
        owner, function, nth = methods, "demonstrate", 4
    if point == "last step" and how == "killed":
        owner, function, nth = Run, "append_rollouts", STEPS  # between the two logs
    inner, calls = getattr(owner, function), []

    def ending(*arguments, **options):
        calls.append(function)
        if len(calls) == nth:
            if how == "killed":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*arguments, **options)

    patch.setattr(owner, function, ending)


def test_steps_differ_so_that_the_matrix_means_something(wholes):
    run = wholes("all weights", "GRPO")
    assert len({row["grad_norm"] for row in run.metrics()}) == STEPS
    assert len({row["parts"]["dice"] for row in run.rollouts()}) == STEPS * 4


@pytest.mark.parametrize(
    ("point", "trains", "name", "how"),
    [
        *itertools.product(POINTS, TRAINS, OBJECTIVES, ["killed"]),
        *itertools.product(POINTS, TRAINS, ["GRPO"], ["asked"]),  # of the others, test_stop.py
    ],
)
def test_a_run_that_is_cut_ends_as_the_run_that_is_not(wholes, go, tmp_path, point, name, trains, how):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed if how == "killed" else Stopped):
        cut_at(point, trains, name, how, patch)
        go(tmp_path / "run", trains, name)
    done = len(Run.open(tmp_path / "run").metrics())
    assert 0 < done <= STEPS
    run = go(tmp_path / "run", trains, name)
    ours, theirs = end_of(run), end_of(wholes(trains, name))
    last = f"step-{STEPS:06}"
    for part in theirs:
        if part in ("rollouts", "metrics") or part.startswith(last):
            assert ours[part] == theirs[part], part
