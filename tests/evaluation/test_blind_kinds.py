"""Blind baselines, chance and audits over questions that are no choices."""

import pytest

from medrl.evaluation.audit import audit
from medrl.evaluation.blind import blind_baselines
from medrl.evaluation.metrics import chance, summarize
from medrl.evaluation.option_probs import answer_place
from medrl.evaluation.text_classifier import fit_text_classifier
from medrl.types import Completion, EvalRecord, Example


def example(kind: str, target: str, question: str = "?", options: tuple[str, ...] = (), **facts) -> Example:
    facts = {"id": f"{kind} {target} {question}", "source": "s", "images": (), **facts}
    return Example(question=question, options=options, target=target, kind=kind, **facts)


FINDINGS = ("edema", "mass", "cyst")
TRAIN = [
    example("yes_no", "no", "Is it big?"),
    example("yes_no", "yes", "Is it bright?"),
    example("yes_no", "yes", "Is it dark?"),
    example("numeric", "3 cm", "How wide?"),
    example("numeric", "2 cm", "How high?"),
    example("numeric", "3 cm", "How deep?"),
    example("short", "liver", "Which organ?"),
    example("multi_select", "A, B", "Findings?", FINDINGS),
    example("multi_select", "A, B", "Findings? (2)", ("edema", "cyst", "mass")),
    example("multi_select", "A", "Findings? (3)", ("edema", "bleeding")),
]


def answers(test: list[Example], train=TRAIN) -> dict[str, list[str]]:
    return {result.name: result.answers for result in blind_baselines(train, test)}


def test_free_answers_are_guessed_from_what_was_right_in_training_and_graded_by_their_kind():
    test = [example("numeric", "30 mm", "How far?"), example("numeric", "20 mm", "how HIGH?")]
    by_name = {result.name: result for result in blind_baselines(TRAIN, test)}
    assert by_name["majority_letter"].answers == by_name["option_prior"].answers == ["3 cm", "3 cm"]
    assert by_name["question_option_prior"].answers == ["3 cm", "2 cm"]
    assert by_name["option_prior"].correct == [True, False] and by_name["question_option_prior"].correct == [True, True]
    assert by_name["longest_option"].correct == [False, False]


def test_yes_and_no_are_offered_though_they_are_no_options():
    test = [example("yes_no", "no", "Is it new?"), example("yes_no", "no", "Is it big?")]
    found = answers(test)
    assert found["majority_letter"] == found["option_prior"] == ["yes", "yes"]
    assert found["question_option_prior"] == ["yes", "no"]
    assert fit_text_classifier(TRAIN)(test)[1] == "no"


def test_of_several_options_those_are_taken_that_are_right_more_often_than_not():
    # Of the shares, shrunk by one observation of the average option (5 of 8): edema (3 + .625) / 4, mass
    # (1 + .625) / 3 and cyst (1 + .625) / 3 above one half, bleeding .625 / 2 below.
    test = [example("multi_select", "A", "New?", ("bleeding", "edema", "cyst"))]
    assert answers(test)["option_prior"] == ["B, C"]
    none_likely = [example("multi_select", "A", "New?", ("bleeding", "bleeding"))]
    assert answers(none_likely)["option_prior"] == ["A"]
    assert answers(none_likely)["majority_letter"] == ["A, B"]


def test_a_kind_that_training_never_had_is_left_unanswered():
    (box,) = [example("box", "1, 2, 3, 4")]
    assert {name: given for name, given in answers([box]).items() if any(given)} == {}


@pytest.mark.parametrize(
    ("kind", "n_options", "expected"),
    [("choice", 4, 1 / 4), ("multi_select", 3, 1 / 7), ("yes_no", 0, 1 / 2), ("numeric", 0, 0.0), ("box", 0, 0.0)],
)
def test_chance_by_hand(kind, n_options, expected):
    assert chance(kind, n_options) == pytest.approx(expected)


def record(kind: str, answer: str | None, target: str, options=()) -> EvalRecord:
    return EvalRecord(
        id=f"{kind}{answer}", source="s", modality="CT", question_type="T", patient=None, images=(), question="?",
        options=options, mode="think", prompt_hash="", completion="", finish_reason="stop", answer=answer,
        target=target, correct=False, parts={}, tokens=1, kind=kind,
    )  # fmt: skip


def test_a_summary_counts_letters_of_what_has_letters():
    records = [
        record("multi_select", "A, C", "A", FINDINGS),
        record("numeric", "3 cm", "4 cm"),
        record("yes_no", None, "no"),
    ]
    summary = summarize(records)
    assert summary["answer_letters"] == {"A": 1, "C": 1, "no": 0}
    assert summary["target_letters"] == {"A": 1, "C": 0, "no": 1}
    assert summary["chance"] == pytest.approx((1 / 7 + 0 + 1 / 2) / 3)


def test_an_audit_of_every_kind_grades_right_answers_by_their_kind():
    test = [example("yes_no", "no", "Is it big?"), example("short", "the liver", "Which organ is it?")]
    found = audit(TRAIN, test)
    assert found.gold_rejected == found.gold_rejected_train == []
    assert found.blind["random"].value == pytest.approx(1 / 4)
    assert found.blind["option_prior"].value == pytest.approx(1 / 2)  # "yes" is wrong, "liver" right
    assert found.balance["test"]["letters"] == {"no": 1}


def test_probabilities_of_letters_belong_to_choices_alone():
    completion = Completion(text="<answer>A</answer>", token_ids=(), finish_reason="stop", mode="no_think")
    assert answer_place(example("choice", "A", options=FINDINGS), completion) == len("<answer>")
    assert answer_place(example("multi_select", "A", options=FINDINGS), completion) is None
    assert answer_place(example("yes_no", "no"), completion) is None
