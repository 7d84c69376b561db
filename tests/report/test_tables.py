import dataclasses

import pytest

from medrl.errors import RunError
from medrl.evaluation.intervals import wilson
from medrl.files import write_json_atomically
from medrl.report.tables import (
    by_test_set,
    domain_rows,
    evaluation_alarms,
    failure,
    failure_rows,
    headline_rows,
    read_evaluation,
)


@pytest.fixture(scope="module")
def before(finished_run):
    return read_evaluation(finished_run / "eval" / "before")


@pytest.fixture(scope="module")
def after(finished_run):
    return read_evaluation(finished_run / "eval" / "after")


def test_the_headline_holds_every_evaluation_and_every_blind_baseline_once(before, after):
    rows = headline_rows([before, after])
    assert [row.name for row in rows] == [
        "before",
        "after",
        "longest_option",
        "majority_letter",
        "option_prior",
        "question_option_prior",
    ]
    assert rows[0].accuracy == wilson(sum(record.correct for record in before.records), 160)
    assert rows[0].comparison is None and rows[1].comparison is not None and rows[1].comparison.better
    assert sum(row.best_blind for row in rows) == 1


def test_figures_come_from_the_records_not_from_the_summary(finished_run, before, tmp_path):
    (tmp_path / "records.jsonl").write_bytes((before.path / "records.jsonl").read_bytes())
    write_json_atomically(tmp_path / "summary.json", {"name": "boast", "accuracy": {"value": 0.99}})
    assert headline_rows([read_evaluation(tmp_path)])[0].accuracy == before.accuracy


def test_only_evaluations_over_the_same_examples_stand_together(before, after):
    fewer = dataclasses.replace(after, records=after.records[:50])
    assert by_test_set([before, fewer, after]) == [[before, after], [fewer]]


def test_domain_rows_add_up_and_end_with_the_best_blind_baseline(before, after):
    rows = domain_rows([before, after], "modality")
    assert [row.name for row in rows] == ["CT", "Magnetic resonance imaging", "X-ray"]
    assert sum(row.n for row in rows) == 160
    assert all(len(row.accuracies) == 3 for row in rows)
    ct = [record.correct for record in after.records if record.modality == "CT"]
    assert rows[0].accuracies[1] == wilson(sum(ct), len(ct))


def test_alarms_name_what_is_off_and_are_silent_when_nothing_is(before, after):
    alarms = " ".join(evaluation_alarms([before, after]))
    assert "before: 25.6\u202f% of the completions had no readable answer" in alarms
    assert "before: 25.6\u202f% of the completions were cut off" in alarms
    assert "before: accuracy is not shown to be above the best blind baseline" in alarms
    assert evaluation_alarms([after]) == []


def test_a_change_that_is_not_shown_or_is_for_the_worse_is_an_alarm(before, after):
    worse = " ".join(evaluation_alarms([after, before]))
    assert "before is worse than after by 41.2 points" in worse
    same = evaluation_alarms([after, dataclasses.replace(after, name="again")])
    assert same == [alarm for alarm in same if alarm.startswith("No difference shown: again minus after is +0.0")]
    assert len(same) == 1


def test_a_letter_answered_far_too_often_is_an_alarm(after):
    figures = {**after.figures, "answer_letters": {"A": 20, "C": 80}, "target_letters": {"A": 50, "C": 50}}
    alarms = evaluation_alarms([dataclasses.replace(after, figures=figures)])
    assert alarms == ["after: it answers C in 80\u202f% of cases, but C is right in 50\u202f%."]


def test_an_evaluation_without_blind_baselines_says_so(after):
    bare = dataclasses.replace(after, summary={**after.summary, "blind": []})
    assert evaluation_alarms([bare]) == [
        "No blind baseline was kept: how far one gets without looking at the images is not known."
    ]


def test_a_blind_baseline_over_other_examples_is_an_error(after):
    wrong = dataclasses.replace(after, summary={**after.summary, "blind": [{"name": "x", "correct": {"q": True}}]})
    with pytest.raises(RunError, match="different examples"):
        evaluation_alarms([wrong])


def test_a_blind_baseline_without_its_answers_is_an_error(after):
    wrong = dataclasses.replace(after, summary={**after.summary, "blind": [{"name": "x", "accuracy": {}}]})
    with pytest.raises(RunError, match=r"summary\.json: each entry of 'blind' needs"):
        headline_rows([wrong])


def test_failures_are_told_apart_and_with_the_right_answers_they_are_all(finished_run):
    evaluation = read_evaluation(finished_run / "eval" / "before")
    first = evaluation.records[0]
    cases = {
        None: {"correct": True, "answer": None},
        "wrong, in form": {"answer": "B", "parts": {"well_formed": 1.0}},
        "wrong, and out of form": {"answer": "B", "parts": {"well_formed": 0.0}},
        "no readable answer": {"answer": None, "finish_reason": "stop"},
        "cut off before an answer": {"answer": None, "finish_reason": "length"},
    }
    for kind, changes in cases.items():
        assert failure(dataclasses.replace(first, **{"correct": False, **changes})) == kind
    shares = [interval.value or 0.0 for _, (interval,) in failure_rows([evaluation])]
    assert sum(shares) == pytest.approx(1 - (evaluation.accuracy.value or 0.0))
    assert shares[3] > 0 and shares[1] == 0
