import pytest
from labeled_answers import BLOCKS, COMPLETIONS, IMAGING, KINDS_OF_ANSWERS

from medrl.errors import SettingsError
from medrl.rewards import SCORERS, answer_correct, choice_correct, find_scorer, well_formed
from medrl.types import Completion, Example, Mode

EXAMPLE = Example(id="ct-1", source="s", images=(), question="Which modality?", options=IMAGING, target="C")


def completion(text: str, mode: Mode = "think") -> Completion:
    return Completion(text=text, token_ids=(), finish_reason="stop", mode=mode)


def test_strict_is_what_rewards_and_evaluations_use():
    for why, mode, text, letter, form in COMPLETIONS:
        score = SCORERS["strict"](EXAMPLE, completion(text, mode))
        assert (score.answer, score.value, score.parts["well_formed"]) == (letter, float(letter == "C"), float(form)), (
            why
        )
        assert score.value == choice_correct(EXAMPLE, completion(text, mode))
        assert score.parts["well_formed"] == well_formed(EXAMPLE, completion(text, mode))


def test_strict_grades_every_kind():
    for _, example, block, answer, right in KINDS_OF_ANSWERS:
        score = SCORERS["strict"](example, completion(f"<answer>{block}</answer>", "no_think"))
        assert (score.answer, score.value) == (answer, float(right))
        assert score.value == answer_correct(example, completion(f"<answer>{block}</answer>", "no_think"))


def test_lenient_reads_all_that_strict_reads_and_the_same():
    for _, options, block, letter in BLOCKS:
        if letter is not None:
            example = Example(id="x", source="s", images=(), question="?", options=options, target="A")
            assert SCORERS["lenient"](example, completion(f"<answer>{block}</answer>")).answer == letter
    for _, mode, text, letter, _ in COMPLETIONS:
        if letter is not None:
            assert SCORERS["lenient"](EXAMPLE, completion(text, mode)).answer == letter


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is C", "C"),
        ("The bones are bright, so the answer is C.", "C"),
        ("I believe this is an X-ray of the chest", "B"),
        ("<answer>C because the bone is bright</answer>", "C"),
        ("<answer>CT scan</answer>", "C"),
        ("<think>x</think> Probably (D)", "D"),
        ("<think>The answer is B</think><answer>C", "C"),
        ("<answer>A</answer><answer>C</answer>", "C"),
        ("<think>the answer is <answer>C</answer></think>", "C"),
        ("It could be CT or MRI", None),
        ("A or C", None),
        ("The answer is A. The answer is C.", None),
        ("A nice image", None),
        ("Grade B- lesion", "B"),
        ("none", None),
        ("I cannot tell", None),
        ("", None),
        ("E", None),
    ],
)
def test_lenient_reads_what_a_patient_examiner_would_and_does_not_guess(text, answer):
    assert SCORERS["lenient"](EXAMPLE, completion(text)).answer == answer


@pytest.mark.parametrize(
    "text",
    [
        "Option C, MRI",
        "<answer>Option C, MRI</answer>",
        "The answer is C) MRI",
        "The answer is C: it is an MRI.",
        "I see MRI (C)",
        "My pick: MRI, option C",
        "The MRI is option C",
        "This is surely an MRI of the knee. The answer is C.",
        "The answer is CT (B)",
        "So the answer is C (option B)",
    ],
)
def test_lenient_does_not_choose_between_a_letter_and_another_option_s_text(text):
    assert SCORERS["lenient"](EXAMPLE, completion(text)).answer is None


@pytest.mark.parametrize(
    "text",
    [
        "I see bone, option C, CT",
        "My pick: CT, option C",
        "This is surely a CT of the knee. The answer is C.",
        "It might be MRI or CT. The answer is C.",
        "Unlike an MRI it shows bright bone. The answer is C.",
        "An MRI would not show this. The answer is C.",
        "The answer is C because bone is bright",
        "The answer is C, not MRI",
    ],
)
def test_lenient_lets_the_letter_decide_where_no_text_speaks_against_it(text):
    assert SCORERS["lenient"](EXAMPLE, completion(text)).answer == "C"


def test_lenient_takes_the_longer_of_two_options_that_hold_each_other():
    example = Example(id="x", source="s", images=(), question="?", options=("Lung", "Left lung"), target="B")
    assert SCORERS["lenient"](example, completion("I see it in the left lung there")).answer == "B"


@pytest.mark.parametrize("name", ["strict", "lenient"])
def test_the_explanation_tells_right_wrong_and_unreadable_apart(name):
    scorer = SCORERS[name]
    assert (
        scorer(EXAMPLE, completion("<think>x</think><answer>C</answer>")).explanation == "Answered C, which is right."
    )
    assert scorer(EXAMPLE, completion("<answer>B</answer>")).explanation == (
        "Answered B, but C is right; not well formed."
    )
    assert scorer(EXAMPLE, completion("x")).explanation == "No answer could be read (no answer block); not well formed."


def test_a_released_grader_says_what_it_read():
    score = SCORERS["med-r1"](EXAMPLE, completion("<think>say <answer>C</answer></think><answer>B</answer>"))
    assert (score.value, score.answer) == (1.0, "C")
    assert score.explanation == "Med-R1's training reward reads 'C', expects 'C' and gives 1."
    half = SCORERS["medvlm-r1"](EXAMPLE, completion("<think>x</think><answer>C.</answer>"))
    assert (half.value, half.answer, half.parts) == (0.5, "C", {"correct": 0.5, "well_formed": 1.0})


@pytest.mark.parametrize("name", ["med-r1", "med-r1-eval", "medvlm-r1", "medvlm-r1-eval", "raw"])
def test_what_is_no_letter_on_offer_counts_as_unreadable(name):
    for text in ("<answer>E</answer>", "nothing of the kind", ""):
        assert SCORERS[name](EXAMPLE, completion(text)).answer is None


def test_an_unknown_scorer_is_refused_with_the_nearest_name():
    with pytest.raises(SettingsError, match=r"did you mean med-r1\?"):
        find_scorer("medr1")
    with pytest.raises(SettingsError, match="strict, lenient, med-r1"):
        find_scorer("zzz")


@pytest.mark.parametrize(
    "text",
    ["Not C", "C is wrong", "anything but C", "It isn't C", "all but C", "C is excluded", "rule out C", "never C"],
)
def test_lenient_does_not_take_a_denied_option_for_the_answer(text):
    assert SCORERS["lenient"](EXAMPLE, completion(text)).answer is None
    assert SCORERS["lenient"](EXAMPLE, completion("C")).answer == "C"
