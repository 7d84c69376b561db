"""The released graders as published: each row is what their code gives, right or wrong."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from labeled_answers import BLOCKS, COMPLETIONS, IMAGING

from medrl.errors import RewardError
from medrl.rewards import papers
from medrl.types import Completion, Example, Mode

EXAMPLE = Example(id="ct-1", source="s", images=(), question="Which modality?", options=IMAGING, target="C")
FIVE = dataclasses.replace(EXAMPLE, options=(*IMAGING, "PET"), target="E")


def completion(text: str, mode: Mode = "think") -> Completion:
    return Completion(text=text, token_ids=(), finish_reason="stop", mode=mode)


# text, Med-R1's training reward, its evaluation; MedVLM-R1's training reward, its evaluation. Target C.
RELEASED = [
    ("<think>x</think><answer>C</answer>", 1.0, 1.0, 1.0, 1.0),
    ("<think>x</think> <answer> C </answer>", 1.0, 1.0, 1.0, 1.0),
    ("<think>x</think><answer>B</answer>", 0.0, 0.0, 0.0, 0.0),
    ("<think>I will say <answer>C</answer></think> <answer>B</answer>", 1.0, 1.0, 1.0, 1.0),
    ("<think>I will say <answer>B</answer></think> <answer>C</answer>", 0.0, 0.0, 0.0, 0.0),
    ("<answer>C</answer><answer>B</answer>", 1.0, 1.0, 1.0, 1.0),
    ("<think>x</think><answer>\nC\n</answer>", 0.0, 1.0, 1.0, 1.0),
    ("<answer>C.</answer>", 0.0, 0.0, 0.5, 0.0),
    ("<answer>(C)</answer>", 0.0, 0.0, 0.5, 0.0),
    ("<answer>C)</answer>", 0.0, 0.0, 0.5, 0.0),
    ("<answer>C) CT</answer>", 0.0, 0.0, 0.0, 0.0),
    ("<answer>C)CT</answer>", 0.0, 0.0, 0.0, 0.0),
    ("<answer>C: x-ray</answer>", 0.0, 0.0, 0.0, 0.0),
    ("<answer>Option C</answer>", 0.0, 0.0, 0.0, 0.0),
    ("<answer>choice C</answer>", 0.0, 0.0, 0.0, 0.0),
    ("<answer>c</answer>", 0.0, 0.0, 1.0, 0.0),
    ("<answer>CT</answer>", 0.0, 0.0, 0.5, 0.0),
    ("<answer>none</answer>", 0.0, 0.0, 0.0, 0.0),
    ("<answer>CC</answer>", 0.0, 0.0, 0.0, 0.0),
    ("<answer>A or C</answer>", 0.0, 0.0, 0.0, 0.0),
    ("<ANSWER>C</ANSWER>", 0.0, 0.0, 1.0, 0.0),
    ("<answer></answer>", 0.0, 0.0, 0.0, 0.0),
    ("<answer>C", 0.0, 0.0, 0.0, 0.0),
    ("C", 1.0, 0.0, 0.0, 0.0),
    (" C\n", 1.0, 0.0, 0.0, 0.0),
    ("c", 0.0, 0.0, 0.0, 0.0),
    ("The answer is C", 0.0, 0.0, 0.0, 0.0),
    ("", 0.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("text", "med_r1", "med_r1_eval", "medvlm_r1", "medvlm_r1_eval"), RELEASED)
def test_the_released_graders_give_what_their_code_gives(text, med_r1, med_r1_eval, medvlm_r1, medvlm_r1_eval):
    said = completion(text)
    assert papers.med_r1_accuracy(EXAMPLE, said) == med_r1
    assert papers.med_r1_eval_accuracy(EXAMPLE, said) == med_r1_eval
    assert papers.medvlm_r1_accuracy(EXAMPLE, said) == medvlm_r1
    assert papers.medvlm_r1_eval_accuracy(EXAMPLE, said) == medvlm_r1_eval


@pytest.mark.parametrize("block", ["none", "not sure", "None", "E.", "unsure?"])
def test_medvlm_r1_gives_half_for_any_text_with_one_e_where_e_is_right(block):
    assert papers.medvlm_r1_accuracy(FIVE, completion(f"<answer>{block}</answer>")) == 0.5


@pytest.mark.parametrize("block", ["None of the above", "I am undecided", "Option E"])
def test_medvlm_r1_counts_letters_inside_words(block):
    assert papers.medvlm_r1_accuracy(FIVE, completion(f"<answer>{block}</answer>")) == 0.0


def test_med_r1_reads_a_number_out_of_the_reasoning():
    pytest.importorskip("math_verify")
    graded = Example(id="n", source="s", images=(), question="?", options=(), target="2", kind="numeric")
    assert papers.med_r1_accuracy(graded, completion("<think>grade 2 seen</think><answer>3</answer>")) == 1.0
    assert papers.med_r1_accuracy(graded, completion("<think>grade 3 seen</think><answer>1</answer>")) == 0.0
    assert papers.med_r1_accuracy(graded, completion("<think>x</think><answer>2</answer>")) == 1.0


@pytest.mark.parametrize("letter", list("ABCDEFGHIJ"))
def test_math_verify_finds_nothing_in_a_letter_so_leaving_it_out_for_choices_changes_nothing(letter):
    math_verify = pytest.importorskip("math_verify")
    assert math_verify.parse(f"<answer> {letter} </answer>", parsing_timeout=None) == []
    assert math_verify.parse(letter, parsing_timeout=None) == []


@pytest.mark.parametrize(
    ("text", "mode", "form"),
    [
        ("<think>x</think><answer>C</answer>", "think", 1.0),
        ("<think>x</think>\n <answer>C</answer>", "think", 1.0),
        ("<think></think><answer></answer>", "think", 1.0),
        ("<think>x</think><answer>C</answer> ", "think", 0.0),
        (" <think>x</think><answer>C</answer>", "think", 0.0),
        ("<think>x</think> so <answer>C</answer>", "think", 0.0),
        ("<THINK>x</THINK><answer>C</answer>", "think", 0.0),
        ("<think>x</think><answer>B</answer><think>y</think><answer>C</answer>", "think", 1.0),
        ("<answer>C</answer>", "think", 0.0),
        ("<answer>C</answer>", "no_think", 1.0),
        ("\n<answer>C</answer>", "no_think", 1.0),
        ("<answer>C</answer>\n", "no_think", 0.0),
    ],
)
def test_the_released_format_reward(text, mode, form):
    assert papers.med_r1_format(EXAMPLE, completion(text, mode)) == form


@pytest.mark.parametrize(("text", "right"), [("C", 1.0), ("C ", 0.0), ("<answer>C</answer>", 0.0), ("C. CT", 0.0)])
def test_the_raw_comparison_wants_the_letter_and_nothing_else(text, right):
    assert papers.raw_accuracy(EXAMPLE, completion(text)) == right


# The behavior once more, put another way: by splitting at the tags instead of with patterns.


def by_hand_med_r1(text: str, target: str) -> float:
    for start in (match.end() for match in re.finditer("<answer>", text)):
        inside, found, _ = text[start:].partition("</answer>")
        if found and "\n" not in inside:
            return float(inside.strip() == target)
    return float(text.strip() == target)


def by_hand_medvlm_r1(text: str, target: str) -> float:
    lower = text.lower()
    start = lower.find("<answer>")
    end = lower.find("</answer>", start)
    inside = text[start + len("<answer>") : end] if start >= 0 and end >= 0 else ""
    letters = [char for char in inside.upper() if "A" <= char <= "J"]
    if letters != [target]:
        return 0.0
    return 1.0 if len(inside.strip()) == 1 else 0.5


@given(st.lists(st.sampled_from(["<answer>", "</answer>", "C", "c", "E", " ", "\n", "x", ".", "<think>"]), max_size=9))
def test_both_training_rewards_agree_with_a_second_writing_on_any_sequence_of_pieces(pieces):
    text = "".join(pieces)
    assert papers.med_r1_accuracy(EXAMPLE, completion(text)) == by_hand_med_r1(text, "C")
    assert papers.medvlm_r1_accuracy(EXAMPLE, completion(text)) == by_hand_medvlm_r1(text, "C")


def test_both_training_rewards_agree_with_a_second_writing_on_every_labeled_completion():
    texts = [text for _, _, text, _, _ in COMPLETIONS] + [f"<answer>{block}</answer>" for _, _, block, _ in BLOCKS]
    for text in texts:
        assert papers.med_r1_accuracy(EXAMPLE, completion(text)) == by_hand_med_r1(text, "C"), text
        assert papers.medvlm_r1_accuracy(EXAMPLE, completion(text)) == by_hand_medvlm_r1(text, "C"), text


def test_questions_that_the_papers_did_not_have_are_refused():
    short = dataclasses.replace(EXAMPLE, kind="short", options=(), target="lung")
    with pytest.raises(RewardError, match=r"ct-1.*strict"):
        papers.med_r1_accuracy(short, completion("<answer>lung</answer>"))
    with pytest.raises(RewardError, match=r"ct-1.*strict"):  # also where no letter is found
        papers.medvlm_r1_accuracy(short, completion("<answer>lung</answer>"))
