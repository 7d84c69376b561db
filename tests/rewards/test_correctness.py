import dataclasses

import pytest
from labeled_answers import BLOCKS, COMPLETIONS, IMAGING

from medrl.errors import RewardError
from medrl.rewards import choice_correct, well_formed
from medrl.types import LETTERS, Completion, Example, Mode

EXAMPLE = Example(id="ct-1", source="s", images=(), question="Which modality?", options=IMAGING, target="C")


def completion(text: str, mode: Mode = "think") -> Completion:
    return Completion(text=text, token_ids=(1,), finish_reason="stop", mode=mode)


@pytest.mark.parametrize("target", list("ABCD"))
def test_only_the_target_is_correct(target):
    example = dataclasses.replace(EXAMPLE, target=target)
    for _, mode, text, letter, _ in COMPLETIONS:
        assert choice_correct(example, completion(text, mode)) == float(letter == target)


def test_an_unreadable_answer_is_correct_for_no_target():
    for why, options, block, letter in BLOCKS:
        if letter is None:
            for target in LETTERS[: len(options)]:
                example = dataclasses.replace(EXAMPLE, options=options, target=target)
                assert choice_correct(example, completion(f"<answer>{block}</answer>", "no_think")) == 0.0, why


@pytest.mark.parametrize("target", ["E", "c", "", "AB", "CT"])
def test_a_target_that_is_no_option_is_an_error_that_names_the_example(target):
    with pytest.raises(RewardError, match="ct-1"):
        choice_correct(dataclasses.replace(EXAMPLE, target=target), completion("<answer>C</answer>"))


# What the graders of earlier work do wrong, and what is right. Target C unless another is given.


def test_an_answer_tag_inside_the_reasoning_earns_nothing():
    assert choice_correct(EXAMPLE, completion("<think>I will say <answer>C</answer></think> <answer>B</answer>")) == 0.0


def test_the_first_of_several_answers_does_not_win():
    assert choice_correct(EXAMPLE, completion("<answer>C</answer><answer>B</answer>")) == 0.0


@pytest.mark.parametrize("block", ["\nC\n", "C.", "C) CT", "c", "C: CT", "Option C", "C)"])
def test_a_right_answer_is_right_in_every_way_of_writing_it(block):
    assert choice_correct(EXAMPLE, completion(f"<think>x</think><answer>{block}</answer>")) == 1.0


def test_a_number_in_the_reasoning_is_no_answer():
    graded = dataclasses.replace(EXAMPLE, options=("1", "2", "3"), target="B")
    assert choice_correct(graded, completion("<think>grade 2 seen</think><answer>3</answer>")) == 0.0
    assert choice_correct(graded, completion("<think>grade 3 seen</think><answer>2</answer>")) == 1.0


@pytest.mark.parametrize("text", ["C", "c) CT", "<think>x</think>C"])
def test_a_bare_right_answer_without_tags_is_right_and_not_well_formed(text):
    assert choice_correct(EXAMPLE, completion(text)) == 1.0
    assert well_formed(EXAMPLE, completion(text)) == 0.0


def test_a_text_without_tags_that_is_more_than_an_answer_earns_nothing():
    assert choice_correct(EXAMPLE, completion("The bone is bright, so C")) == 0.0


@pytest.mark.parametrize("block", ["none", "not sure", "None of these", "I am undecided"])
def test_the_letter_e_in_an_abstention_is_not_option_e(block):
    five = dataclasses.replace(EXAMPLE, options=(*IMAGING, "PET"), target="E")
    assert choice_correct(five, completion(f"<answer>{block}</answer>")) == 0.0


def test_an_empty_answer_is_not_a_substring_of_every_target():
    assert choice_correct(EXAMPLE, completion("<answer></answer>")) == 0.0


def test_no_inside_normal_is_not_the_answer_no():
    yes_no = dataclasses.replace(EXAMPLE, options=("Yes", "No"), target="B")
    assert choice_correct(yes_no, completion("<answer>normal</answer>")) == 0.0


def test_several_blocks_do_not_have_the_form():
    repeated = "<think>x</think><answer>C</answer><think>x</think><answer>C</answer>"
    assert well_formed(EXAMPLE, completion(repeated)) == 0.0
