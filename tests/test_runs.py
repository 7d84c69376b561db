import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medrl.errors import RunError
from medrl.files import write_json_atomically
from medrl.runs import Run, append_records, is_run, read_records, read_summary
from medrl.types import EvalRecord

RECIPE = {"seed": 7, "policy": {"model": "tiny", "folder": Path("models/tiny")}, "rates": (0.1, 1e-06)}


def record(id: str = "q1", **changes) -> EvalRecord:
    base = EvalRecord(
        id=id, source="CT", modality="CT", question_type="Anatomy", patient=None, images=("images/a.png",),
        question="Which organ?", options=("Liver", "Lung"), mode="think", prompt_hash="0" * 16,
        completion="<answer>A</answer>", finish_reason="stop", answer="A", target="A", correct=True,
        parts={"choice_correct": 1.0}, tokens=5,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", RECIPE, {"host": "here"})


def test_a_created_run_opens_with_what_it_was_given(run):
    opened = Run.open(run.path)
    assert opened.recipe == {
        "seed": 7,
        "policy": {"model": "tiny", "folder": "models/tiny"},
        "rates": [0.1, 1e-06],
    }
    assert opened.provenance == {"host": "here"}
    assert list(opened.recipe) == ["seed", "policy", "rates"]
    assert sorted(file.name for file in run.path.iterdir()) == ["provenance.json", "recipe.yaml"]


def test_a_run_is_never_created_over_another(run):
    run.append_metrics({"step": 1})
    with pytest.raises(RunError, match=r"already holds a run.*--resume auto.*another --out"):
        Run.create(run.path, RECIPE, {})


def test_a_run_that_was_refused_before_its_first_step_does_not_hold_its_folder(run):
    again = Run.create(run.path, {**RECIPE, "seed": 8}, {"host": "new"})
    assert (again.recipe["seed"], again.provenance) == (8, {"host": "new"})


def test_a_run_is_never_created_among_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"thesis\.tex.*another --out"):
        Run.create(tmp_path, RECIPE, {})
    assert not is_run(tmp_path)


def test_a_file_is_no_place_for_a_run(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(RunError, match="is a file"):
        Run.create(tmp_path / "out", RECIPE, {})


def test_a_start_that_was_killed_before_its_recipe_can_start_again(tmp_path):
    write_json_atomically(tmp_path / "provenance.json", {"host": "old"})
    assert Run.create(tmp_path, RECIPE, {"host": "new"}).provenance == {"host": "new"}


def test_opening_something_else_names_what_is_missing(tmp_path):
    with pytest.raises(RunError, match=r"not a run folder: .* has no recipe\.yaml"):
        Run.open(tmp_path)


@pytest.mark.parametrize("text", ["a: [1, 2", "just words", "", "!!python/object/apply:os.getcwd []"])
def test_a_recipe_that_is_no_mapping_is_refused(run, text):
    (run.path / "recipe.yaml").write_text(text)
    with pytest.raises(RunError, match=r"recipe\.yaml"):
        Run.open(run.path)


def test_provenance_grows_and_survives_reopening(run):
    run.update_provenance(seconds=3.5, host="there")
    assert Run.open(run.path).provenance == {"host": "there", "seconds": 3.5}


def test_logs_come_back_in_order(run):
    rows = [{"step": 0, "reward": 0.5}, {"step": 1, "reward": None, "text": "a\u2028b\nc\r\ud800"}]
    for row in rows:
        run.append_metrics(row)
    run.append_rollouts(rows)
    run.append_rollouts(rows)
    assert run.metrics() == rows
    assert list(run.rollouts()) == rows * 2


def test_a_new_run_has_no_logs_and_no_evaluations(run):
    assert run.metrics() == [] and list(run.rollouts()) == [] and run.evals() == {}
    assert run.offsets() == {"metrics.jsonl": 0, "rollouts.jsonl": 0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_by_name_and_nothing_is_written(run, bad):
    with pytest.raises(RunError, match=r"time\.1\.wait"):
        run.append_metrics({"step": 0, "time": [{"wait": 1.0}, {"wait": bad}]})
    assert run.metrics() == []


def test_truncating_to_the_offsets_of_a_checkpoint_makes_a_resumed_log_identical(run):
    rows = [{"step": step} for step in range(6)]
    for row in rows[:3]:
        run.append_metrics(row)
        run.append_rollouts([row, row])
    offsets = run.offsets()
    before = {name: (run.path / name).read_bytes() for name in offsets}
    for row in rows[3:]:
        run.append_metrics(row)
        run.append_rollouts([row])
    run.truncate(offsets)
    assert {name: (run.path / name).read_bytes() for name in offsets} == before
    assert offsets == {name: len(data) for name, data in before.items()}


def test_a_log_shorter_than_at_the_checkpoint_is_an_error_and_nothing_is_cut(run):
    run.append_metrics({"step": 0})
    run.append_rollouts([{"step": 0}])
    offsets = run.offsets()
    (run.path / "rollouts.jsonl").write_bytes(b"")
    run.append_metrics({"step": 1})
    with pytest.raises(RunError, match=r"rollouts\.jsonl has 0 bytes but had 12"):
        run.truncate(offsets)
    assert len(run.metrics()) == 2


def test_only_finished_evaluations_are_listed_by_name(run):
    for name in ("before", "after", "half"):
        append_records(run.path / "eval" / name / "records.jsonl", [record()])
    for name in ("before", "after"):
        write_json_atomically(run.path / "eval" / name / "summary.json", {"n": 1})
    assert list(run.evals()) == ["after", "before"]
    assert read_summary(run.evals()["after"]) == {"n": 1}
    with pytest.raises(RunError, match="not a finished evaluation"):
        read_summary(run.path / "eval" / "half")


def test_records_come_back_equal(tmp_path):
    records = [record("q1"), record("q2", patient="p", option_probs=(0.25, 0.75), answer=None, correct=False)]
    append_records(tmp_path / "records.jsonl", records[:1])
    append_records(tmp_path, records[1:])
    assert read_records(tmp_path) == read_records(tmp_path / "records.jsonl") == records


def test_reading_records_where_there_are_none_says_so(tmp_path):
    with pytest.raises(RunError, match="not an evaluation folder"):
        read_records(tmp_path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(min_value=0))
def test_wherever_a_write_is_torn_reading_gives_a_prefix_and_appending_goes_on_from_it(tmp_path, cut):
    file = tmp_path / "records.jsonl"
    file.unlink(missing_ok=True)
    records = [record(f"q{index}", completion="é\n{}") for index in range(3)]
    append_records(file, records)
    data = file.read_bytes()
    file.write_bytes(data[: cut % (len(data) + 1)])
    survived = read_records(file)
    assert survived == records[: len(survived)]
    append_records(file, records[len(survived) :])
    assert file.read_bytes() == data


@pytest.mark.parametrize("line", [b'{"id": "q', b"[1]", b"\xff\xfe", b""])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    append_records(tmp_path, [record()])
    with (tmp_path / "records.jsonl").open("ab") as stream:
        stream.write(line + b"\n")
    append_records(tmp_path, [record("q2")])
    with pytest.raises(RunError, match=r"records\.jsonl line 2"):
        read_records(tmp_path)


def test_a_line_of_another_kind_is_named_with_its_fields(tmp_path):
    row = dataclasses.asdict(record()) | {"gold": "A"}
    del row["target"]
    (tmp_path / "records.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(RunError, match=r"line 1 .*missing \['target'\], unknown \['gold'\]"):
        read_records(tmp_path)


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "summary.json"
    write_json_atomically(file, {"b": 1, "a": 2})
    with pytest.raises(RunError):
        write_json_atomically(file, {"b": float("nan")})
    with pytest.raises(TypeError, match="object"):
        write_json_atomically(file, {"b": object()})
    assert list(read_summary(tmp_path)) == ["b", "a"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EROFS])
def test_a_file_that_cannot_be_written_is_named_with_what_is_asked_for(run, monkeypatch, number):
    run.append_metrics({"step": 0})
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}

    def refuse(self, *args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        for name, write in (
            ("metrics.jsonl", lambda: run.append_metrics({"step": 1})),
            ("provenance.json", lambda: run.update_provenance(seconds=1.0)),
        ):
            with pytest.raises(RunError) as caught:
                write()
            assert f"{run.path / name} cannot be written" in str(caught.value)
            full = number == errno.ENOSPC
            assert ("the disk is full, and" in str(caught.value)) == full
            assert "--resume auto" in str(caught.value)
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


def test_what_was_appended_survives_kill_9(tmp_path):
    code = (
        "import os, signal, sys; from medrl.runs import Run\n"
        "run = Run.create(sys.argv[1], {}, {})\n"
        "run.append_rollouts({'i': i} for i in range(1000))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], env=os.environ, check=False)
    assert died.returncode == -signal.SIGKILL
    assert [row["i"] for row in Run.open(tmp_path / "run").rollouts()] == list(range(1000))


def test_reading_runs_does_not_load_torch():
    code = "import sys, medrl.runs; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
