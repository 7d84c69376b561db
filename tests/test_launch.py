"""What Slurm would be given, and submitit's own local executor running the job for real."""

import json
import os
import signal
import time

import pytest
from typer.testing import CliRunner

from medrl import launch
from medrl.cli import app
from medrl.errors import MissingExtraError, SettingsError
from medrl.stopping import Stopped

RECIPE = """
policy: {model: demo-base, dtype: float32}
data: {train: STORE, limit: 8}
method: sft
training: {steps: 2, prompts_per_step: 2, mode: no_think, template: plain-no-think, sampling: {max_new_tokens: 8}}
"""


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "a recipe.yaml"
    file.write_text(RECIPE)
    return file


def test_the_script_asks_for_a_task_per_gpu_a_signal_in_time_and_a_requeue(recipe, tmp_path):
    pytest.importorskip("submitit")
    out = tmp_path / "runs" / "ct"
    command = ["launch", "slurm", str(recipe), "--nodes", "2", "--gpus", "8", "--out", str(out), "--hours", "1.5"]
    done = CliRunner().invoke(app, [*command, "--partition", "gpu", "--dry-run"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "#!/bin/bash"
    for wanted in (
        "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=90", "--requeue", "--signal=USR2@180",
        "--partition=gpu", "--job-name=medrl-ct", "--open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH {wanted}" in lines
    assert not any("account" in line for line in lines)
    (started,) = [line for line in lines if line.startswith("srun")]
    assert started.endswith(f"-m submitit.core._submit {out}.slurm")
    # Slurm 22.05 and later give a step one core unless it asks; a rank that dies must not leave the others waiting.
    assert " --cpus-per-task=8 --kill-on-bad-exit=1 " in started
    assert not out.exists() and not (tmp_path / "runs" / "ct.slurm").exists()  # nothing was handed in


def test_a_cluster_s_own_options_are_passed_on_and_workers_of_a_study_do_not_end_each_other(tmp_path):
    pytest.importorskip("submitit")
    study = tmp_path / "study.yaml"
    study.write_text("methods: {}")
    command = ["launch", "slurm", str(study), "--out", str(tmp_path / "study"), "--cpus", "4", "--dry-run"]
    done = CliRunner().invoke(app, [*command, "--sbatch", "qos=long", "--sbatch", "exclusive"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert {"#SBATCH --qos=long", "#SBATCH --exclusive", "#SBATCH --cpus-per-task=4", "#SBATCH --requeue"} <= set(lines)
    assert "--kill-on-bad-exit" not in done.output and "--cpus-per-task=4 " in lines[-2] + lines[-3]
    wrong = CliRunner().invoke(app, [*command, "--sbatch", "--qos=long"])
    assert wrong.exit_code == 2 and "without dashes" in wrong.output


def test_without_slurm_the_way_out_is_named(recipe, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    done = CliRunner().invoke(app, ["launch", "slurm", str(recipe), "--out", str(tmp_path / "run")])
    assert done.exit_code == 2 and "--dry-run" in done.output


def test_what_cannot_be_launched_is_refused_before(recipe, tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match="does not exist"):
        launch.describe(tmp_path / "none.yaml", (), tmp_path)
    with pytest.raises(SettingsError, match="--hours is 0"):
        launch.slurm_parameters(nodes=1, gpus=1, hours=0, partition=None, account=None, name="x")
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"medrl\[cluster\]"):
        launch.slurm_script(tmp_path, {})


@pytest.fixture
def in_a_job(monkeypatch):
    """The process of a task, with a scheduler that writes down what it is asked."""
    submitit = pytest.importorskip("submitit")
    import signal

    requeued = []

    class Environment:
        num_tasks = 1

        @staticmethod
        def _usr_sig():
            return signal.SIGUSR2

    monkeypatch.setattr(submitit, "JobEnvironment", Environment)
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    signal.signal(signal.SIGUSR2, lambda number, frame: requeued.append(number))
    yield requeued
    for number, handler in before.items():
        signal.signal(number, handler)


def stopped_by(monkeypatch, number):
    """A run that is under way when the signal comes."""
    import os

    from medrl import stopping

    def run_recipe(recipe, overrides, *, out, resume):
        assert resume == "auto"
        with stopping.at_safe_points():
            os.kill(os.getpid(), number)
            stopping.check()
        raise AssertionError("nobody was stopped")

    monkeypatch.setattr("medrl.training.recipe.run_recipe", run_recipe)


def test_a_preempted_job_saves_first_and_is_requeued_a_cancelled_one_is_not(monkeypatch, in_a_job, recipe, tmp_path):
    import signal

    job = launch.describe(recipe, (), tmp_path / "run")
    stopped_by(monkeypatch, signal.SIGUSR2)
    assert job() == "saved" and in_a_job == [signal.SIGUSR2]
    in_a_job.clear()
    signal.signal(signal.SIGUSR2, lambda number, frame: in_a_job.append(number))
    stopped_by(monkeypatch, signal.SIGTERM)
    assert launch.describe(recipe, (), tmp_path / "run")() == "saved" and in_a_job == []
    assert issubclass(Stopped, KeyboardInterrupt)


STUDY = """
data: {demo: true}
axes: {modality: {}}
policy: {model: demo-base, dtype: float32}
methods: {sft: {method: sft}}
"""


def test_a_study_is_known_by_its_methods_and_each_of_its_tasks_works_alone_on_a_gpu(monkeypatch, tmp_path):
    from types import SimpleNamespace

    from medrl.study.runner import Outcome

    seen = []

    def run_study(opened, *, say):
        seen.append((opened, os.environ["CUDA_VISIBLE_DEVICES"], os.environ.get("RANK")))
        return Outcome(done=[], failed=[], blocked=[])

    monkeypatch.setattr("medrl.study.study.open_study", lambda recipe, overrides, out: (recipe.name, overrides, out))
    monkeypatch.setattr("medrl.study.study.run_study", run_study)
    (tmp_path / "study.yaml").write_text(STUDY)
    job = launch.describe(tmp_path / "study.yaml", ("seeds=[1]",), tmp_path / "out")
    assert job.work == "study"
    for rank in (0, 1):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")  # as Slurm shows them to every task of a node
        assert launch.WORK[job.work](job, SimpleNamespace(num_tasks=2, local_rank=rank)) == str(tmp_path / "out")
    expected = ("study.yaml", ("seeds=[1]",), tmp_path / "out")
    assert seen == [(expected, "4", None), (expected, "6", None)]


@pytest.mark.parametrize(("number", "requeued"), [("SIGUSR2", 1), ("SIGTERM", 0)])
def test_a_study_that_is_preempted_between_its_cells_is_requeued_a_cancelled_one_is_not(
    monkeypatch, in_a_job, tmp_path, number, requeued
):
    from medrl.study.runner import run_cells

    def run_study(opened, *, say):
        os.kill(os.getpid(), getattr(signal, number))
        return run_cells([], tmp_path, lambda cell: None, say=say)

    monkeypatch.setattr("medrl.study.study.open_study", lambda *_, **__: None)
    monkeypatch.setattr("medrl.study.study.run_study", run_study)
    (tmp_path / "study.yaml").write_text(STUDY)
    assert launch.describe(tmp_path / "study.yaml", (), tmp_path / "out")() == "saved"
    assert len(in_a_job) == requeued


@pytest.mark.slow
def test_two_tasks_of_submitit_s_local_executor_share_a_study(make_policy, make_examples, tmp_path):
    pytest.importorskip("submitit")
    import torch

    from medrl.data.store import write_store

    make_policy(torch.float32).save(tmp_path / "model")
    for side in ("train", "test"):
        examples = make_examples(tmp_path / f"{side}-images", 8, prefix=side)
        write_store(tmp_path / side, examples, source="noise", license="none")
    study = STUDY.replace("{demo: true}", f"{{train: {tmp_path / 'train'}, test: {tmp_path / 'test'}}}")
    study = study.replace("demo-base", str(tmp_path / "model"))
    training = (
        "{steps: 2, prompts_per_step: 2, mode: no_think, template: plain-no-think, sampling: {max_new_tokens: 6}}"
    )
    (tmp_path / "study.yaml").write_text(f"{study}recipe: {{training: {training}}}\n")
    job = launch.describe(tmp_path / "study.yaml", (), tmp_path / "out")
    parameters = launch.slurm_parameters(nodes=1, gpus=2, hours=1, partition=None, account=None, name="x")
    handed_in = launch.submit(job, tmp_path / "jobs", parameters, cluster="local")
    deadline = time.monotonic() + 250
    while not handed_in.done() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert handed_in.results() == [str(tmp_path / "out")] * 2, handed_in.stderr()
    assert (tmp_path / "out" / "matrices.json").exists()
    assert len(list(tmp_path.glob("out/cells/*/claims/*.json"))) == len(list(tmp_path.glob("out/cells/*"))) == 5


@pytest.mark.slow
def test_submitit_s_local_executor_trains_on_two_ranks(make_examples, tmp_path):
    pytest.importorskip("submitit")
    from medrl.data.store import write_store
    from medrl.runs import Run
    from medrl.training.checkpoint import latest_checkpoint, read_manifest

    write_store(tmp_path / "store", make_examples(tmp_path / "images", 8), source="noise", license="none")
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.replace("STORE", str(tmp_path / "store")))
    job = launch.describe(file, (), tmp_path / "run")
    parameters = launch.slurm_parameters(nodes=1, gpus=2, hours=1, partition=None, account=None, name="x")
    handed_in = launch.submit(job, tmp_path / "jobs", parameters, cluster="local")
    deadline = time.monotonic() + 250
    while not handed_in.done() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert handed_in.results() == [str(tmp_path / "run")] * 2, handed_in.stderr()
    assert [row["step"] for row in Run.open(tmp_path / "run").metrics()] == [0, 1]
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None and read_manifest(newest)["world_size"] == 2
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["world_size"] == 2
