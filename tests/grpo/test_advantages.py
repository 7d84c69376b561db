import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medrl.errors import NonFiniteError, RewardError
from medrl.grpo import group_advantages

groups = st.integers(2, 9).flatmap(
    lambda size: st.lists(
        st.lists(st.floats(-100, 100), min_size=size, max_size=size),
        min_size=1,
        max_size=5,
    )
)


def test_one_good_completion_of_four_by_hand():
    # mean 0.25; unbiased variance (3 * 0.0625 + 0.5625) / 3 = 0.25, so the standard deviation is 0.5
    advantages = group_advantages([[1.0, 0.0, 0.0, 0.0]])
    assert advantages.dtype == torch.float64
    assert advantages.tolist() == [pytest.approx([0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001])]


@pytest.mark.parametrize("size", [8, 23])
def test_equal_rewards_teach_nothing_though_their_float32_mean_differs_from_them(size):
    rewards = torch.full((1, size), 1.2)
    naive = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    assert naive.abs().max() > 0.05
    assert group_advantages(rewards).tolist() == [[0.0] * size]
    assert group_advantages([[1.0 + 0.2] * size]).tolist() == [[0.0] * size]


@settings(deadline=None)
@given(st.floats(-100, 100), st.integers(2, 40))
def test_equal_rewards_teach_exactly_nothing(reward, size):
    assert group_advantages([[reward] * size]).tolist() == [[0.0] * size]


def test_float32_rewards_are_compared_in_float64():
    rewards = torch.tensor([[0.1, 0.2, 0.9]])
    assert torch.equal(group_advantages(rewards), group_advantages(rewards.double()))


def test_rewards_equal_up_to_rounding_teach_next_to_nothing():
    assert group_advantages([[1.2, 1.0 + 0.2, 0.9 + 0.3, 1.2]]).abs().max() < 1e-11


def test_a_group_does_not_see_the_others():
    both = group_advantages([[1.0, 0.0], [100.0, 50.0]])
    assert torch.equal(both[:1], group_advantages([[1.0, 0.0]]))


@settings(deadline=None)
@given(groups)
def test_advantages_agree_with_numpy(rewards):
    table = np.array(rewards)
    expected = (table - table.mean(1, keepdims=True)) / (table.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards).numpy(), expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(groups)
def test_the_advantages_of_a_group_sum_to_zero(rewards):
    assert group_advantages(rewards).sum(dim=1).abs().max() < 1e-7


@settings(deadline=None)
@given(groups, st.floats(-10, 10))
def test_a_bonus_for_all_changes_nothing(rewards, bonus):
    shifted = [[reward + bonus for reward in group] for group in rewards]
    torch.testing.assert_close(group_advantages(shifted), group_advantages(rewards), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_names_its_group_and_member(bad):
    with pytest.raises(
        NonFiniteError, match=f"the reward of completion 2 of group 1 is {bad}; a reward must be a finite number"
    ):
        group_advantages([[0.0, 1.0, 0.0], [0.0, 1.0, bad]])


def test_a_group_of_one_is_refused():
    with pytest.raises(RewardError, match=r"rewards have shape \(2, 1\).*lone completion"):
        group_advantages([[1.0], [0.0]])


def test_groups_of_unequal_size_are_refused():
    with pytest.raises(RewardError, match=r"groups must have one size, but these have \[2, 3\] rewards"):
        group_advantages([[1.0, 0.0], [1.0, 0.0, 0.0]])
