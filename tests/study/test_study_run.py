"""A whole study, killed, shared, failing; and the words that reproduce a cell."""

import hashlib
import json
import multiprocessing
import random
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from medrl.cli import app
from medrl.errors import DataError, SettingsError
from medrl.runs import Run, read_records
from medrl.stopping import Stopped
from medrl.study.runner import run_cells, state_of
from medrl.study.study import measure, open_study, run_study
from medrl.study.written import in_domain

WORKERS = multiprocessing.get_context("forkserver")
WORKERS.set_forkserver_preload(["medrl.study.study", "medrl.training.recipe", "medrl.evaluation.subject"])


def work(recipe: Path, out: Path, log: Path) -> None:
    """A worker in a process of its own."""
    with log.open("a") as stream:
        run_study(open_study(recipe, out=out), say=lambda line: print(line, file=stream, flush=True), poll_s=0.05)


def start(mini: Path, out: Path, name: str) -> multiprocessing.Process:
    out.mkdir(exist_ok=True)
    worker = WORKERS.Process(target=work, args=(mini / "study.yaml", out, out / f"{name}.log"))
    worker.start()
    return worker


def taken(out: Path, name: str) -> list[str]:
    """Cells a worker took up, from its log."""
    log = out / f"{name}.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.split("] ")[1].split(",")[0] for line in lines if line.startswith("[")]


@pytest.fixture(scope="module")
def finished(mini, tmp_path_factory) -> Path:
    """The study that nobody disturbs."""
    out = tmp_path_factory.mktemp("studies") / "whole"
    opened = open_study(mini / "study.yaml", out=out)
    outcome = run_study(opened, say=lambda _: None)
    assert len(outcome.done) == len(opened.plan.cells) == 13
    return out


def test_what_programs_rely_on_is_there(finished):
    matrices = json.loads((finished / "matrices.json").read_text())
    assert set(matrices) == {"modality", "all"}
    found = matrices["modality"]
    assert found["domains"] == ["CT", "MRI"]
    assert set(found["methods"]) == {"zero-shot", "sft", "grpo"}
    assert [len(found["methods"][name]["accuracy"]) for name in ("zero-shot", "sft", "grpo")] == [1, 2, 2]
    for name in ("accuracy", "low", "high", "n"):
        assert all(len(row) == 2 for row in found["methods"]["grpo"][name])
    for scope in ("diagonal", "off_diagonal", "overall"):
        assert set(found["means"]["grpo"][scope]) >= {"value", "low", "high"}
    assert all(len(row) == 2 for row in found["blind"].values())
    assert set(found["claims"][0]) >= {"a", "b", "scope", "difference", "low", "high", "p_holm"}
    assert (finished / "study.html").stat().st_size > 10_000


def test_the_page_lays_the_base_beside_the_specialist_of_each_items_own_domain(finished, mini):
    opened = open_study(mini / "study.yaml", out=finished)
    plan, by_name = opened.plan, {evaluation.name: evaluation for evaluation in in_domain(opened.plan, finished)}
    assert set(by_name) == {"zero-shot", "sft", "grpo"}
    for name, evaluation in by_name.items():
        assert len(evaluation.records) == plan.n_test
        for record in evaluation.records:
            where = (None, None, None) if name == "zero-shot" else ("modality", record.modality, 0)
            assert record in read_records(plan.find(name, *where).result(finished))
    page = (finished / "study.html").read_text()
    assert "What they wrote" in page and page.count('class="card item"') == 12 and "data:image/jpeg" in page


def test_the_matrices_follow_from_the_records(finished, mini):
    found = json.loads((finished / "matrices.json").read_text())["modality"]
    plan = open_study(mini / "study.yaml", out=finished).plan
    for i, trained_on in enumerate(found["trained_on"]):
        records = read_records(plan.find("grpo", "modality", trained_on, 0).result(finished))
        assert len(records) == 12  # the whole test set, once
        for j, tested_on in enumerate(found["domains"]):
            right = [record.correct for record in records if record.modality == tested_on]
            assert found["methods"]["grpo"]["accuracy"][i][j] == pytest.approx(sum(right) / len(right))
            assert found["methods"]["grpo"]["n"][i][j] == len(right)


def test_killed_ten_times_and_started_again_it_ends_with_the_same_matrices_to_the_last_digit(finished, mini, tmp_path):
    chance, out, killed = random.Random(3), tmp_path / "out", 0
    for number in range(200):
        worker = start(mini, out, f"worker-{number}")
        worker.join(chance.uniform(0.05, 0.7) if killed < 10 else None)
        if worker.exitcode == 0:
            break
        worker.kill()
        worker.join()
        killed += 1
    assert worker.exitcode == 0 and killed >= 3
    assert (out / "matrices.json").read_bytes() == (finished / "matrices.json").read_bytes()
    assert (out / "tables" / "tables.tex").read_bytes() == (finished / "tables" / "tables.tex").read_bytes()


def test_two_workers_share_a_study_without_doing_a_cell_twice(finished, mini, tmp_path):
    out = tmp_path / "out"
    workers = [start(mini, out, name) for name in ("one", "two")]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    one, two = taken(out, "one"), taken(out, "two")
    assert one and two and len(one + two) == len(set(one + two)) == 13
    assert (out / "matrices.json").read_bytes() == (finished / "matrices.json").read_bytes()


def test_one_worker_killed_in_the_middle_of_a_cell_the_other_finishes(finished, mini, tmp_path):
    out = tmp_path / "out"
    victim = start(mini, out, "victim")
    while not any(cell.startswith("train") for cell in taken(out, "victim")):
        time.sleep(0.01)
    other = start(mini, out, "other")
    victim.kill()
    victim.join()
    other.join()
    assert other.exitcode == 0
    assert (out / "matrices.json").read_bytes() == (finished / "matrices.json").read_bytes()


def test_a_finished_study_is_used_again_and_does_nothing(finished, mini):
    said = []
    outcome = run_study(open_study(mini / "study.yaml", out=finished), say=said.append)
    assert said == [] and len(outcome.done) == 13


def test_a_changed_method_is_trained_anew_and_the_others_are_kept(finished, mini, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    opened = open_study(mini / "study.yaml", ["methods.sft.training.steps=2"], out=out)
    states = {cell.id: state_of(cell, out) for cell in opened.plan.cells}
    assert {cell.method for cell in opened.plan.cells if states[cell.id] == "waiting"} == {"sft"}
    assert sum(state == "done" for state in states.values()) == 7


def test_another_base_under_the_same_name_is_other_work(mini, make_policy, tmp_path):
    for seed in (0, 1):
        make_policy(torch.float32, seed=seed).save(tmp_path / f"model-{seed}")
    shutil.copytree(tmp_path / "model-0", tmp_path / "model")
    ids = []
    for folder in ("model-0", "model", "model-1"):
        plan = open_study(mini / "study.yaml", [f"policy.model={tmp_path / folder}"], out=tmp_path / "out").plan
        ids.append([cell.id for cell in plan.cells])
    assert ids[0] == ids[1] and not set(ids[0]) & set(ids[2])


def test_a_cell_that_fails_is_marked_and_tried_again_only_when_asked(mini, tmp_path):
    out, said = tmp_path / "out", []
    words = [f"--out={out}", "--no-calibrate", "axes={modality: {train: [CT]}}", "methods={grpo: {}}"]
    broken = CliRunner().invoke(app, ["study", str(mini / "study.yaml"), *words, "launcher=['false']"])
    assert broken.exit_code == 1 and "2 cells failed" not in broken.stdout
    opened = open_study(mini / "study.yaml", words[2:], out=out)
    states = [state_of(cell, out) for cell in opened.plan.cells]
    assert states == ["failed", "failed", "blocked"]
    outcome = run_study(opened, say=said.append)
    assert (len(outcome.done), len(outcome.failed), len(outcome.blocked)) == (0, 2, 1) and said == []
    outcome = run_study(opened, say=said.append, retry_failed=True)
    assert len(outcome.done) == 3 and (out / "matrices.json").exists()


def test_what_one_cell_lacks_is_left_out_and_the_rest_is_reported(finished, mini, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    opened = open_study(mini / "study.yaml", out=out)
    broken = opened.plan.find("grpo", "modality", "CT", 0)
    (broken.folder(out) / "done.json").unlink()
    (broken.folder(out) / "failed.json").write_text(json.dumps({"cell": broken.id, "reason": "DataError: <b>no</b>"}))
    run_study(opened, say=lambda _: None)
    found = json.loads((out / "matrices.json").read_text())["modality"]
    whole = json.loads((finished / "matrices.json").read_text())["modality"]
    assert found["methods"]["grpo"]["accuracy"][0] == [None, None]
    assert found["methods"]["grpo"]["accuracy"][1] == whole["methods"]["grpo"]["accuracy"][1]
    assert found["means"]["grpo"]["overall"]["value"] is None
    assert found["means"]["sft"] == whole["means"]["sft"]
    page = (out / "study.html").read_text()
    assert "1 cell failed" in page and "&lt;b&gt;no&lt;/b&gt;" in page


def test_other_work_goes_on_when_a_cell_fails(mini, tmp_path):
    plan = open_study(mini / "study.yaml", out=tmp_path).plan
    unlucky = plan.cells[1].id

    def fail_one(cell):
        if cell.id == unlucky:
            raise DataError("no such picture")

    outcome = run_cells(plan.cells, tmp_path, fail_one, say=lambda _: None)
    assert [cell.id for cell in outcome.failed] == [unlucky]
    assert [cell.needs for cell in outcome.blocked] == [unlucky]
    assert len(outcome.done) == 11


def test_a_mistake_ends_the_worker_loudly_and_the_next_one_does_the_other_work(mini, tmp_path):
    plan = open_study(mini / "study.yaml", out=tmp_path).plan
    unlucky, said = plan.cells[1], []

    def mistaken(cell):
        if cell.id == unlucky.id:
            raise KeyError("modality")

    with pytest.raises(KeyError, match="modality"):
        run_cells(plan.cells, tmp_path, mistaken, say=said.append)
    assert said[-1] == "    failed: KeyError: 'modality'"
    assert json.loads((unlucky.folder(tmp_path) / "failed.json").read_text())["reason"] == "KeyError: 'modality'"
    outcome = run_cells(plan.cells, tmp_path, mistaken, say=said.append)
    assert [cell.id for cell in outcome.failed] == [unlucky.id] and len(outcome.done) == 11


@pytest.mark.parametrize("stop", [Stopped, KeyboardInterrupt, SystemExit])
def test_a_cell_that_was_stopped_has_not_failed(mini, tmp_path, stop):
    plan = open_study(mini / "study.yaml", out=tmp_path).plan

    def stopped(cell):
        raise stop

    with pytest.raises(stop):
        run_cells(plan.cells, tmp_path, stopped, say=lambda _: None)
    assert {state_of(cell, tmp_path) for cell in plan.cells} == {"waiting"}
    assert len(run_cells(plan.cells, tmp_path, lambda cell: None, say=lambda _: None).done) == 13


def test_the_plan_names_every_cell_and_runs_none(mini, tmp_path):
    done = CliRunner().invoke(app, ["study", str(mini / "study.yaml"), "--out", str(tmp_path), "--plan", "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert [cell["kind"] for cell in plan["cells"]].count("train") == 6
    assert all(cell["state"] == "waiting" for cell in plan["cells"])
    assert plan["estimate"]["seconds"] is None and not (tmp_path / "cells").exists()
    words = CliRunner().invoke(app, ["study", str(mini / "study.yaml"), "--out", str(tmp_path), "--plan"])
    assert "6 trainings and 7 evaluations" in words.stdout


def test_a_short_calibration_tells_time_and_disk(mini, tmp_path):
    words = ["study", str(mini / "study.yaml"), "--out", str(tmp_path), "--plan", "--calibrate", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["estimate"]
    assert found["seconds"] > 0 and found["left"] == 13
    assert found["bytes"] > 6 * (tmp_path / "calibration.json").stat().st_size
    assert not (tmp_path / "calibration").exists() and not (tmp_path / "cells").exists()


def test_a_method_that_cannot_be_tried_is_named_before_the_run_and_the_others_go_on(mini, tmp_path):
    reward = tmp_path / "broken.py"
    reward.write_text("def nothing(example, completion):\n    raise ValueError('no such table')\n")
    bad = {"reward": f"{reward}:nothing"}
    words = [
        f"--out={tmp_path / 'out'}",
        "axes={modality: {train: [CT]}}",
        f"methods={{sft: {{method: sft}}, bad: {bad}}}",
    ]
    broken = CliRunner().invoke(app, ["study", str(mini / "study.yaml"), *words])
    assert broken.exit_code == 1, broken.output
    assert "bad could not be tried and its cells will fail: " in broken.stdout and "no such table" in broken.stdout
    assert "modality: 1 trained on" in broken.stdout and "sft" in broken.stdout
    opened = open_study(mini / "study.yaml", words[1:], out=tmp_path / "out")
    assert [state_of(cell, opened.out) for cell in opened.plan.cells] == ["done"] * 3 + ["failed", "blocked"]
    assert "sft" in json.loads((tmp_path / "out" / "calibration.json").read_text())["methods"]
    reward.write_text(
        "def nothing(example, completion):\n    return float(f'<answer>{example.target}<' in completion.text)\n"
    )
    mended = CliRunner().invoke(app, ["study", str(mini / "study.yaml"), *words, "--retry-failed"])
    assert mended.exit_code == 0, mended.output
    assert set(json.loads((tmp_path / "out" / "calibration.json").read_text())["methods"]) == {"sft", "bad"}


def test_the_command_of_a_cell_gives_what_the_cell_gave(finished, mini, tmp_path):
    plan = json.loads(
        CliRunner().invoke(app, ["study", str(mini / "study.yaml"), "--out", str(finished), "--plan", "--json"]).stdout
    )
    trained = next(cell for cell in plan["cells"] if cell["kind"] == "train" and cell["method"] == "grpo")
    evaluated = next(cell for cell in plan["cells"] if cell["needs"] == trained["id"])
    words = trained["command"][1:]
    words[words.index("--out") + 1] = str(tmp_path / "run")
    assert CliRunner().invoke(app, words).exit_code == 0
    words = evaluated["command"][1:]
    original = Path(words[words.index("--out") + 1])
    words[words.index("--out") + 1], words[1] = str(tmp_path / "eval"), str(tmp_path / "run")
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert read_records(tmp_path / "eval") == read_records(original)


@pytest.fixture
def own_reward(mini, tmp_path) -> Path:
    """study.yaml of one method, with a reward function in a file beside it."""
    study = yaml.safe_load((mini / "study.yaml").read_text())
    study |= {"axes": {"all": {}}, "methods": {"grpo": {"reward": "my_rewards.py:mine"}}}
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.yaml").write_text(yaml.safe_dump(study))
    (tmp_path / "study" / "my_rewards.py").write_text(MINE)
    return tmp_path / "study" / "study.yaml"


MINE = """
def mine(example, completion):
    return float(f"<answer>{example.target}</answer>" in completion.text)
"""


@pytest.mark.parametrize("launcher", [[], [sys.executable, "-m", "medrl"]])
def test_a_reward_beside_the_study_is_found_by_its_estimate_and_its_cells(own_reward, tmp_path, launcher):
    opened = open_study(own_reward, [f"launcher={json.dumps(launcher)}"], out=tmp_path / "out")
    if not launcher:
        measure(opened)
    outcome = run_study(opened, say=lambda _: None)
    assert len(outcome.done) == 3 and not outcome.failed
    trained = next(cell for cell in outcome.done if cell.kind == "train")
    files = Run.open(trained.result(opened.out)).provenance["reward_files"]
    assert list(files.values()) == [hashlib.sha256(MINE.encode()).hexdigest()]


def test_an_edited_reward_file_is_other_work_and_where_it_lies_is_not(own_reward, tmp_path):
    def ids(recipe: Path) -> list[str]:
        return [cell.id for cell in open_study(recipe, out=tmp_path / "out").plan.cells]

    before = ids(own_reward)
    shutil.copytree(own_reward.parent, tmp_path / "elsewhere")
    assert ids(tmp_path / "elsewhere" / "study.yaml") == before
    (own_reward.parent / "my_rewards.py").write_text(MINE + "\n# tuned")
    base, *trained = ids(own_reward)
    assert base == before[0] and not set(trained) & set(before)
    (own_reward.parent / "my_rewards.py").unlink()
    with pytest.raises(SettingsError, match=r"there is no file my_rewards\.py in .*study"):
        ids(own_reward)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["axes={modality: {train: [PET]}}"], "axes.modality asks for PET"),
        (["methods.grpo.grpo.grup_size=3"], "methods.grpo.*grup_size"),
        (["data.store=x"], "one of: demo"),
        (["seeds=[1, 1]"], "twice"),
        (["methods={zero-shot: {}}"], "names both a method and a zero-shot row"),
    ],
)
def test_words_that_mean_nothing_are_refused_before_anything_runs(mini, tmp_path, changes, says):
    with pytest.raises((SettingsError, DataError), match=says):
        open_study(mini / "study.yaml", changes, out=tmp_path)
    assert not (tmp_path / "cells").exists()
