import pytest
from hypothesis import given
from hypothesis import strategies as st
from labeled_answers import IMAGING

from medrl.rewards import brief, brief_up_to, implied_option, names_option, no_repetition, think_agrees
from medrl.rewards.shaping import reasoning_of
from medrl.types import LETTERS, Completion, Example, Mode

EXAMPLE = Example(id="ct-1", source="s", images=(), question="Which modality?", options=IMAGING, target="C")
SIDES = ("Left lung", "Lung", "No lesion", "Lesion")


def completion(text: str, mode: Mode = "think") -> Completion:
    return Completion(text=text, token_ids=(), finish_reason="stop", mode=mode)


def test_brevity_falls_in_a_straight_line():
    part = brief_up_to(10, 30)
    values = {5: 1.0, 10: 1.0, 20: 0.5, 25: 0.25, 30: 0.0, 99: 0.0}
    assert {n: part(EXAMPLE, completion("word " * n)) for n in values} == values
    assert (brief(EXAMPLE, completion("word " * 120)), brief(EXAMPLE, completion("word " * 240))) == (1.0, 0.0)


def test_repetition_is_the_share_of_runs_of_four_words_that_are_new():
    # a b c d e f: 3 runs, all new. The same 4 words three times: 9 runs, 4 different ones.
    assert no_repetition(EXAMPLE, completion("a b c d e f")) == 1.0
    assert no_repetition(EXAMPLE, completion("w x y z " * 3)) == pytest.approx(4 / 9)
    assert no_repetition(EXAMPLE, completion("one two three")) == no_repetition(EXAMPLE, completion("")) == 1.0
    assert no_repetition(EXAMPLE, completion("<think>w x y z</think><answer>w x y z</answer>")) == 1.0


def test_the_reasoning_is_what_stands_between_the_think_tags():
    assert reasoning_of(completion("<think>a</think><answer>C</answer>")) == "a"
    assert reasoning_of(completion("<answer>C</answer><think>b</think>", "think_after")) == "b"
    assert reasoning_of(completion("<think>a</think>x<think>b</think>")) == "a</think>x<think>b"
    assert reasoning_of(completion("<think>a")) == reasoning_of(completion("a</think>")) == ""
    assert reasoning_of(completion("</think>a<think>")) == ""


@pytest.mark.parametrize(
    ("reasoning", "letter"),
    [
        ("Bright bone, so this is a CT.", "C"),
        ("It is not an MRI. The bone is bright, as in CT.", "C"),
        ("This is a CT. MRI is ruled out.", "C"),
        ("First I thought of MRI. But it is an X ray.", "B"),
        ("The answer is option D.", "D"),
        ("The answer is D", "D"),
        ("I choose b", "B"),
        ("(C)", "C"),
        ("CT or MRI", None),
        ("This is not a CT.", None),
        ("The bone is bright.", None),
        ("a bright bone", None),
        ("", None),
        ("The answer is F.", None),
    ],
)
def test_a_reasoning_comes_out_at_the_last_option_that_it_names_and_does_not_deny(reasoning, letter):
    assert implied_option(reasoning, IMAGING) == letter


@pytest.mark.parametrize(
    ("reasoning", "options", "letter"),
    [
        ("I see it in the left lung", SIDES, "A"),
        ("There is no lesion", SIDES, "C"),
        ("There is a lesion", SIDES, "D"),
        ("所以是气胸", ("肺炎", "气胸"), "B"),
        ("左肺", ("肺", "左肺"), "B"),
    ],
)
def test_the_longer_of_nested_options_is_meant(reasoning, options, letter):
    assert implied_option(reasoning, options) == letter


@given(st.text(max_size=80), st.lists(st.text(max_size=10), min_size=2, max_size=4))
def test_any_reasoning_comes_out_at_an_offered_option_or_at_none(reasoning, options):
    assert implied_option(reasoning, options) in (None, *LETTERS[: len(options)])


@pytest.mark.parametrize(
    ("text", "mode", "agrees", "names"),
    [
        ("<think>It is a CT.</think><answer>C</answer>", "think", 1.0, 1.0),
        ("<think>It is an MRI.</think><answer>C</answer>", "think", 0.0, 0.0),
        ("<think>The answer is C.</think><answer>C</answer>", "think", 1.0, 0.0),
        ("<think>Bright.</think><answer>C) CT</answer>", "think", 0.0, 1.0),
        ("<think>It is a CT.</think><answer>none</answer>", "think", 0.0, 0.0),
        ("<answer>C</answer><think>It is a CT.</think>", "think_after", 1.0, 1.0),
        ("<answer>C</answer><think>It is an MRI.</think>", "think_after", 0.0, 0.0),
        ("<answer>C</answer>", "no_think", 1.0, 1.0),
        ("<answer>none</answer>", "no_think", 1.0, 0.0),
    ],
)
def test_reasoning_and_answer_belong_together(text, mode, agrees, names):
    assert think_agrees(EXAMPLE, completion(text, mode)) == agrees
    assert names_option(EXAMPLE, completion(text, mode)) == names


def test_without_options_the_reasoning_has_to_hold_the_answer():
    short = Example(id="s", source="s", images=(), question="?", options=(), target="left lung", kind="short")
    several = Example(id="m", source="s", images=(), question="?", options=IMAGING, target="A, C", kind="multi_select")
    assert think_agrees(short, completion("<think>in the left lung</think><answer>Left lung</answer>")) == 1.0
    assert think_agrees(short, completion("<think>in the right lung</think><answer>Left lung</answer>")) == 0.0
    assert think_agrees(several, completion("<think>CT and MRI</think><answer>A, C</answer>")) == 1.0
    assert think_agrees(several, completion("<think>CT</think><answer>A, C</answer>")) == 0.0
