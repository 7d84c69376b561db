import json

import pytest

from medrl.evaluation.intervals import wilson
from medrl.evaluation.metrics import summarize
from medrl.types import EvalRecord


def record(number: int, *, answer: str | None = "A", modality: str = "CT", parts=None, **changes) -> EvalRecord:
    fields = {
        "id": f"q{number}", "source": "set", "modality": modality, "question_type": "Disease", "patient": None,
        "images": (f"{number}.png",), "question": "?", "options": ("a", "b", "c", "d"), "mode": "think",
        "prompt_hash": "", "completion": "", "finish_reason": "stop", "answer": answer, "target": "A",
        "correct": answer == "A", "parts": parts or {}, "tokens": 10,
    }  # fmt: skip
    return EvalRecord(**(fields | changes))


RECORDS = [
    record(0, parts={"well_formed": 1.0}),
    record(1, answer="C", modality="MRI", parts={"well_formed": 1.0}, tokens=20),
    record(2, answer=None, modality="MRI", finish_reason="length", tokens=40, parts={"well_formed": 0.0}),
    record(3, modality="CT", options=("yes", "no")),
]


def test_an_unreadable_answer_is_wrong_and_counted():
    summary = summarize(RECORDS)
    assert summary["accuracy"] == wilson(2, 4).as_dict()
    assert summary["parse_fail_rate"] == 0.25


def test_accuracy_by_name_adds_up_to_the_whole():
    summary = summarize(RECORDS)
    assert summary["by_modality"] == {"CT": wilson(2, 2).as_dict(), "MRI": wilson(0, 2).as_dict()}
    for part in ("by_modality", "by_question_type", "by_source"):
        assert sum(accuracy["n"] for accuracy in summary[part].values()) == 4


def test_rates_and_means_by_hand():
    summary = summarize(RECORDS)
    assert summary["n"] == 4
    assert summary["truncated_rate"] == 0.25
    assert summary["mean_tokens"] == 20.0
    assert summary["well_formed"] == pytest.approx(2 / 3)  # over the three records that have the part
    assert summary["chance"] == pytest.approx((3 * 0.25 + 0.5) / 4)


def test_letters_are_laid_side_by_side():
    summary = summarize(RECORDS)
    assert summary["answer_letters"] == {"A": 2, "C": 1}
    assert summary["target_letters"] == {"A": 4, "C": 0}


def test_no_records_are_no_error_and_valid_json():
    summary = summarize([])
    assert summary["n"] == 0 and summary["accuracy"]["value"] is None and summary["mean_tokens"] is None
    json.dumps(summary, allow_nan=False)


def test_the_order_of_the_records_does_not_matter():
    assert json.dumps(summarize(RECORDS)) == json.dumps(summarize(RECORDS[::-1]))
