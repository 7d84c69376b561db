"""Means over cells of a matrix, their differences, and how sure they are. Knows arrays only.

Q questions lie in M columns (tested on) and G clusters (same image, or same patient); a method has R rows (trained on)
and S seeds. Two things would differ if a study were done again, and both are counted:

* other questions: clusters are resampled whole, the same draw for every method, so that differences are paired;
* other seeds: the mean over S seeds has variance s^2 / S, which S values tell with S - 1 degrees of freedom.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats

from medrl.evaluation.intervals import Interval, bootstrap_ends, mcnemar_exact

DRAWS = 10_000
_COUNTS_PER_CHUNK = 8_000_000
"""Counts drawn at once: some 64 MB."""

Average = Literal["macro", "micro"]


class Spread(NamedTuple):
    """Variance of an estimate and the degrees of freedom it was told with."""

    variance: float
    df: float


@dataclass(frozen=True, eq=False)
class Layout:
    """Which question lies in which column and which cluster, and the draws of clusters."""

    columns: np.ndarray
    """(Q,) column of each question."""
    clusters: np.ndarray
    """(Q,) cluster of each question, 0 to G - 1."""
    n_columns: int
    draws: int = DRAWS
    seed: int = 0

    @cached_property
    def n_clusters(self) -> int:
        return int(self.clusters.max()) + 1 if len(self.clusters) else 0

    @cached_property
    def counts(self) -> np.ndarray:
        """(M,) questions of each column."""
        return np.bincount(self.columns, minlength=self.n_columns).astype(float)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(R, Q) -> (G, R, M): sums of each cluster in each column."""
        place = self.clusters * self.n_columns + self.columns
        rows = [np.bincount(place, weights=row, minlength=self.n_clusters * self.n_columns) for row in values]
        return np.stack(rows).reshape(len(values), self.n_clusters, self.n_columns).transpose(1, 0, 2)

    def resample(self, methods: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
        """(R, Q) of each method -> (D, R, M) cell means of each draw, and (D, M) questions of each draw.

        A column that a draw leaves empty keeps its observed mean.
        Source: Davison and Hinkley 1997, Bootstrap Methods and Their Application, section 3.8 (cluster resampling).
        """
        generator = np.random.default_rng(self.seed)
        sums = [self.sums(values) for values in methods]
        counted = self.sums(np.ones((1, len(self.columns))))[:, 0]
        stacked = np.concatenate([counted, *(part.reshape(len(part), -1) for part in sums)], axis=1)
        chunk = max(1, _COUNTS_PER_CHUNK // max(1, self.n_clusters))
        evenly = np.full(self.n_clusters, 1 / self.n_clusters)
        totals = np.concatenate(
            [
                generator.multinomial(self.n_clusters, evenly, size=min(chunk, self.draws - start)) @ stacked
                for start in range(0, self.draws, chunk)
            ]
        )
        counts, place, cells = totals[:, : self.n_columns], self.n_columns, []
        for values, part in zip(methods, sums, strict=True):
            width = part.shape[1] * self.n_columns
            drawn = totals[:, place : place + width].reshape(len(totals), part.shape[1], self.n_columns)
            place += width
            with np.errstate(invalid="ignore", divide="ignore"):
                cells.append(np.where(counts[:, None] > 0, drawn / counts[:, None], self.cell_means(values)))
        return cells, counts

    def cell_means(self, values: np.ndarray) -> np.ndarray:
        """(R, Q) -> (R, M); NaN for a column without questions."""
        with np.errstate(invalid="ignore"):
            return self.sums(values).sum(axis=0) / self.counts


def scope_mean(cells: np.ndarray, scope: np.ndarray, counts: np.ndarray, average: Average = "macro") -> np.ndarray:
    """(..., R, M) cell means -> (...) mean over the cells of the scope (R, M); counts (..., M) of each draw.

    ``macro``: every cell counts alike; ``micro``: every answer does. Columns without questions are left out.
    """
    rows, columns = scope.any(axis=1), scope.any(axis=0)  # a single cell of ten thousand draws is soon read
    cells, scope, counts = cells[..., rows, :][..., columns], scope[rows][:, columns], counts[..., columns]
    weights = np.broadcast_to(counts[..., None, :], cells.shape) * scope
    if average == "macro":
        weights = (weights > 0).astype(float)
    with np.errstate(invalid="ignore"):
        return (np.where(weights > 0, cells, 0.0) * weights).sum((-2, -1)) / weights.sum((-2, -1))


def seed_spread(estimates: Sequence[float]) -> Spread:
    """Variance of the mean of one estimate per seed. A single seed tells nothing about others: no variance is added."""
    k = len(estimates)
    return Spread(0.0, np.inf) if k < 2 else Spread(float(np.var(estimates, ddof=1)) / k, k - 1)


def join_spreads(spreads: Sequence[Spread]) -> Spread:
    """Of a sum or difference of independent estimates; degrees of freedom after Welch 1947, Biometrika 34:28."""
    total = sum(spread.variance for spread in spreads)
    if total == 0:
        return Spread(0.0, np.inf)
    return Spread(total, total**2 / sum(spread.variance**2 / spread.df for spread in spreads))


def interval(value: float, drawn: np.ndarray, layout: Layout, seeds: Spread, level: float = 0.95) -> Interval:
    """Interval of an estimate from its draws over clusters, widened by what other seeds would have given.

    To each draw is added one of the seeds' mean, t-distributed about 0 with S - 1 degrees of freedom; the ends are
    those of ``bootstrap_ends``.
    """
    if not np.isfinite(value):
        return Interval(None, None, None, 0)
    if layout.n_clusters < 2:
        return Interval(value, None, None, len(layout.columns))
    if seeds.variance > 0:
        generator = np.random.default_rng([layout.seed, 1])
        drawn = drawn + np.sqrt(seeds.variance) * generator.standard_t(seeds.df, size=len(drawn))
    drawn = drawn[np.isfinite(drawn)]  # a draw may hold no answer at all of a small column
    low, high = bootstrap_ends(drawn, layout.n_clusters, level)
    return Interval(value, low, high, len(layout.columns))


class PairedTest(NamedTuple):
    """A above B, or not."""

    p: float
    """Two-sided, before any correction."""
    detectable: float | None
    """Difference that this test would find significant at 5 % four times in five."""


def paired_test(difference: np.ndarray, scope: np.ndarray, layout: Layout, seeds: Spread) -> PairedTest:
    """t-test of the macro mean of (R, Q) differences over a scope, clusters kept together and seeds counted.

    With one column, one row, one seed and clusters of one it is the paired t-test. The variance over questions is the
    cluster-robust one with the factor G / (G - 1): Liang and Zeger 1986, Biometrika 73:13. Where all clusters differ
    alike there is no variance to estimate, and the exact sign test over clusters speaks.
    """
    pieces = _influence(difference, scope, layout)
    groups = layout.n_clusters
    counts = layout.counts
    value = float(scope_mean(layout.cell_means(difference), scope, counts))
    if groups < 2 or not np.isfinite(value):
        return PairedTest(1.0, None)
    items = Spread(float(groups / (groups - 1) * (pieces**2).sum()), groups - 1)
    both = join_spreads([items, seeds])
    if both.variance <= 1e-24:
        signs = np.sign(np.round(_contributions(difference, scope, layout), 12))
        return PairedTest(mcnemar_exact(int((signs < 0).sum()), int((signs > 0).sum())), None)
    error = both.variance**0.5
    p = float(2 * scipy.stats.t.sf(abs(value) / error, both.df))
    return PairedTest(p, detectable_difference(error, both.df))


def _contributions(values: np.ndarray, scope: np.ndarray, layout: Layout) -> np.ndarray:
    """(G,) what each cluster adds to the macro mean."""
    filled = scope & (layout.counts > 0)
    per_column = (layout.sums(values) * filled).sum(axis=1)
    return (per_column / np.where(layout.counts > 0, layout.counts, 1)).sum(axis=1) / filled.sum()


def _influence(values: np.ndarray, scope: np.ndarray, layout: Layout) -> np.ndarray:
    """(G,) the same of each value's distance to the mean of its cell; sums to 0."""
    means = np.where(layout.counts > 0, layout.cell_means(values), 0.0)
    return _contributions(values - means[:, layout.columns], scope, layout)


def detectable_difference(error: float, df: float, level: float = 0.95, power: float = 0.8) -> float:
    """The true difference that a two-sided t-test with this standard error finds with this power."""
    if not np.isfinite(df):
        df = 1e9
    critical = scipy.stats.t.ppf((1 + level) / 2, df)

    def missing(shift: float) -> float:
        # NaN far in a tail, where there is no probability left to speak of.
        below, above = np.nan_to_num(scipy.special.nctdtr(df, shift, [-critical, critical]))
        return float(below + 1 - above) - power

    found = scipy.optimize.root_scalar(missing, bracket=(0.0, critical + 10.0), method="brentq", xtol=1e-12)
    return float(found.root) * error


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that hold for all claims together. Source: Holm 1979, Scandinavian J. of Statistics 6:65."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = running
    return adjusted
