"""The order of examples is a function of the seed and the position, and of nothing else."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medrl.data.sampler import Sampler, epoch_order
from medrl.errors import SettingsError

SIZES = st.integers(1, 30)


def test_the_order_of_an_epoch_is_pinned():
    # A change here changes every run that is resumed or reproduced.
    assert epoch_order(8, seed=0, epoch=0).tolist() == [6, 4, 5, 2, 1, 0, 7, 3]
    assert epoch_order(8, seed=0, epoch=1).tolist() == [6, 5, 0, 3, 7, 2, 1, 4]


@given(SIZES, st.integers(0, 99), st.integers(0, 5))
def test_an_epoch_holds_each_example_once(n, seed, epoch):
    assert sorted(epoch_order(n, seed, epoch).tolist()) == list(range(n))


@given(SIZES, st.integers(0, 99), st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 7))
def test_a_sampler_resumed_from_its_position_goes_on_as_if_it_had_not_stopped(n, seed, sizes, stop):
    whole, resumed = Sampler(n, seed), Sampler(n, seed)
    draws = [whole.next(k) for k in sizes]
    for k in sizes[:stop]:
        resumed.next(k)
    resumed = Sampler(n, seed, resumed.position)
    assert [resumed.next(k) for k in sizes[stop:]] == draws[stop:]
    assert whole.position == sum(sizes)


@given(SIZES, st.integers(0, 99), st.integers(1, 10), st.integers(0, 60))
def test_a_peek_is_the_draw_after_next_and_draws_nothing(n, seed, k, position):
    sampler = Sampler(n, seed, position, ranks=list(range(n)))
    now, later = sampler.peek(k), sampler.peek(k, skip=k)
    assert sampler.position == position
    assert [sampler.next(k), sampler.next(k)] == [now, later]


@given(st.data(), SIZES, st.integers(0, 99))
def test_one_draw_never_repeats_an_example_unless_it_must(data, n, seed):
    sampler = Sampler(n, seed, data.draw(st.integers(0, 3 * n)))
    for _ in range(4):
        k = data.draw(st.integers(1, n))
        drawn = sampler.next(k)
        assert len(set(drawn)) == len(drawn) == k
        assert set(drawn) <= set(range(n))


@given(SIZES, st.integers(1, 5), st.integers(0, 99))
def test_where_the_draw_divides_the_set_every_epoch_is_exact(batches, k, seed):
    n = batches * k
    sampler = Sampler(n, seed)
    for _ in range(3):
        epoch = [index for _ in range(batches) for index in sampler.next(k)]
        assert sorted(epoch) == list(range(n))


@given(st.integers(2, 20), st.integers(0, 99))
def test_more_than_there_are_come_out_as_evenly_as_they_can(n, seed):
    assert set(Counter(Sampler(n, seed).next(3 * n)).values()) == {3}


def test_seeds_and_epochs_give_different_orders():
    orders = {tuple(epoch_order(20, seed, epoch).tolist()) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_every_example_comes_first_about_equally_often():
    first = Counter(int(epoch_order(4, 0, epoch)[0]) for epoch in range(4000))
    # 1000 expected of each, standard deviation 27
    assert all(870 < first[index] < 1130 for index in range(4))


@pytest.mark.parametrize(("arguments", "words"), [((0, 1), "n_examples is 0"), ((3, 1, -1), "position is -1")])
def test_impossible_arguments_are_refused(arguments, words):
    with pytest.raises(SettingsError, match=words):
        Sampler(*arguments)
    with pytest.raises(SettingsError, match="k is 0"):
        Sampler(3, 0).next(0)


def test_with_ranks_every_epoch_goes_from_the_lowest_to_the_highest_and_the_seed_orders_equal_ones():
    ranks = [2.0, 1.0, 2.0, 0.0, 1.0, 2.0]
    drawn = Sampler(6, seed=3, ranks=ranks).next(6)
    assert [ranks[index] for index in drawn] == sorted(ranks)
    orders = {tuple(Sampler(6, seed=seed, ranks=ranks).next(6)) for seed in range(20)}
    assert len(orders) > 4
    resumed = Sampler(6, seed=3, position=4, ranks=ranks)
    assert resumed.next(2) == drawn[4:]
