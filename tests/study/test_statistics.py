import numpy as np
import pytest
import scipy.stats
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from medrl.study.statistics import (
    Layout,
    Spread,
    detectable_difference,
    holm,
    interval,
    join_spreads,
    paired_test,
    scope_mean,
    seed_spread,
)

NO_SEEDS = Spread(0.0, np.inf)


def random_layout(generator, n=60, columns=3, clusters=25, draws=200):
    place = np.concatenate([np.arange(columns), generator.integers(0, columns, n - columns)])
    return Layout(place, np.unique(generator.integers(0, clusters, n), return_inverse=True)[1], columns, draws)


def test_holm_agrees_with_statsmodels(monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels does it in every call: a tenth of a second each
    generator = np.random.default_rng(0)
    for _ in range(1000):
        p_values = generator.random(generator.integers(1, 30)).round(2) ** 3  # with ties
        assert holm(p_values.tolist()) == pytest.approx(multipletests(p_values, method="holm")[1], abs=1e-12)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@settings(max_examples=1000)
@given(st.integers(0, 10**6))
def test_one_column_with_single_questions_is_the_paired_t_test_of_scipy(seed):
    generator = np.random.default_rng(seed)
    n = int(generator.integers(5, 400))
    a, b = generator.integers(0, 2, (2, n)).astype(float)
    a[:2], b[:2] = (1, 0), (0, 0)  # some spread
    layout = Layout(np.zeros(n, dtype=int), np.arange(n), 1)
    found = paired_test((a - b)[None], np.ones((1, 1), dtype=bool), layout, NO_SEEDS)
    assert found.p == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue, abs=1e-9)


@settings(max_examples=1000)
@given(st.integers(0, 10**6))
def test_the_mean_over_columns_has_the_cluster_robust_error_of_statsmodels(seed):
    generator = np.random.default_rng(seed)
    layout = random_layout(generator)
    difference = generator.integers(-1, 2, (1, 60)).astype(float)
    found = paired_test(difference, np.ones((1, 3), dtype=bool), layout, NO_SEEDS)
    dummies = np.eye(3)[layout.columns]
    groups = layout.n_clusters
    fit = sm.OLS(difference[0], dummies).fit(
        cov_type="cluster", cov_kwds={"groups": layout.clusters, "use_correction": False}
    )
    third = np.full(3, 1 / 3)
    error = np.sqrt(third @ fit.cov_params() @ third * groups / (groups - 1))
    value = fit.params.mean()
    assert found.p == pytest.approx(2 * scipy.stats.t.sf(abs(value) / error, groups - 1), abs=1e-9)
    assert scope_mean(layout.cell_means(difference), np.ones((1, 3), dtype=bool), layout.counts) == pytest.approx(value)


@settings(max_examples=1000)
@given(st.integers(5, 3000), st.floats(0.001, 0.5))
def test_what_a_test_can_see_agrees_with_statsmodels(n, spread):
    found = detectable_difference(spread / np.sqrt(n), n - 1)
    assert TTestPower().power(found / spread, n, 0.05) == pytest.approx(0.8, abs=1e-9)


def test_seeds_add_their_variance_and_few_seeds_say_little():
    assert seed_spread([0.4]) == (0.0, np.inf)
    assert seed_spread([0.4, 0.5, 0.6]) == pytest.approx((0.01 / 3, 2))
    joined = join_spreads([Spread(0.04, 2), Spread(0.01, 4)])
    assert joined == pytest.approx((0.05, 0.05**2 / (0.04**2 / 2 + 0.01**2 / 4)))
    assert join_spreads([NO_SEEDS, NO_SEEDS]).variance == 0.0


def test_two_means_over_seeds_compare_as_in_welchs_test():
    a, b = [0.61, 0.66, 0.58], [0.5, 0.52, 0.47, 0.55]
    joined = join_spreads([seed_spread(a), seed_spread(b)])
    expected = scipy.stats.ttest_ind(a, b, equal_var=False)
    t = (np.mean(a) - np.mean(b)) / joined.variance**0.5
    assert (t, joined.df) == pytest.approx((expected.statistic, expected.df), abs=1e-12)


def test_where_all_clusters_differ_alike_the_sign_test_speaks():
    layout = Layout(np.zeros(6, dtype=int), np.arange(6), 1)
    one = np.ones((1, 1), dtype=bool)
    assert paired_test(np.ones((1, 6)), one, layout, NO_SEEDS).p == 2 / 64
    assert paired_test(np.zeros((1, 6)), one, layout, NO_SEEDS).p == 1.0


def test_macro_counts_cells_alike_and_micro_counts_answers_alike():
    cells, counts = np.array([[0.5, 1.0], [0.0, 0.2]]), np.array([30.0, 10.0])
    everywhere, diagonal = np.ones((2, 2), dtype=bool), np.eye(2, dtype=bool)
    assert scope_mean(cells, everywhere, counts) == pytest.approx(1.7 / 4)
    assert scope_mean(cells, everywhere, counts, "micro") == pytest.approx((15 + 10 + 0 + 2) / 80)
    assert scope_mean(cells, diagonal, counts) == pytest.approx(0.35)
    assert scope_mean(cells, diagonal, counts, "micro") == pytest.approx((15 + 2) / 40)


def test_a_column_without_questions_is_left_out():
    cells, counts = np.array([[0.5, np.nan]]), np.array([30.0, 0.0])
    assert scope_mean(cells, np.ones((1, 2), dtype=bool), counts) == 0.5


def test_the_draws_of_two_methods_are_paired():
    generator = np.random.default_rng(0)
    layout = random_layout(generator, draws=50)
    right = generator.integers(0, 2, (2, 60)).astype(float)
    (first, second), _ = layout.resample([right, right + 0.25])
    assert second - first == pytest.approx(np.full(first.shape, 0.25))


def test_drawing_in_pieces_and_by_matrix_is_the_plain_cluster_bootstrap():
    generator = np.random.default_rng(4)
    layout = random_layout(generator, n=200, columns=1, clusters=40, draws=20_000)
    right = generator.integers(0, 2, (1, 200)).astype(float)
    (drawn,), _ = layout.resample([right])
    sums = np.bincount(layout.clusters, weights=right[0])
    sizes = np.bincount(layout.clusters)
    picked = generator.integers(0, layout.n_clusters, (20_000, layout.n_clusters))
    plain = sums[picked].sum(1) / sizes[picked].sum(1)
    assert drawn.std() == pytest.approx(plain.std(), rel=0.03)
    assert np.quantile(drawn, [0.025, 0.975]) == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.006)


def coverage(n_clusters, per_cluster, simulations, generator):
    """How often the interval of a mean over clustered answers holds the truth."""
    clusters, covered, at_once = np.repeat(np.arange(n_clusters), per_cluster), 0, 500
    for seed in range(simulations // at_once):
        layout = Layout(np.zeros(len(clusters), dtype=int), clusters, 1, draws=2000, seed=seed)
        shares = generator.beta(3, 2, (at_once, n_clusters, 1))  # truth 0.6; answers of a cluster are alike
        right = (generator.random((at_once, n_clusters, per_cluster)) < shares).astype(float).reshape(at_once, -1)
        (drawn,), _ = layout.resample([right])
        for answers, draws in zip(right, drawn[:, :, 0].T, strict=True):
            found = interval(float(answers.mean()), draws, layout, NO_SEEDS)
            covered += found.low <= 0.6 <= found.high
    return covered / simulations


@pytest.mark.parametrize("per_cluster", [1, 2, 5])
@pytest.mark.parametrize("n", [50, 100, 300, 1000])
def test_coverage_is_between_93_and_a_half_and_96_and_a_half_percent(n, per_cluster):
    found = coverage(n // per_cluster, per_cluster, 4000, np.random.default_rng(n + per_cluster))
    assert 0.935 <= found <= 0.965, found  # Monte Carlo error 0.35 %


def test_with_three_seeds_the_interval_holds_the_truth_as_often_as_it_says():
    generator, covered, simulations = np.random.default_rng(2), 0, 300
    for _ in range(simulations):
        levels = np.clip(generator.normal(0.6, 0.05, 3), 0, 1)
        right = (generator.random((3, 100)) < levels[:, None]).astype(float)
        layout = Layout(np.zeros(100, dtype=int), np.arange(100), 1, draws=500)
        (drawn,), _ = layout.resample([right.mean(0, keepdims=True)])
        spread = seed_spread([float(seed.mean()) for seed in right])
        found = interval(float(right.mean()), drawn[:, 0, 0], layout, spread)
        covered += found.low <= 0.6 <= found.high
    assert covered / simulations >= 0.92


def test_one_cluster_has_a_mean_but_no_interval():
    layout = Layout(np.zeros(4, dtype=int), np.zeros(4, dtype=int), 1)
    found = interval(0.75, np.zeros(10), layout, NO_SEEDS)
    assert (found.value, found.low, found.high) == (0.75, None, None)
