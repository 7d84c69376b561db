"""Options that tell nothing."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medrl.data.resample import Resampled, resample_distractors
from medrl.types import LETTERS, Example


def row(number: int, target: str, *wrong: str, kind="Disease", modality="CT", image: str | None = None) -> Example:
    return Example(
        id=str(number), source="d", images=(Path(image or f"{number}.png"),), question="?", options=(target, *wrong),
        target="A", modality=modality, question_type=kind,
    )  # fmt: skip


OTHERS = ("never right", "nor this", "nor that")
ANSWERS = st.lists(
    st.tuples(st.sampled_from("abcdefg"), st.integers(2, 4), st.sampled_from("XY")), min_size=1, max_size=40
)


@settings(deadline=None)
@given(ANSWERS, st.integers(0, 99), st.booleans())
def test_question_target_and_images_stay_and_options_are_right_answers_of_the_same_kind(answers, seed, drop):
    examples = [row(i, name, *OTHERS[: k - 1], kind=kind) for i, (name, k, kind) in enumerate(answers)]
    changed, counts = resample_distractors(examples, seed=seed, drop_unbalanced=drop)
    assert counts.balanced + counts.uneven + counts.unchanged + counts.dropped == len(examples)
    before = {example.id: example for example in examples}
    right = {kind: {e.target_text for e in examples if e.question_type == kind} for kind in "XY"}
    for new in changed:
        old = before[new.id]
        assert (new.target_text, new.images, new.question) == (old.target_text, old.images, old.question)
        assert len(set(new.options)) == len(new.options) <= len(old.options)
        assert set(new.options) <= right[new.question_type] or set(new.options) == set(old.options)
    if drop:
        assert len(changed) == counts.balanced


@settings(deadline=None)
@given(ANSWERS, st.integers(0, 9), st.permutations("abcdefg"))
def test_no_ranking_of_option_texts_beats_chance_on_balanced_questions(answers, seed, ranking):
    examples = [row(i, name, *OTHERS[: k - 1], kind=kind) for i, (name, k, kind) in enumerate(answers)]
    balanced, _ = resample_distractors(examples, seed=seed, drop_unbalanced=True)
    hits = sum(min(example.options, key=ranking.index) == example.target_text for example in balanced)
    assert hits == pytest.approx(sum(1 / len(example.options) for example in balanced))


def test_an_answer_too_common_for_partners_is_counted_as_uneven():
    examples = [row(i, "normal" if i < 6 else "tumor", "x") for i in range(8)]
    changed, counts = resample_distractors(examples, seed=0)
    assert counts == Resampled(balanced=4, uneven=4)
    assert all(set(example.options) == {"normal", "tumor"} for example in changed)


def test_a_type_with_one_answer_per_modality_is_grouped_over_modalities():
    rows = [
        row(i, name, "PET", "EEG", kind="Modality", modality=name) for i, name in enumerate(["CT", "MRI", "OCT"] * 2)
    ]
    changed, counts = resample_distractors(rows, seed=0)
    assert counts == Resampled(balanced=6) and all(set(e.options) == {"CT", "MRI", "OCT"} for e in changed)
    alone, counts = resample_distractors(rows[:1], seed=0)
    assert alone == rows[:1] and counts == Resampled(unchanged=1)


def test_what_may_be_right_as_well_is_never_a_distractor():
    rows = [
        row(0, "lung", "x", image="shared.png"),
        row(1, "left lung", "x"),
        row(2, "heart", "x", image="shared.png"),
        row(3, "liver", "x"),
    ]
    changed, _ = resample_distractors(rows, seed=3)
    by_id = {example.id: set(example.options) for example in changed}
    assert "left lung" not in by_id["0"] and "heart" not in by_id["0"] and "lung" not in by_id["1"] | by_id["2"]


def test_yes_and_no_go_with_yes_and_no():
    rows = [row(0, "Yes", "No"), row(1, "No", "Yes"), row(2, "tumor", "x"), row(3, "normal", "x")]
    changed, counts = resample_distractors(rows, seed=0)
    assert [set(example.options) for example in changed] == [{"Yes", "No"}] * 2 + [{"tumor", "normal"}] * 2
    assert counts.balanced == 4


def test_letters_are_drawn_anew_by_seed_and_id():
    examples = [row(i, "abcd"[i % 4], "x", "y", "z") for i in range(400)]
    changed, _ = resample_distractors(examples, seed=1)
    assert all(80 < count < 120 for count in Counter(e.target for e in changed).values())
    assert {e.target for e in changed} == set(LETTERS[:4])
    again, _ = resample_distractors(examples[::-1], seed=1)
    assert {e.id: e.options for e in again}.keys() == {e.id: e.options for e in changed}.keys()
    assert resample_distractors(examples, seed=1)[0] == changed != resample_distractors(examples, seed=2)[0]
