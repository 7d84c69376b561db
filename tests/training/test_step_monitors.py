"""What the monitors see in completions."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medrl.training.monitors import implied, letter_counts, letter_excess, pass_rates, step_monitors, tags_off
from medrl.types import Completion, Example, Group, Groups, Prompt, Rollout, Score

OPTIONS = ("CT", "MRI", "No fracture", "Fracture")


def example(options: tuple[str, ...] = OPTIONS, target: str = "A") -> Example:
    return Example(id="e", source="s", images=(), question="?", options=options, target=target)


def completion(text: str, mode="think", length: int = 3) -> Completion:
    return Completion(text=text, token_ids=tuple(range(length)), finish_reason="stop", mode=mode)


@pytest.mark.parametrize(
    ("thought", "letter"),
    [
        ("The scan shows bone. This is a CT.", "A"),
        ("It could be CT or MRI. The contrast speaks for MRI.", "B"),
        ("It is MRI. So the answer is (A).", "A"),
        ("So the answer is B", "B"),
        ("option: **C**", "C"),
        ("I see no fracture here.", "C"),
        ("There is a fracture.", "D"),
        ("It is CT or MRI.", None),  # several
        ("The image is bright.", None),  # none
        ("The answer is a tumor of the lung.", None),  # a word, not the letter... and no option
        ("We see (J) here.", None),  # not offered
        ("mrimage and CTs", None),  # inside words
        ("", None),
    ],
)
def test_the_option_that_the_reasoning_comes_down_to(thought, letter):
    assert implied(example(), completion(f"<think>{thought}</think><answer>A</answer>")) == letter


def test_only_what_stands_in_the_reasoning_implies_an_option():
    assert implied(example(), completion("CT <answer>B</answer>")) is None
    assert implied(example(), completion("<think>CT")) is None
    after = completion("<answer>B</answer><think>CT</think>", mode="think_after")
    assert implied(example(), after) == "A"


@given(st.text(), st.lists(st.text(), min_size=2, max_size=5))
def test_no_text_and_no_options_are_an_error(text, options):
    implied(example(tuple(options)), completion(f"<think>{text}</think>"))


@pytest.mark.parametrize(
    ("text", "mode", "off"),
    [
        ("<think>x</think><answer>A</answer>", "think", False),
        ("<answer>A</answer>", "no_think", False),
        ("<answer>A</answer>", "think", True),
        ("<think>x</think><answer>A</answer>", "no_think", True),
        ("<think>x</think><answer>A</answer><answer>A</answer>", "think", True),
        ("<think>x</think><answer>A", "think", True),
        ("<answer>A</answer><think>x</think>", "think_after", False),
    ],
)
def test_tags_are_off_unless_each_stands_once(text, mode, off):
    assert tags_off(completion(text, mode)) is off


def group(
    answers: list[str | None], target: str = "A", lengths: list[int] | None = None, thought: str = "It is CT."
) -> Group:
    rollouts = tuple(
        Rollout(
            completion=completion(f"<think>{thought}</think><answer>{answer}</answer>", length=length),
            score=Score(value=float(answer == target), parts={"right": float(answer == target)}, answer=answer),
        )
        for answer, length in zip(answers, lengths or [3] * len(answers), strict=True)
    )
    return Group(
        example=example(target=target), prompt=Prompt(id="e", text="?", images=(), mode="think"), rollouts=rollouts
    )


def test_the_monitors_of_a_step_by_hand():
    row = step_monitors(
        Groups((group(["A", "B", None, "A"], lengths=[2, 10, 20, 4]), group(["B", "B", "B", "B"], "B")))
    )
    assert row["think_agreement"] == 2 / 7  # two of seven readable answers are the CT of every reasoning
    assert row["think_implied"] == 7 / 8
    assert row["tags_off"] == 0.0
    assert row["answer_letters"] == {"A": 2, "B": 5} and row["target_letters"] == {"A": 4, "B": 4}
    assert row["completions/mean_length_right"] == 18 / 6 and row["completions/mean_length_wrong"] == 15.0
    assert (row["pass@1"], row["pass@2"], row["pass@4"]) == (0.75, pytest.approx((5 / 6 + 1) / 2), 1.0)


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_pass_rates_is_the_share_of_all_draws_of_k_with_a_right_one(right):
    found = pass_rates(Groups((group(["A" if r else "B" for r in right]),)))
    for k, value in found.items():
        draws = [any(draw) for draw in combinations(right, k)]
        assert value == pytest.approx(sum(draws) / len(draws))
    assert list(found) == [k for k in (1, 2, 4, 8) if k <= len(right)]


def test_the_favored_letter_by_hand():
    answers, targets = letter_counts([group(["A", "A", "A", "B"], "B"), group([None, "A", "C", "C"], "C")])
    assert (answers, targets) == ({"A": 4, "B": 1, "C": 2}, {"A": 0, "B": 4, "C": 4})
    assert letter_excess(answers, targets) == ("A", pytest.approx(4 / 7))
    assert letter_excess({}, {"A": 1}) is None
