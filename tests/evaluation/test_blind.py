import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medrl.evaluation.blind import best_blind, blind_baselines
from medrl.evaluation.intervals import wilson
from medrl.types import LETTERS, Example


def example(id: str, question: str, options: str, target: str) -> Example:
    return Example(
        id=id, source="s", images=(), question=question, options=tuple(options.split("|")), target=target
    )  # fmt: skip


TRAIN = [
    example("t0", "What is shown?", "Normal|Pneumonia", "B"),
    example("t1", "What is shown?", "Pneumonia|Normal", "A"),
    example("t2", "Is it healthy?", "Normal|Pneumonia|Fracture", "A"),
    example("t3", "Is it healthy?", "Fracture|Normal", "B"),
    example("t4", "Is it healthy?", "Fracture|Normal", "B"),
]


def answers(test: list[Example], train: list[Example] | None = TRAIN) -> dict[str, list[str]]:
    return {result.name: result.answers for result in blind_baselines(train, test)}


def test_without_train_only_the_baseline_that_needs_no_fit_answers():
    assert answers([example("x", "?", "a|bbb|cc", "A")], train=None) == {"longest_option": ["B"]}


def test_the_majority_letter_is_taken_among_the_letters_offered():
    train = [example(f"t{i}", "?", "a|b|c", letter) for i, letter in enumerate("CCCBBA")]
    test = [example("x", "?", "p|q|r", "A"), example("y", "?", "p|q", "A")]
    assert answers(test, train)["majority_letter"] == ["C", "B"]


def test_the_option_prior_picks_what_was_most_often_right():
    # Normal was right 3 times, Pneumonia 2, Fracture never: however often each was offered.
    test = [example("x", "New?", "Fracture|Normal|Pneumonia", "A"), example("y", "New?", "Fracture|Normal", "A")]
    assert answers(test)["option_prior"] == ["B", "B"]


def test_the_question_tips_the_prior_and_an_unseen_question_falls_back_on_it():
    options = "Fracture|Normal|Pneumonia"
    test = [example("x", "is it  HEALTHY?", options, "A"), example("y", "Never asked", options, "A")]
    assert answers(test)["question_option_prior"] == ["B", "C"]  # shares: Normal 3 of 5, Pneumonia 2 of 3


def test_an_unseen_option_beats_one_known_to_be_wrong_and_ties_go_first():
    test = [example("x", "?", "Fracture|Unheard of", "A"), example("y", "?", "Unheard of|Unseen too", "A")]
    assert answers(test)["option_prior"] == ["A", "A"]
    assert answers(test)["question_option_prior"] == ["B", "A"]


def test_results_say_which_examples_are_right_with_an_interval():
    test = [example("x", "?", "aaa|b", "A"), example("y", "?", "aaa|b", "B"), example("z", "?", "a|bbb", "B")]
    (longest,) = blind_baselines(None, test)
    assert longest.correct_by_id == {"x": True, "y": False, "z": True}
    assert longest.as_dict() == {
        "name": "longest_option",
        "accuracy": wilson(2, 3).as_dict(),
        "correct": {"x": True, "y": False, "z": True},
    }


def test_the_best_baseline_is_the_most_accurate():
    test = [example("x", "?", "Fracture|Normal", "B")]
    results = blind_baselines(TRAIN, test)
    assert best_blind(results).accuracy.value == max(result.accuracy.value for result in results) == 1.0
    assert best_blind(blind_baselines(None, [])).accuracy.value is None


@given(st.integers(0, 2**32), st.sampled_from(["A", "B", "C"]))
def test_no_baseline_reads_the_target_the_images_or_the_patient_of_a_test_example(seed, target):
    first = example(f"x{seed}", "Is it healthy?", "Normal|Fracture|New", "A")
    other = dataclasses.replace(first, target=target, patient=str(seed), modality="MRI")
    assert answers([first]) == answers([other])


def test_every_answer_is_an_offered_letter():
    test = [example("x", "?", "|".join(f"option {i}" for i in range(10)), "J"), *TRAIN]
    for result in blind_baselines(TRAIN, test):
        for answer, asked in zip(result.answers, test, strict=True):
            assert LETTERS.index(answer) < len(asked.options)


def test_what_the_option_texts_give_away_is_found():
    train = [example(f"t{i}", "?", "wrong|right" if i % 2 else "right|wrong", "AB"[i % 2]) for i in range(40)]
    by_name = {result.name: result.accuracy.value for result in blind_baselines(train, train)}
    assert by_name["option_prior"] == 1.0
    assert by_name["majority_letter"] == pytest.approx(0.5)
