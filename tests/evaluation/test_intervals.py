import json

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from medrl.evaluation.intervals import Interval, bootstrap_ends, clustered_bootstrap, mcnemar_exact, wilson


def expanded_tail(n_clusters):
    """Share of draws outside of each end of a 95 % interval: Hesterberg 2015, section 5.3."""
    factor = np.sqrt(n_clusters / (n_clusters - 1))
    return scipy.stats.norm.cdf(factor * scipy.stats.t.ppf(0.025, n_clusters - 1))


@settings(max_examples=1000)
@given(n=st.integers(1, 5000), data=st.data(), level=st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_agrees_with_statsmodels(n, data, level):
    successes = data.draw(st.integers(0, n))
    interval = wilson(successes, n, level)
    low, high = proportion_confint(successes, n, alpha=1 - level, method="wilson")
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-12)
    assert 0.0 <= interval.low <= interval.value <= interval.high <= 1.0


def test_all_right_and_all_wrong_leave_room_for_doubt():
    assert wilson(10, 10).high == 1.0 and wilson(10, 10).low == pytest.approx(0.7225, abs=1e-4)
    assert wilson(0, 10).low == 0.0 and wilson(0, 10).high == pytest.approx(0.2775, abs=1e-4)


def test_nothing_observed_is_valid_json_and_excludes_nothing():
    for empty in (wilson(0, 0), clustered_bootstrap([], [])):
        assert empty == Interval(None, None, None, 0)
        assert not empty.excludes(0.0)
        assert json.dumps(empty.as_dict(), allow_nan=False) == '{"value": null, "low": null, "high": null, "n": 0}'


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3)])
def test_counts_that_cannot_be_are_refused(successes, n):
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, n)


def test_an_interval_excludes_only_what_lies_outside():
    assert Interval(0.1, 0.01, 0.2, 9).excludes(0.0)
    assert not Interval(0.1, 0.0, 0.2, 9).excludes(0.0)
    assert Interval(-0.1, -0.2, -0.01, 9).excludes(0.0)


@settings(max_examples=1000)
@given(st.integers(0, 10**6))
def test_ends_of_draws_that_all_differ_are_quantiles_of_numpy(seed):
    generator = np.random.default_rng(seed)
    n_clusters = int(generator.integers(2, 2000))
    drawn = generator.normal(generator.normal(), 0.1, int(generator.integers(50, 500)))
    tail = expanded_tail(n_clusters)
    assert bootstrap_ends(drawn, n_clusters) == pytest.approx(
        tuple(np.quantile(drawn, [tail, 1 - tail], method="hazen")), abs=1e-9
    )


def test_of_draws_that_are_alike_half_count_as_below():
    # 1, 1, 2, 2, 2, 2, 3, 3: below the middle of 1 lies 1/8 of the draws, of 2 a half, of 3 7/8.
    low, high = bootstrap_ends(np.array([1, 1, 2, 2, 2, 2, 3, 3.0]), 10**9, level=0.5)
    assert (low, high) == pytest.approx((1 + (0.25 - 0.125) / 0.375, 3 - (0.25 - 0.125) / 0.375), abs=1e-6)


def test_two_clusters_reach_as_far_as_the_draws_do_and_one_has_no_ends():
    assert bootstrap_ends(np.linspace(0.2, 0.9, 1000), 2) == (0.2, 0.9)
    with pytest.raises(ValueError, match="1 clusters"):
        bootstrap_ends(np.linspace(0.2, 0.9, 1000), 1)


def test_singleton_clusters_give_the_ordinary_bootstrap_of_scipy():
    values = np.random.default_rng(3).normal(size=80)
    ours = clustered_bootstrap(values, range(80), draws=20_000)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1),
        confidence_level=1 - 2 * expanded_tail(80),
    )  # fmt: skip
    # Monte Carlo error of a 2.5 % quantile at 20,000 draws is about 0.02 standard errors of the mean (0.11 here).
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.012)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.012)
    assert ours.value == pytest.approx(values.mean())


def test_the_shortcut_over_equal_clusters_draws_from_the_same_distribution_as_drawing_clusters_one_by_one():
    generator = np.random.default_rng(0)
    clusters = np.repeat(np.arange(30), generator.integers(1, 6, 30))
    values = (generator.random(len(clusters)) < 0.6).astype(float)
    ours = clustered_bootstrap(values, clusters.tolist(), draws=20_000)
    sums, sizes = np.bincount(clusters, weights=values), np.bincount(clusters)
    drawn = generator.integers(0, 30, (20_000, 30))
    tail = expanded_tail(30)
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), [tail, 1 - tail])
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.008)


def test_the_same_arguments_give_the_same_interval_in_any_order_of_the_rows():
    values, clusters = [1, 0, 1, 1, 0, 0, 1], list("aabbcde")
    interval = clustered_bootstrap(values, clusters)
    assert clustered_bootstrap(values, clusters) == interval
    assert clustered_bootstrap(values[::-1], clusters[::-1]) == interval
    assert clustered_bootstrap([0.1, 0.7, 0.4], "abc", seed=1) == clustered_bootstrap([0.1, 0.7, 0.4], "abc", seed=1)


def test_copies_of_an_observation_add_no_certainty_when_clustered():
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    once = clustered_bootstrap(values, range(8))
    copied = clustered_bootstrap(values * 25, list(range(8)) * 25)
    assert (copied.low, copied.high) == (once.low, once.high)
    as_if_independent = clustered_bootstrap(values * 25, range(200))
    assert as_if_independent.high - as_if_independent.low < 0.3 * (copied.high - copied.low)


def test_one_cluster_has_a_mean_but_no_interval():
    assert clustered_bootstrap([1, 0, 1, 1], ["same"] * 4) == Interval(0.75, None, None, 4)


def test_every_value_needs_a_cluster():
    with pytest.raises(ValueError, match="3 values but 2 clusters"):
        clustered_bootstrap([1, 2, 3], ["a", "b"])


def test_many_distinct_clusters_are_drawn_in_pieces_that_join():
    values = np.random.default_rng(0).normal(size=9000)
    interval = clustered_bootstrap(values, range(9000), draws=900)
    error = values.std() / np.sqrt(9000)
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def coverage(n_clusters, per_cluster, simulations, generator):
    """How often the interval of a difference of two raters' answers to the same questions holds the truth."""
    covered = 0
    clusters = np.repeat(np.arange(n_clusters), per_cluster).tolist()
    for seed in range(simulations):
        a_knows = generator.beta(2, 2, (n_clusters, 1))  # questions about an image are alike
        b_learned = generator.beta(1, 4, (n_clusters, 1))
        easy, new, slip = generator.random((3, n_clusters, per_cluster))
        a = easy < a_knows
        b = (a | (new < b_learned)) & (slip < 0.9)
        found = clustered_bootstrap((b.astype(float) - a).ravel(), clusters, draws=1000, seed=seed)
        covered += found.low <= 0.9 * (0.5 + 0.5 * 0.2) - 0.5 <= found.high
    return covered / simulations


@pytest.mark.parametrize(("n_clusters", "per_cluster"), [(50, 1), (20, 5)])
def test_the_interval_of_a_difference_holds_the_truth_as_often_as_it_says(n_clusters, per_cluster):
    found = coverage(n_clusters, per_cluster, 500, np.random.default_rng(n_clusters + per_cluster))
    assert 0.92 <= found <= 0.98  # 95 %, Monte Carlo error 1 %


@pytest.mark.slow
@pytest.mark.parametrize("per_cluster", [1, 2, 5])
@pytest.mark.parametrize("n", [50, 100, 300, 1000])
def test_coverage_of_differences_is_between_93_and_a_half_and_96_and_a_half_percent(n, per_cluster):
    found = coverage(n // per_cluster, per_cluster, 4000, np.random.default_rng(n + per_cluster))
    assert 0.935 <= found <= 0.965, found  # Monte Carlo error 0.35 %


@settings(max_examples=1000)
@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_agrees_with_statsmodels(b, c):
    expected = min(1.0, mcnemar([[10, b], [c, 10]], exact=True).pvalue)
    assert mcnemar_exact(b, c) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_mcnemar_by_hand():
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(0, 5) == mcnemar_exact(5, 0) == 2 / 32
    assert mcnemar_exact(1, 5) == 2 * (1 + 6) / 64
    assert mcnemar_exact(3, 3) == 1.0
    assert 0.0 <= mcnemar_exact(2000, 9000) < 1e-300
    with pytest.raises(ValueError, match="negative"):
        mcnemar_exact(-1, 2)
