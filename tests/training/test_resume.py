"""A run that is interrupted anywhere and resumed ends as if it had never been interrupted, to the bit."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medrl.data.store import load, write_store
from medrl.errors import RunError, SettingsError
from medrl.grpo import GRPO
from medrl.policy.loading import PolicySettings
from medrl.policy.policy import Policy
from medrl.runs import Run
from medrl.sft import RFT, SFT
from medrl.training.checkpoint import list_checkpoints, load_state
from medrl.training.curriculum import Curriculum
from medrl.training.recipe import Data, Recipe
from medrl.training.settings import Training
from medrl.training.start import MAY_CHANGE, WHY_NOT
from medrl.training.train import train
from medrl.types import Score

OBJECTIVE = GRPO(group_size=2, kl_coef=0.04)
CALLS_PER_STEP = 4


class Interrupted:
    """A reward that is interrupted at a call; the check of right answers does not count."""

    def __init__(self, reward, at: int) -> None:
        self.reward, self.at, self.calls = reward, at, 0

    def __call__(self, example, completion):
        if completion.token_ids:
            self.calls += 1
            if self.calls == self.at:
                raise KeyboardInterrupt
        return self.reward(example, completion)


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}


def untimed(run: Run) -> list[dict]:
    timed = ("time/", "tokens_per_s", "eta_s")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in run.metrics()]


def assert_same_run(run: Run, whole: Run) -> None:
    assert untimed(run) == untimed(whole)
    assert (run.path / "rollouts.jsonl").read_bytes() == (whole.path / "rollouts.jsonl").read_bytes()
    assert (run.path / "recipe.yaml").read_bytes() == (whole.path / "recipe.yaml").read_bytes()
    names = [path.name for path in list_checkpoints(whole.checkpoints)]
    assert [path.name for path in list_checkpoints(run.checkpoints)] == names
    for name in ("model.safetensors", "trainer/optimizer.safetensors"):
        ours, theirs = (r.checkpoints / names[-1] / name for r in (run, whole))
        assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.fixture(scope="module")
def whole(model_folder, examples, lively, small, tmp_path_factory):
    """The run that nobody interrupts, and the weights it ends with."""
    policy = Policy.load(model_folder)
    out = tmp_path_factory.mktemp("whole") / "run"
    return train(policy, examples, lively, OBJECTIVE, out=out, settings=small, quiet=True), weights_of(policy)


def test_steps_differ_so_that_the_tests_below_mean_something(whole):
    run, _ = whole
    assert len({row["grad_norm"] for row in run.metrics()}) == 5
    assert len({row["completion"] for row in run.rollouts()}) > 15


@pytest.mark.parametrize(
    "call",
    [
        1,  # before anything was done
        CALLS_PER_STEP + 2,  # in step 1, before there is a checkpoint
        2 * CALLS_PER_STEP + 1,  # right after the first checkpoint
        3 * CALLS_PER_STEP + 4,  # in step 3, with a step to do again
        4 * CALLS_PER_STEP + 1,  # right after the second checkpoint
    ],
)
def test_an_interrupted_and_resumed_run_is_the_uninterrupted_run_to_the_bit(
    whole, model_folder, examples, lively, small, tmp_path, call
):
    stopping = Interrupted(lively, at=call)
    options = {"out": tmp_path / "run", "settings": small, "quiet": True}
    with pytest.raises(KeyboardInterrupt):
        train(Policy.load(model_folder), examples, stopping, OBJECTIVE, **options)
    policy = Policy.load(model_folder)
    run = train(policy, examples, lively, OBJECTIVE, **options, resume="auto")
    assert_same_run(run, whole[0])
    final = weights_of(policy)
    assert all(torch.equal(tensor, final[name]) for name, tensor in whole[1].items())


@pytest.mark.parametrize("method", ["append_metrics", "append_rollouts", "offsets"])
def test_an_interruption_between_two_writes_is_undone(
    whole, model_folder, examples, lively, small, tmp_path, monkeypatch, method
):
    written = []
    inner = getattr(Run, method)

    def stop_at_the_fourth(self, *arguments):
        written.append(method)
        if len(written) == 4:
            raise KeyboardInterrupt
        return inner(self, *arguments)

    options = {"out": tmp_path / "run", "settings": small, "quiet": True}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, method, stop_at_the_fourth)
        train(Policy.load(model_folder), examples, lively, OBJECTIVE, **options)
    run = train(Policy.load(model_folder), examples, lively, OBJECTIVE, **options, resume="must")
    assert_same_run(run, whole[0])


def test_a_run_interrupted_three_times_is_still_the_same(whole, model_folder, examples, lively, small, tmp_path):
    options = {"out": tmp_path / "run", "settings": small, "quiet": True, "resume": "auto"}
    for call in (7, 9, 3):
        with pytest.raises(KeyboardInterrupt):
            train(Policy.load(model_folder), examples, Interrupted(lively, call), OBJECTIVE, **options)
    run = train(Policy.load(model_folder), examples, lively, OBJECTIVE, **options)
    assert_same_run(run, whole[0])


@pytest.mark.parametrize(
    "objective",
    [
        SFT(),
        RFT(group_size=2),
        GRPO(group_size=2, kl_coef=0, updates_per_rollout=2),
        GRPO(group_size=2, kl_coef=0.5, sync_reference_every=2),
        GRPO(group_size=2, kl_coef=0, balance="modality"),
        GRPO(algorithm="dapo", group_size=2, dynamic_sampling=3),
        GRPO(algorithm="rloo", group_size=2),
    ],
    ids=lambda objective: "-".join(map(str, objective.model_dump(exclude_defaults=True).values())) or "sft",
)
def test_bfloat16_and_other_objectives_resume_to_the_bit_too(
    model_folder, examples, lively, small, tmp_path, monkeypatch, objective
):
    whole = train(
        Policy.load(model_folder, dtype="bfloat16"), examples, lively, objective,
        out=tmp_path / "whole", settings=small, quiet=True,
    )  # fmt: skip
    calls = []
    inner = Run.append_metrics

    def stop_at_the_fourth(self, row):
        calls.append(row)
        if len(calls) == 4:
            raise KeyboardInterrupt
        inner(self, row)

    options = {"out": tmp_path / "run", "settings": small, "quiet": True, "resume": "auto"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "append_metrics", stop_at_the_fourth)
        train(Policy.load(model_folder, dtype="bfloat16"), examples, lively, objective, **options)
    run = train(Policy.load(model_folder, dtype="bfloat16"), examples, lively, objective, **options)
    assert_same_run(run, whole)


def test_a_moved_reference_is_in_the_checkpoint_and_one_that_stays_is_not(
    model_folder, examples, lively, small, tmp_path
):
    names = {}
    for every in (0, 2):
        objective = GRPO(group_size=2, kl_coef=0.5, sync_reference_every=every)
        policy = Policy.load(model_folder)
        run = train(policy, examples, lively, objective, out=tmp_path / str(every), settings=small, quiet=True)
        tensors, _ = load_state(list_checkpoints(run.checkpoints)[-1])
        names[every] = {name for name in tensors if name.startswith("method.reference.")}
        start = Policy.load(model_folder)
        moved = [
            name
            for name, weight in policy.reference.model.named_parameters()
            if not torch.equal(weight, dict(start.model.named_parameters())[name])
        ]
        assert bool(moved) == bool(every)
        for name in names[every]:
            held = dict(policy.reference.model.named_parameters())[name.removeprefix("method.reference.")]
            assert torch.equal(tensors[name], held)
    assert not names[0] and len(names[2]) == len(list(policy.model.named_parameters()))


@pytest.mark.parametrize("use", ["filter", "order"])
@pytest.mark.parametrize("call", [5, 22, 30])  # while pass rates are estimated; in the steps after that
def test_a_curriculum_resumes_to_the_bit_also_from_the_middle_of_its_estimate(
    model_folder, examples, small, tmp_path, use, call
):
    def sometimes_right(example, completion):
        if not completion.token_ids:
            return Score(value=float(example.target in completion.text), answer=example.target)
        draw = sum(completion.token_ids) % 7
        right = draw < int(example.id[-1]) - 1
        return Score(value=draw / 7, parts={"draw": draw / 7}, answer=example.target if right else "J")

    settings = small.model_copy(update={"curriculum": Curriculum(use=use, rollouts=3)})
    options = {"settings": settings, "quiet": True}
    whole = train(Policy.load(model_folder), examples, sometimes_right, OBJECTIVE, out=tmp_path / "whole", **options)
    rates = {row["id"]: row["right"] / row["rollouts"] for row in whole.pass_rates()}
    assert len(rates) == 7 and 0 < sum(0 < rate < 1 for rate in rates.values()) < 7
    asked = [row["prompt_id"] for row in whole.rollouts()][::2]
    if use == "filter":
        assert {rates[name] for name in asked} & {0.0, 1.0} == set()
    else:
        first = [rates[name] for name in asked[:7]]
        assert first == sorted(first, reverse=True)
    with pytest.raises(KeyboardInterrupt):
        train(
            Policy.load(model_folder), examples, Interrupted(sometimes_right, call), OBJECTIVE,
            out=tmp_path / "run", **options,
        )  # fmt: skip
    policy = Policy.load(model_folder)
    run = train(policy, examples, sometimes_right, OBJECTIVE, out=tmp_path / "run", resume="auto", **options)
    assert_same_run(run, whole)
    assert (run.path / "pass_rates.jsonl").read_bytes() == (whole.path / "pass_rates.jsonl").read_bytes()


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from medrl.data.store import load
from medrl.grpo import GRPO
from medrl.policy.policy import Policy
from medrl.rewards import from_weights
from medrl.training.train import Training, train

model, store, out, settings = sys.argv[1:]
reward, calls = from_weights({"choice_correct": 1.0, "well_formed": 1.0}), []

def deadly(example, completion):
    if completion.token_ids:
        calls.append(example.id)
        if len(calls) == 14:
            os.kill(os.getpid(), signal.SIGKILL)
    return reward(example, completion)

deadly.weights = reward.weights
train(Policy.load(model), load(store), deadly, GRPO(group_size=2, kl_coef=0.04), out=out,
      settings=Training.model_validate_json(settings), quiet=True)
"""


def test_a_killed_process_resumes_to_the_bit(model_folder, examples, small, tmp_path):
    from medrl.rewards import from_weights

    write_store(tmp_path / "store", examples, source="noise", license="none")
    stored = load(tmp_path / "store")
    reward = from_weights({"choice_correct": 1.0, "well_formed": 1.0})
    options = {"settings": small, "quiet": True}
    whole = train(Policy.load(model_folder), stored, reward, OBJECTIVE, out=tmp_path / "whole", **options)
    arguments = [str(model_folder), str(tmp_path / "store"), str(tmp_path / "run"), small.model_dump_json()]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [row["step"] for row in Run.open(tmp_path / "run").metrics()] == [0, 1, 2]
    resumed = {"out": tmp_path / "run", "resume": "must"}
    run = train(Policy.load(model_folder), stored, reward, OBJECTIVE, **resumed, **options)
    assert_same_run(run, whole)


# ---------------------------------------------------------------- the rules


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_never_refuses_a_folder_that_holds_a_run_and_leaves_it_alone(whole, model_folder, examples, lively, small):
    run, _ = whole
    before = files_of(run.path)
    with pytest.raises(RunError, match="--resume auto"):
        train(Policy.load(model_folder), examples, lively, OBJECTIVE, out=run.path, settings=small, quiet=True)
    assert files_of(run.path) == before


def test_must_refuses_a_folder_without_a_run_and_makes_none(model_folder, examples, lively, small, tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        train(
            Policy.load(model_folder), examples, lively, OBJECTIVE,
            out=tmp_path / "run", settings=small, resume="must", quiet=True,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_other_settings_are_refused_by_name(whole, model_folder, examples, lively, small):
    run, _ = whole
    before = files_of(run.path)
    other = small.model_copy(update={"seed": 99, "steps": 6})
    with pytest.raises(SettingsError, match=r"seed was 3 and is now 99; steps was 5 and is now 6 \(the learning"):
        train(
            Policy.load(model_folder), examples, lively, OBJECTIVE,
            out=run.path, settings=other, resume="auto", quiet=True,
        )  # fmt: skip
    assert files_of(run.path) == before


def test_settings_that_change_no_result_may_change(whole, model_folder, examples, lively, small):
    run, weights = whole
    other = {
        "data_workers": 1,
        "data_processes": False,
        "save_every": 1,
        "keep_checkpoints": 5,
        "tokens_per_micro_batch": 512,
    }
    policy = Policy.load(model_folder)
    train(
        policy, examples, lively, OBJECTIVE,
        out=run.path, settings=small.model_copy(update=other), resume="must", quiet=True,
    )  # fmt: skip
    assert all(torch.equal(tensor, weights_of(policy)[name]) for name, tensor in weights.items())


def test_every_setting_that_may_change_is_one_of_a_recipe():
    for name in (*MAY_CHANGE, *WHY_NOT):
        section, _, field = name.partition(".")
        assert section in Recipe.model_fields
        assert (
            not field or field in {"data": Data, "policy": PolicySettings, "training": Training}[section].model_fields
        )


def test_what_changes_no_number_may_change_on_resume(whole, model_folder, examples, lively, small, tmp_path):
    options = {"out": tmp_path / "run", "quiet": True}
    with pytest.raises(KeyboardInterrupt):
        train(Policy.load(model_folder), examples, Interrupted(lively, 17), OBJECTIVE, settings=small, **options)
    other = small.model_copy(update={"keep_checkpoints": 1, "data_workers": 1, "save_every": small.save_every + 1})
    run = train(Policy.load(model_folder), examples, lively, OBJECTIVE, settings=other, **options, resume="must")
    assert len(list(run.checkpoints.iterdir())) == 1
    assert (run.path / "rollouts.jsonl").read_bytes() == (whole[0].path / "rollouts.jsonl").read_bytes()
    assert run.recipe == whole[0].recipe  # what it was started with


def test_another_model_under_the_same_name_is_refused(whole, model_folder, examples, lively, small, tmp_path):
    """Its weights are those of the checkpoint, but the KL would be to another start."""
    run, _ = whole
    shutil.copytree(run.path, tmp_path / "run")
    before = files_of(tmp_path / "run")
    other = Policy.load(model_folder)
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[0] += 1
    options = {"out": tmp_path / "run", "settings": small, "resume": "must", "quiet": True}
    with pytest.raises(RunError, match=r"the model is not the one that .* was started with"):
        train(other, examples, lively, OBJECTIVE, **options)
    assert files_of(tmp_path / "run") == before


def test_resuming_a_finished_run_changes_nothing_but_gives_its_weights(whole, model_folder, examples, lively, small):
    run, weights = whole
    before = files_of(run.path)
    policy = Policy.load(model_folder)
    train(policy, examples, lively, OBJECTIVE, out=run.path, settings=small, resume="auto", quiet=True)
    after = files_of(run.path)
    assert {name for name in after if after[name] != before[name]} <= {"provenance.json"}
    assert all(torch.equal(tensor, weights_of(policy)[name]) for name, tensor in weights.items())


def test_what_a_kill_after_the_last_save_left_is_removed_on_resume(
    whole, model_folder, examples, lively, small, tmp_path
):
    shutil.copytree(whole[0].path, tmp_path / "run")
    left = tmp_path / "run" / "checkpoints" / ".tmp-deleted-step-000002-0a1b2c3d"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    options = {"out": tmp_path / "run", "settings": small, "resume": "must", "quiet": True}
    train(Policy.load(model_folder), examples, lively, OBJECTIVE, **options)
    assert not left.exists()


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_used(
    whole, model_folder, examples, lively, small, tmp_path
):
    options = {"out": tmp_path / "run", "settings": small, "quiet": True}
    with pytest.raises(KeyboardInterrupt):
        train(Policy.load(model_folder), examples, Interrupted(lively, 17), OBJECTIVE, **options)
    damaged = tmp_path / "run" / "checkpoints" / "step-000004" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"model\.safetensors"):
        run = train(Policy.load(model_folder), examples, lively, OBJECTIVE, **options, resume="auto")
    assert_same_run(run, whole[0])
