import contextlib
import math
import signal
import time
from fractions import Fraction

import numpy
import pytest

from medrl.errors import MedrlError, NonFiniteError, RewardError
from medrl.rewards import choice_correct, guarded, weighted
from medrl.types import Completion, Example, Score

EXAMPLE = Example(id="ct-1", source="s", images=(), question="?", options=("CT", "MRI"), target="A")
RIGHT = Completion(text="<think>x</think><answer>A</answer>", token_ids=(), finish_reason="stop")
SAMPLE = r"on example 'ct-1' \(completion '<think>x</think><answer>A</answer>'\)"


def lesion_size(example, completion):
    return 0.25


def test_a_number_becomes_a_score_with_its_name_and_the_answer():
    score = guarded(lesion_size)(EXAMPLE, RIGHT)
    assert score == Score(value=0.25, parts={"lesion_size": 0.25}, answer="A", explanation="lesion_size 0.25.")


@pytest.mark.parametrize("value", [True, False, numpy.True_, numpy.float32(0.25), numpy.array(1), Fraction(1, 4)])
def test_right_or_wrong_and_any_one_number_are_a_value(value):
    assert guarded(lambda example, completion: value)(EXAMPLE, RIGHT).value == float(value)


def test_a_score_passes_and_gets_the_answer_that_it_lacks():
    reward = guarded(lambda example, completion: Score(value=1.0, parts={"a": 1.0}, explanation="so"))
    assert reward(EXAMPLE, RIGHT) == Score(value=1.0, parts={"a": 1.0}, answer="A", explanation="so")
    mine = weighted((2.0, choice_correct))
    assert guarded(mine)(EXAMPLE, RIGHT) == mine(EXAMPLE, RIGHT)


def test_what_a_right_answer_earns_is_still_stated():
    assert guarded(weighted((2.0, choice_correct))).highest_of(EXAMPLE) == 2.0
    assert guarded(lesion_size).highest_of(EXAMPLE) is None
    once = guarded(lesion_size)
    assert guarded(once) is once


def test_a_reward_that_raises_is_named_with_the_sample_and_the_cause():
    def broken(example, completion):
        return {}["mask"]

    with pytest.raises(
        RewardError, match=rf"reward broken {SAMPLE} raised KeyError: 'mask' \(test_guard.py, line \d+\)$"
    ) as caught:
        guarded(broken)(EXAMPLE, RIGHT)
    assert isinstance(caught.value.__cause__, KeyError)


def test_our_own_errors_pass_as_they_are():
    def refuses(example, completion):
        raise RewardError("I say so")

    with pytest.raises(RewardError, match=r"^I say so$"):
        guarded(refuses)(EXAMPLE, RIGHT)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_finite_number_is_named_with_the_sample(value):
    with pytest.raises(NonFiniteError, match=SAMPLE):
        guarded(lambda example, completion: value)(EXAMPLE, RIGHT)
    with pytest.raises(NonFiniteError, match=SAMPLE):
        guarded(lambda example, completion: Score(value=value))(EXAMPLE, RIGHT)


@pytest.mark.parametrize("value", [[1.0], [1.0, 0.0], (), None, "1", {"score": 1}, Score(value=None)])  # type: ignore[arg-type]
def test_a_reward_of_the_wrong_form_or_length_is_named_with_the_sample(value):
    with pytest.raises(RewardError, match=rf"{SAMPLE} returned .*medrl.rewards.adapters"):
        guarded(lambda example, completion: value)(EXAMPLE, RIGHT)


def test_the_length_of_a_list_is_told():
    with pytest.raises(RewardError, match="a list, 3 values"):
        guarded(lambda example, completion: [0.0, 1.0, 2.0])(EXAMPLE, RIGHT)


def test_a_long_completion_is_shortened_in_the_message():
    long = Completion(text="x" * 10_000, token_ids=(), finish_reason="stop")
    with pytest.raises(MedrlError) as caught:
        guarded(lambda example, completion: None)(EXAMPLE, long)
    assert len(str(caught.value)) < 600


def sleeps(example, completion):
    time.sleep(60)


def spins(example, completion):
    while True:
        pass


def swallows(example, completion):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(60)


@pytest.mark.parametrize("slow", [sleeps, spins, swallows])
def test_a_reward_that_takes_too_long_is_stopped_and_named_with_the_sample(slow):
    with pytest.raises(RewardError, match=rf"{slow.__name__} {SAMPLE} took longer than 0.2 s"):
        guarded(slow, limit_s=0.2)(EXAMPLE, RIGHT)


def test_a_reward_may_state_how_long_it_takes():
    class Patient:
        limit_s = 500.0

        def __call__(self, example, completion):
            return 1.0

    assert guarded(Patient()).limit_s == 500.0
    assert guarded(lesion_size).limit_s == 30.0


def test_an_alarm_that_was_running_runs_on():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    old = signal.setitimer(signal.ITIMER_REAL, 500.0)
    try:
        guarded(lesion_size)(EXAMPLE, RIGHT)
        remaining, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 0 < remaining <= 500.0 and signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL
    finally:
        signal.setitimer(signal.ITIMER_REAL, *old)
        signal.signal(signal.SIGALRM, before)
    assert rung == []
