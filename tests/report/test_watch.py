import json
import os
from datetime import UTC, datetime

import pytest
from typer.testing import CliRunner

from medrl.cli import app
from medrl.errors import RunError
from medrl.files import write_json_atomically
from medrl.report.watch import watch
from medrl.runs import Run, append_records, read_records

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: float) -> float:
    return BEGIN.timestamp() + seconds


def written(path, seconds: float) -> None:
    os.utime(path, (at(seconds), at(seconds)))


@pytest.fixture
def answering(finished_run, tmp_path):
    """An evaluation of 160 questions: 20 answered an hour before, 30 in the 60 seconds since it was continued."""
    out = tmp_path / "eval"
    append_records(out, read_records(finished_run / "eval" / "after")[:50])
    write_json_atomically(out / "asked.json", {"started": at(-3600), "questions": 160})
    progress = {"since": BEGIN.isoformat(), "answered_before": 20, "to_answer": 140}
    write_json_atomically(out / "progress.json", progress)
    written(out / "records.jsonl", 60)
    written(out / "progress.json", 0)
    return out


def test_an_evaluation_says_how_far_it_is_and_when_it_ends(answering):
    (status,) = watch(answering, now=at(61))
    assert (status.done, status.total, status.finished, status.silent_s) == (50, 160, False, None)
    assert status.eta_s == pytest.approx(110 * 60 / 30)  # two seconds each, for the 110 that are left
    records = read_records(answering)
    assert status.numbers == {"accuracy": sum(record.correct for record in records) / 50}
    assert status.line().startswith("eval: 50/160 questions  accuracy 0.") and "4 min left" in status.line()


def test_a_torn_last_line_is_not_counted(answering):
    file = answering / "records.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    assert watch(answering, now=at(61))[0].done == 49


def test_work_that_writes_nothing_any_more_is_said_to_be_silent(answering):
    (status,) = watch(answering, now=at(60 + 400))
    assert (status.silent_s, status.eta_s) == (400, None)
    assert "nothing written for 7 min: stopped, or stuck" in status.line()


def test_an_evaluation_in_shards_ends_with_its_slowest(answering):
    os.rename(answering, answering.parent / "whole")
    whole, records = answering.parent / "whole", read_records(answering.parent / "whole")
    for index, (count, since) in enumerate(((10, 30), (20, 0)), start=1):
        part = whole / "shards" / f"{index}-of-2"
        append_records(part, records[:count] if index == 1 else records[count:])
        started = datetime.fromtimestamp(at(since), UTC).isoformat()
        write_json_atomically(part / "progress.json", {"since": started, "answered_before": 0, "to_answer": 80})
        written(part / "records.jsonl", 60)
    (whole / "records.jsonl").unlink()
    (whole / "progress.json").unlink()
    (status,) = watch(whole, now=at(61))
    assert (status.done, status.total) == (40, 160)
    assert status.eta_s == pytest.approx(70 * 30 / 10)  # the first: 3 s each, 70 left; the second 2 s each, 50 left


def test_a_run_and_its_evaluations_are_found_below_a_folder(finished_run):
    found = {status.name: status for status in watch(finished_run.parent)}
    run = found[finished_run.name]
    assert (run.kind, run.done, run.total, run.finished) == ("train", 120, 120, True)
    assert found[f"{finished_run.name}/eval/after"].finished
    assert run.line().endswith("finished")


def test_a_run_under_way_says_when_it_ends(tmp_path):
    run = Run.create(tmp_path / "run", {"training": {"steps": 10}}, {})
    run.append_metrics({"step": 3, "reward": 1.25, "time/step_s": 20.0, "eta_s": 120.0})
    now = (run.path / "metrics.jsonl").stat().st_mtime
    (status,) = watch(run.path, now=now + 300)
    assert (status.done, status.total, status.eta_s, status.numbers) == (4, 10, 120.0, {"reward": 1.25})
    (status,) = watch(run.path, now=now + 401)  # twenty steps' time without a row
    assert status.silent_s == pytest.approx(401)


@pytest.fixture
def study(tmp_path):
    """Four cells: a training that took 30 s, its evaluation under way, a failed training, and what needs that."""
    cells = [
        {"id": "train-a", "kind": "train", "method": "grpo", "needs": None},
        {"id": "eval-a", "kind": "eval", "method": "grpo", "needs": "train-a"},
        {"id": "train-b", "kind": "train", "method": "grpo", "needs": None},
        {"id": "eval-b", "kind": "eval", "method": "grpo", "needs": "train-b"},
    ]
    out = tmp_path / "study"
    write_json_atomically(out / "plan.json", {"cells": cells})
    write_json_atomically(out / "cells" / "train-a" / "done.json", {"cell": "train-a", "seconds": 30.0})
    write_json_atomically(out / "cells" / "eval-a" / "claims" / "0001.json", {})
    write_json_atomically(out / "cells" / "train-b" / "failed.json", {"cell": "train-b", "reason": "no"})
    for cell in ("train-a", "train-b"):
        Run.create(out / "cells" / cell / "run", {"training": {"steps": 10}}, {})
    written(out / "cells" / "eval-a" / "claims" / "0001.json", 60)
    return out


def test_a_study_says_how_many_cells_are_done_and_hides_those_that_are_settled(study):
    (status,) = watch(study, now=at(61))
    assert (status.kind, status.done, status.total, status.finished) == ("study", 1, 4, False)
    assert (status.eta_s, status.silent_s, status.numbers) == (30.0, None, {"failed": 1.0})
    assert status.line() == "study: 1/4 cells  failed 1  30 s left"
    (silent,) = watch(study, now=at(60 + 400))
    assert (silent.eta_s, silent.silent_s) == (None, 400)


def test_a_study_is_watched_from_one_cell_to_the_next_until_no_cell_is_left(study):
    cell = study / "cells" / "eval-a"
    append_records(cell / "eval", [])
    write_json_atomically(cell / "eval" / "asked.json", {"questions": 7})
    assert [s.name for s in watch(study, now=at(61))] == ["study", "cells/eval-a/eval"]
    write_json_atomically(cell / "done.json", {"cell": "eval-a", "seconds": 5.0})
    (status,) = watch(study, now=at(61))  # what needs the failed one is not waited for
    assert (status.done, status.finished, status.eta_s) == (2, True, None)


def test_a_folder_without_work_is_refused(tmp_path):
    with pytest.raises(RunError, match="no run and no evaluation"):
        watch(tmp_path)


def test_the_command_ends_when_all_is_finished_and_prints_json(finished_run):
    shown = CliRunner().invoke(app, ["watch", str(finished_run)])
    assert shown.exit_code == 0 and "160 questions" in shown.stdout and "120/120 steps" in shown.stdout
    rows = json.loads(CliRunner().invoke(app, ["watch", str(finished_run), "--json"]).stdout)
    assert {row["kind"] for row in rows} == {"train", "eval"} and all(row["finished"] for row in rows)
