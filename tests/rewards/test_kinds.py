import dataclasses
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from labeled_answers import KINDS_OF_ANSWERS

from medrl.errors import RewardError
from medrl.rewards import (
    answer_correct,
    bleu,
    box_iou,
    check_gold,
    choice_correct,
    embedding_similarity,
    from_weights,
    option_overlap,
    read_answer,
    rouge_l,
    token_f1,
)
from medrl.types import KINDS, LETTERS, MODES, Completion, Example, Kind

FORMS = {
    "think": "<think>reasons</think><answer>{}</answer>",
    "no_think": "<answer>{}</answer>",
    "think_after": "<answer>{}</answer><think>reasons</think>",
}
TARGETS: dict[Kind, str] = {
    "choice": "B",
    "multi_select": "A, C",
    "yes_no": "no",
    "numeric": "3.5 cm",
    "short": "left lung",
    "box": "10, 20, 30, 40",
}


def example(kind: Kind, **changes) -> Example:
    options = ("mass", "effusion", "edema") if kind in ("choice", "multi_select") else ()
    given = {"id": "ct-1", "source": "s", "images": (), "question": "?", "options": options, "target": TARGETS[kind]}
    return Example(**(given | {"kind": kind} | changes))


def completion(text: str, mode="think") -> Completion:
    return Completion(text=text, token_ids=(), finish_reason="stop", mode=mode)


@pytest.mark.parametrize(
    ("why", "row", "block", "answer", "right"), KINDS_OF_ANSWERS, ids=[row[0] for row in KINDS_OF_ANSWERS]
)
def test_an_answer_of_another_kind_is_read_and_graded_as_labeled_by_hand(why, row, block, answer, right):
    for mode in MODES:
        said = completion(FORMS[mode].format(block), mode)
        read = read_answer(row, said)
        assert read.value == answer
        assert bool(read.problem) == (answer is None)
        assert answer_correct(row, said) == float(right)


@given(st.sampled_from(KINDS), st.text(max_size=60), st.sampled_from(MODES))
def test_any_string_is_read_or_has_a_problem_whatever_the_kind(kind, text, mode):
    for said in (text, FORMS[mode].format(text)):
        read = read_answer(example(kind), completion(said, mode))
        assert (read.value is None) == bool(read.problem)
        assert answer_correct(example(kind), completion(said, mode)) in (0.0, 1.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blank", ["  ", "\t", "\u00a0", " \u3000"])
def test_white_space_around_and_other_blanks_change_no_verdict(mode, blank):
    for _, question, block, _, right in KINDS_OF_ANSWERS:
        said = f"\n{FORMS[mode].format(blank + block.replace(' ', blank) + blank)} \n"
        assert answer_correct(question, completion(said, mode)) == float(right), said


@pytest.mark.parametrize("change", [str.upper, str.lower, str.swapcase])
def test_letter_case_changes_no_verdict(change):
    for _, question, block, _, right in KINDS_OF_ANSWERS:
        if "\\" not in block:
            assert answer_correct(question, completion(FORMS["think"].format(change(block)))) == float(right), block


LISTS_OF_TEXTS = [  # letters alone would mean places
    row
    for row in KINDS_OF_ANSWERS
    if row[1].kind == "multi_select" and not re.search(r"(?i)(?<![a-z])[a-j]+(?![a-z])", row[2])
]


@given(st.sampled_from(LISTS_OF_TEXTS), st.data())
def test_a_list_of_texts_follows_its_options_through_any_order(row, data):
    _, question, block, _, _ = row
    order = data.draw(st.permutations(range(len(question.options))))
    letters = [LETTERS[i] for i in order]
    before = read_answer(question, completion(FORMS["no_think"].format(block))).value
    shuffled = dataclasses.replace(question, options=tuple(question.options[i] for i in order))
    after = read_answer(shuffled, completion(FORMS["no_think"].format(block))).value
    back = None if after is None else ", ".join(sorted(letters[LETTERS.index(letter)] for letter in after.split(", ")))
    assert before == back


TAKEN_BACK = ["{} is wrong", "{} is incorrect", "not {}", "{}, but I am not sure", "maybe {}", "{} or not"]


@given(
    st.sampled_from([row for row in KINDS_OF_ANSWERS if row[4] and row[1].kind in ("yes_no", "numeric", "box")]),
    st.sampled_from(TAKEN_BACK),
)
def test_a_right_answer_that_is_taken_back_or_doubted_is_not_right(row, way):
    _, question, block, _, _ = row
    assume(question.kind != "yes_no" or block.isalpha())  # behind a reason, "wrong" may speak of the reason
    assert answer_correct(question, completion(FORMS["no_think"].format(way.format(block.rstrip(". "))))) == 0.0


@given(
    st.floats(-1e6, 1e6, allow_nan=False).map(lambda number: round(number, 3)), st.sampled_from(["cm", "°C", "%", "kg"])
)
def test_a_quantity_is_right_for_itself_and_in_no_other_measure(number, unit):
    question = example("numeric", target=f"{number} {unit}")
    assert answer_correct(question, completion(f"<answer>{number} {unit}</answer>")) == 1.0
    assert answer_correct(question, completion(f"<answer>{number} mmHg</answer>")) == 0.0
    counted = answer_correct(question, completion(f"<answer>{number}</answer>"))
    assert counted == float(unit == "%" and abs(number * 100 - number) <= 1e-9 * max(1.0, abs(number)))


@given(st.text("0123456789.,eE^/\\{}x× +-%$cm", max_size=30))
def test_any_string_of_numbers_and_signs_is_read_or_has_a_problem(text):
    read = read_answer(example("numeric"), completion(FORMS["no_think"].format(text), "no_think"))
    assert (read.value is None) == bool(read.problem)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_target_is_a_right_answer_and_earns_full_marks(kind, mode):
    parts = {"answer_correct": 1.0, "well_formed": 1.0, "think_agrees": 0.1, "names_option": 0.1, "brief": 0.1}
    assert check_gold(from_weights(parts | {"no_repetition": 0.1}), [example(kind)], mode) == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_outside_its_tags_counts_when_it_is_all_there_is(kind):
    assert answer_correct(example(kind), completion(TARGETS[kind])) == 1.0
    assert answer_correct(example(kind), completion(f"<think>x</think>{TARGETS[kind]}")) == 1.0
    assert answer_correct(example(kind), completion(f"<think>{TARGETS[kind]}")) == 0.0


@pytest.mark.parametrize("kind", ["multi_select", "yes_no", "numeric", "box"])
@pytest.mark.parametrize("piece", ["A, ", "yes, ", "1/", "x=1 ", "\\frac{", "it is "])
def test_a_very_long_answer_is_unreadable_rather_than_slow(kind, piece):
    text = piece * (100_000 // len(piece))
    assert read_answer(example(kind), completion(FORMS["no_think"].format(text))).value in (None, "yes")


def test_a_list_of_options_has_room_for_400_characters_and_twice_all_options():
    options = ("mass", "effusion", "edema")  # 17 characters
    for length, answer in ((434, "A, C"), (435, None)):
        said = completion(f"<answer>A,{' ' * (length - 3)}C</answer>")
        assert read_answer(example("multi_select", options=options), said).value == answer


def test_reasoning_without_tags_is_no_short_answer():
    text = "The image shows a dense consolidation and I believe that it is in the left lung"
    assert read_answer(example("short"), completion(text)).problem == "no answer block"


@pytest.mark.parametrize(
    ("kind", "target", "words"),
    [
        ("multi_select", "A, D", "letters of its options are A, B, C"),
        ("multi_select", "", "letters of its options"),
        ("yes_no", "Yes", "yes or no"),
        ("numeric", "large", "cannot be read"),
        ("numeric", "3-4 cm", "cannot be read"),
        ("short", "...", "no words"),
        ("box", "1, 2, 3", "x1, y1, x2, y2"),
        ("box", "3, 3, 1, 1", "box without an area"),
    ],
)
def test_a_target_that_its_kind_cannot_have_is_an_error_that_names_the_example(kind, target, words):
    with pytest.raises(RewardError, match=f"(?s)ct-1.*{words}"):
        answer_correct(example(kind, target=target), completion("<answer>none</answer>"))


def test_a_tolerance_that_cannot_be_meant_is_an_error():
    said = completion("<answer>3.5 cm</answer>")
    for tolerance in ("a bit", "-1 mm", "2 kg"):
        with pytest.raises(RewardError, match="tolerance"):
            answer_correct(example("numeric", tolerance=tolerance), said)


def test_an_unknown_kind_is_an_error_that_lists_the_kinds():
    with pytest.raises(RewardError, match="choice, multi_select, yes_no"):
        answer_correct(dataclasses.replace(example("short"), kind="essay"), completion("<answer>x</answer>"))


def test_more_options_than_letters_are_an_error_for_every_kind():
    with pytest.raises(RewardError, match="11 options"):
        answer_correct(example("yes_no", options=tuple("abcdefghijk")), completion("<answer>yes</answer>"))


@pytest.mark.parametrize(
    ("part", "kind", "its_kind"),
    [
        (choice_correct, "yes_no", "choice"),
        (option_overlap, "choice", "multi_select"),
        (token_f1, "choice", "short"),
        (rouge_l, "numeric", "short"),
        (bleu, "box", "short"),
        (embedding_similarity(lambda texts: [(1.0,)] * len(texts)), "yes_no", "short"),
        (box_iou, "numeric", "box"),
    ],
)
def test_a_part_for_one_kind_names_itself_and_the_one_for_all(part, kind, its_kind):
    words = rf"^{part.__name__} grades questions of kind {its_kind}, .*ct-1.* kind {kind}.*answer_correct"
    with pytest.raises(RewardError, match=words):
        part(example(kind), completion("<answer>A</answer>"))


@pytest.mark.parametrize("part", [token_f1, rouge_l, bleu])
def test_a_graded_part_refuses_a_target_without_words(part):
    with pytest.raises(RewardError, match=r"ct-1.*no words"):
        part(example("short", target="..."), completion("<answer>none</answer>"))


def test_option_overlap_counts_what_was_chosen_rightly():
    chosen = {"A, C": 1.0, "A": 1 / 2, "A, B, C": 2 / 3, "B": 0.0, "none": 0.0}
    for block, share in chosen.items():
        assert option_overlap(example("multi_select"), completion(f"<answer>{block}</answer>")) == share


def test_box_iou_is_the_overlap_by_area():
    target = example("box", target="0, 0, 10, 10")
    shares = {"0,0,10,10": 1.0, "0,0,10,5": 0.5, "5,5,15,15": 25 / 175, "10,0,20,10": 0.0, "50,50,60,60": 0.0, "x": 0.0}
    for block, share in shares.items():
        assert box_iou(target, completion(f"<answer>{block}</answer>")) == pytest.approx(share)


def test_the_target_text_of_a_choice_is_its_option_and_of_others_the_target():
    assert example("choice").target_text == "effusion"
    assert example("short").target_text == "left lung"
