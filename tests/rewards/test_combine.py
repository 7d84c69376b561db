import dataclasses
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from labeled_answers import IMAGING, KINDS_OF_ANSWERS

from medrl.errors import RewardError, SettingsError
from medrl.rewards import (
    PARTS,
    answer_correct,
    check_gold,
    check_wrong,
    choice_correct,
    from_weights,
    gold_completion,
    parse_answer,
    weighted,
    well_formed,
)
from medrl.rewards.combine import wrong_completion
from medrl.rewards.parse import find_tags
from medrl.types import LETTERS, MODES, Completion, Example, Mode, Score

EXAMPLE = Example(id="ct-1", source="s", images=(), question="Which modality?", options=IMAGING, target="C")


def completion(text: str, mode: Mode = "think") -> Completion:
    return Completion(text=text, token_ids=(1,), finish_reason="stop", mode=mode)


RIGHT = completion("<think>x</think><answer>C</answer>")
WRONG = completion("<think>x</think><answer>B</answer>")
BROKEN = completion("It could be a CT.")


def is_short(example, completion):
    return 0.5


def test_the_value_is_the_weighted_sum_and_the_parts_stay_unweighted():
    score = weighted((2.0, choice_correct), (0.5, well_formed), (-1.0, is_short))(EXAMPLE, RIGHT)
    assert score.value == 2.0 * 1.0 + 0.5 * 1.0 - 1.0 * 0.5
    assert score.parts == {"choice_correct": 1.0, "well_formed": 1.0, "is_short": 0.5}
    assert score.answer == "C"


def test_equal_completions_earn_exactly_equal_values():
    reward = weighted((1.0, choice_correct), (0.2, well_formed))
    assert {reward(EXAMPLE, RIGHT).value for _ in range(8)} == {1.2}


def test_the_explanation_tells_right_wrong_and_unreadable_apart():
    reward = weighted((1.0, choice_correct), (1.0, well_formed))
    assert reward(EXAMPLE, RIGHT).explanation == "Answered C, which is right: choice_correct 1, well_formed 1."
    assert reward(EXAMPLE, WRONG).explanation == "Answered B, but C is right: choice_correct 0, well_formed 1."
    unreadable = reward(EXAMPLE, BROKEN)
    assert unreadable.answer is None
    assert unreadable.explanation == "No answer could be read (no answer block): choice_correct 0, well_formed 0."


def test_a_reward_needs_a_part():
    with pytest.raises(SettingsError, match="at least one part"):
        weighted()


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, "1", None, True])
def test_a_weight_is_a_finite_number(weight):
    with pytest.raises(SettingsError, match="weight of choice_correct"):
        weighted((weight, choice_correct))


def test_a_name_given_twice_is_refused():
    with pytest.raises(SettingsError, match="choice_correct is given twice"):
        weighted((1.0, choice_correct), (2.0, choice_correct))


@pytest.mark.parametrize("part", [1.0, "choice_correct", None])
def test_a_part_is_a_function(part):
    with pytest.raises(SettingsError, match=r"\(weight, function\)"):
        weighted((1.0, part))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "1"])
def test_a_part_without_a_finite_number_is_an_error_that_names_part_and_example(value):
    def broken(example, completion):
        return value

    with pytest.raises(RewardError, match=r"broken.*ct-1"):
        weighted((1.0, choice_correct), (0.0, broken))(EXAMPLE, RIGHT)


def test_a_recipe_names_the_parts():
    assert from_weights({"choice_correct": 1.0, "well_formed": 0.5})(EXAMPLE, RIGHT).value == 1.5
    assert all(name == part.__name__ for name, part in PARTS.items())


@pytest.mark.parametrize(("name", "near"), [("choice_corect", "choice_correct"), ("wellformed", "well_formed")])
def test_an_unknown_part_is_refused_with_the_nearest_name(name, near):
    with pytest.raises(SettingsError, match=f"'{name}'; did you mean '{near}'"):
        from_weights({name: 1.0})


def test_an_unknown_part_like_no_other_is_refused_with_all_names():
    with pytest.raises(SettingsError, match="choose from: choice_correct, answer_correct"):
        from_weights({"zzz": 1.0})


def test_an_empty_recipe_is_refused():
    with pytest.raises(SettingsError, match="at least one part"):
        from_weights({})


def test_a_reward_of_named_parts_can_be_sent_to_another_process():
    reward = from_weights({"choice_correct": 1.0, "well_formed": 1.0})
    assert pickle.loads(pickle.dumps(reward))(EXAMPLE, RIGHT) == reward(EXAMPLE, RIGHT)  # noqa: S301 (our own bytes)


free_of_tags = st.text(max_size=30).filter(lambda text: not find_tags(text))


@given(st.lists(free_of_tags, min_size=2, max_size=10).map(tuple), st.data(), st.sampled_from(MODES))
def test_the_gold_completion_of_any_example_is_right_and_well_formed(options, data, mode):
    target = data.draw(st.sampled_from(LETTERS[: len(options)]))
    example = dataclasses.replace(EXAMPLE, options=options, target=target)
    gold = gold_completion(example, mode)
    assert choice_correct(example, gold) == well_formed(example, gold) == 1.0
    assert parse_answer(gold.text, options, mode).letter == target
    assert check_gold(from_weights({"choice_correct": 1.0, "well_formed": 0.5}), [example], mode) == []


@pytest.mark.parametrize("mode", MODES)
def test_a_reward_that_rejects_some_right_answers_is_caught(mode):
    def knows_ct_only(example, completion):
        return float(example.target_text == "CT")

    mri = dataclasses.replace(EXAMPLE, id="mri-1", target="A")
    (found,) = check_gold(weighted((1.0, choice_correct), (1.0, knows_ct_only)), [EXAMPLE, mri], mode)
    assert found[0] is mri
    assert found[1].parts == {"choice_correct": 1.0, "knows_ct_only": 0.0}


def test_a_reward_that_gives_everything_nothing_is_caught_though_it_states_no_highest_value():
    def always_zero(example, completion):
        return Score(value=0.0)

    assert [example for example, _ in check_gold(always_zero, [EXAMPLE], "think")] == [EXAMPLE]


def test_a_reward_that_states_no_highest_value_is_held_to_the_best_it_gave():
    def letter_a_counts_half(example, completion):
        return Score(value=choice_correct(example, completion) * (0.5 if example.target == "A" else 1.0))

    mri = dataclasses.replace(EXAMPLE, id="mri-1", target="A")
    assert [example.id for example, _ in check_gold(letter_a_counts_half, [mri, EXAMPLE], "think")] == ["mri-1"]


def test_a_reward_that_gives_everything_the_same_is_caught_by_right_and_by_wrong_answers():
    def half(example, completion):
        return Score(value=0.5)

    def half_for_any_text(example, completion):
        return Score(value=0.5 * bool(completion.text))

    assert [example for example, _ in check_gold(half, [EXAMPLE], "think")] == [EXAMPLE]
    assert [example for example, _ in check_gold(weighted((1.0, is_short)), [EXAMPLE], "think")] == [EXAMPLE]
    assert check_gold(half_for_any_text, [EXAMPLE], "think") == []
    assert check_wrong(half_for_any_text, [EXAMPLE], "think") == [(EXAMPLE, Score(value=0.5))]


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_answer_of_every_kind_has_the_form_and_earns_less_than_the_right_one(mode):
    for _, example, _, _, _ in KINDS_OF_ANSWERS:
        wrong = wrong_completion(example, mode)
        assert answer_correct(example, wrong) == 0.0 and well_formed(example, wrong) == 1.0
    examples = [example for _, example, _, _, _ in KINDS_OF_ANSWERS]
    assert check_wrong(from_weights({"answer_correct": 1.0, "well_formed": 1.0}), examples, mode) == []
    assert len(check_wrong(from_weights({"well_formed": 1.0}), examples[:3], mode)) == 3


def test_a_malformed_example_is_an_error_not_a_low_score():
    with pytest.raises(RewardError, match="ct-1"):
        check_gold(from_weights({"choice_correct": 1.0}), [dataclasses.replace(EXAMPLE, target="F")], "think")
