"""A run that is asked to stop saves what it has done, and resumes as if nobody had asked, to the bit."""

import os
import signal

import pytest

from medrl.errors import SettingsError
from medrl.grpo import GRPO
from medrl.policy.policy import Policy
from medrl.rollout import decoder
from medrl.runs import Run
from medrl.sft import SFT
from medrl.stopping import Deadline, Stopped
from medrl.training import update
from medrl.training.checkpoint import list_checkpoints
from medrl.training.curriculum import Curriculum
from medrl.training.optim import AdamW
from medrl.training.train import train

OBJECTIVE = GRPO(group_size=2, kl_coef=0.04)
TOKENS, MICRO_BATCHES = 6, 2
"""Decoding steps and micro-batches of a training step."""


@pytest.fixture(scope="module")
def settings(small):
    """Five steps; nothing is saved before the last, unless a stop saves it. Each group is a micro-batch."""
    return small.model_copy(update={"save_every": 100, "tokens_per_micro_batch": 1})


@pytest.fixture
def stop_at(monkeypatch):
    """Ask this process to stop within the nth call of a function."""

    def patch(owner, name: str, nth: int) -> None:
        inner, calls = getattr(owner, name), []

        def asking(*arguments, **options):
            calls.append(name)
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(*arguments, **options)

        monkeypatch.setattr(owner, name, asking)

    return patch


def saved(run: Run) -> list[str]:
    return [path.name for path in list_checkpoints(run.checkpoints)]


def end_of(run: Run) -> list[bytes]:
    """Logs and final weights; times are left out."""
    names = ("model.safetensors", "trainer/optimizer.safetensors")
    files = [run.path / "rollouts.jsonl", *(run.checkpoints / saved(run)[-1] / name for name in names)]
    losses = repr([(row["step"], row["loss"], row["grad_norm"]) for row in run.metrics()])
    return [losses.encode(), *(file.read_bytes() for file in files)]


@pytest.fixture(scope="module")
def whole(model_folder, examples, lively, settings, tmp_path_factory):
    """The run that nobody stops."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return train(Policy.load(model_folder), examples, lively, OBJECTIVE, out=out, settings=settings, quiet=True)


@pytest.mark.parametrize(
    ("owner", "name", "nth", "kept"),
    [
        (decoder, "draw_tokens", 2, 0),  # while the first completions are written
        (decoder, "draw_tokens", 2 * TOKENS + 3, 2),
        (update, "_backward", 3 * MICRO_BATCHES + 1, 3),  # between two micro-batches
        (AdamW, "step", 4, 4),  # while weights move: that step is finished
        (Run, "append_metrics", 2, 2),  # between the two logs
        (Policy, "save", 1, 5),  # while the last checkpoint is written: the run is done
    ],
)
def test_a_stop_anywhere_keeps_every_finished_step_and_resumes_to_the_bit(
    whole, model_folder, examples, lively, settings, tmp_path, stop_at, monkeypatch, owner, name, nth, kept
):
    options = {"out": tmp_path / "run", "settings": settings, "quiet": True}
    stop_at(owner, name, nth)
    if kept < settings.steps:
        with pytest.raises(Stopped):
            train(Policy.load(model_folder), examples, lively, OBJECTIVE, **options)
    else:
        train(Policy.load(model_folder), examples, lively, OBJECTIVE, **options)
    monkeypatch.undo()
    stopped = Run.open(tmp_path / "run")
    assert saved(stopped) == [f"step-{kept:06}"]
    assert [row["step"] for row in stopped.metrics()] == list(range(kept))
    run = train(Policy.load(model_folder), examples, lively, OBJECTIVE, **options, resume="must")
    assert end_of(run) == end_of(whole)


@pytest.mark.parametrize(
    ("objective", "nth"),
    [
        (SFT(), MICRO_BATCHES + 1),
        (GRPO(group_size=2, kl_coef=0, updates_per_rollout=2), 2 * MICRO_BATCHES + MICRO_BATCHES + 1),  # its 2nd round
    ],
)
def test_other_objectives_stop_where_a_step_begins_too(
    model_folder, examples, lively, settings, tmp_path, stop_at, monkeypatch, objective, nth
):
    options = {"settings": settings, "quiet": True}
    whole = train(Policy.load(model_folder), examples, lively, objective, out=tmp_path / "whole", **options)
    stop_at(update, "_backward", nth)
    with pytest.raises(Stopped):
        train(Policy.load(model_folder), examples, lively, objective, out=tmp_path / "run", **options)
    monkeypatch.undo()
    done = len(Run.open(tmp_path / "run").metrics())
    assert saved(Run.open(tmp_path / "run")) == [f"step-{done:06}"]
    run = train(Policy.load(model_folder), examples, lively, objective, out=tmp_path / "run", resume="auto", **options)
    assert end_of(run) == end_of(whole)


def test_a_stop_before_anything_new_was_done_saves_nothing_twice(
    model_folder, examples, lively, settings, tmp_path, stop_at, monkeypatch
):
    options = {"out": tmp_path / "run", "settings": settings, "quiet": True}
    for resume in ("never", "must"):
        stop_at(decoder, "draw_tokens", 1)
        with pytest.raises(Stopped):
            train(Policy.load(model_folder), examples, lively, OBJECTIVE, **options, resume=resume)
        monkeypatch.undo()
    written = (tmp_path / "run" / "checkpoints" / "step-000000" / "MANIFEST.json").stat().st_mtime_ns
    stop_at(decoder, "draw_tokens", 1)
    with pytest.raises(Stopped):
        train(Policy.load(model_folder), examples, lively, OBJECTIVE, **options, resume="must")
    assert (tmp_path / "run" / "checkpoints" / "step-000000" / "MANIFEST.json").stat().st_mtime_ns == written


def test_a_run_whose_time_is_nearly_up_saves_itself_and_goes_on_later(
    whole, model_folder, examples, lively, settings, tmp_path, monkeypatch
):
    options = {"settings": settings, "out": tmp_path / "run", "quiet": True}
    looks = []
    inner = Deadline.is_near

    def near_in_step_2(self):
        looks.append(inner(self))
        return len(looks) > 2 * (TOKENS + MICRO_BATCHES) + 3

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="time is nearly up"):
        patch.setattr(Deadline, "is_near", near_in_step_2)
        train(Policy.load(model_folder), examples, lively, OBJECTIVE, max_hours=1000, **options)
    assert not any(looks)  # the clock itself saw no reason
    assert saved(Run.open(tmp_path / "run")) == ["step-000002"]
    run = train(Policy.load(model_folder), examples, lively, OBJECTIVE, resume="must", max_hours=1000, **options)
    assert end_of(run) == end_of(whole)


def test_no_time_at_all_is_refused_and_too_little_saves_the_start(model_folder, examples, lively, settings, tmp_path):
    options = {"settings": settings, "quiet": True}
    with pytest.raises(SettingsError, match="max_hours is 0"):
        train(Policy.load(model_folder), examples, lively, OBJECTIVE, out=tmp_path / "a", max_hours=0, **options)
    assert not (tmp_path / "a").exists()
    with pytest.raises(Stopped):
        train(Policy.load(model_folder), examples, lively, OBJECTIVE, out=tmp_path / "b", max_hours=1e-9, **options)
    assert saved(Run.open(tmp_path / "b")) == ["step-000000"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_other_signals_save_too(model_folder, examples, lively, settings, tmp_path, monkeypatch, number):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    inner = AdamW.step

    def asking(self, lr):
        os.kill(os.getpid(), number)
        return inner(self, lr)

    monkeypatch.setattr(AdamW, "step", asking)
    try:
        with pytest.raises(Stopped):
            train(
                Policy.load(model_folder), examples, lively, OBJECTIVE,
                out=tmp_path / "run", settings=settings, quiet=True,
            )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    assert saved(Run.open(tmp_path / "run")) == ["step-000001"]


def test_a_stop_while_pass_rates_are_estimated_keeps_those_there_are(
    model_folder, examples, lively, settings, tmp_path, stop_at, monkeypatch
):
    curriculum = Curriculum(use="order", rollouts=2)
    options = {"settings": settings.model_copy(update={"curriculum": curriculum, "steps": 1}), "quiet": True}
    whole = train(Policy.load(model_folder), examples, lively, OBJECTIVE, out=tmp_path / "whole", **options)
    stop_at(decoder, "draw_tokens", 2 * TOKENS + 1)  # in the third batch of two
    with pytest.raises(Stopped):
        train(Policy.load(model_folder), examples, lively, OBJECTIVE, out=tmp_path / "run", **options)
    monkeypatch.undo()
    assert len(Run.open(tmp_path / "run").pass_rates()) == 4
    run = train(Policy.load(model_folder), examples, lively, OBJECTIVE, out=tmp_path / "run", resume="must", **options)
    assert run.pass_rates() == whole.pass_rates() and end_of(run) == end_of(whole)
