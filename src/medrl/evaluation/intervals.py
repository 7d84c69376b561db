"""Intervals and tests for shares, means and paired answers. Knows numbers only: no records, no files."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

# Counts drawn at once: keeps the bootstrap under some 64 MB however many distinct clusters there are.
_COUNTS_PER_CHUNK = 8_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval.

    What the data cannot say is None, never NaN, so that it stays valid JSON: nothing at all for n = 0, and no ends
    for a bootstrap over fewer than two clusters.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    """Observations, not clusters."""

    def excludes(self, point: float) -> bool:
        """Whether the interval is known and lies on one side of the point."""
        return self.low is not None and self.high is not None and not self.low <= point <= self.high

    def as_dict(self) -> dict[str, float | int | None]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def wilson(successes: float, n: int, level: float = 0.95) -> Interval:
    """Score interval of a share; honest also at 0 and 1, where the usual +-1.96 standard errors are 0 wide.

    Takes observations to be independent. Successes need not be whole: a mean over seeds may be half right.
    Source: Wilson 1927, JASA 22:209.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: must lie between 0 and n")
    if n == 0:
        return Interval(None, None, None, 0)
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / n
    scale = 1 + z * z / n
    center = (share + z * z / (2 * n)) / scale
    half = z / scale * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    # At the edges the formula is exact but its rounding is not: 1 of 1 must not end at 0.9999999.
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == n else center + half
    return Interval(share, low, high, n)


def clustered_bootstrap(
    values: Sequence[float] | Sequence[bool] | np.ndarray,
    clusters: Sequence[Hashable],
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Interval of a mean when observations of one cluster belong together (same image, same patient).

    ``values`` (n,) may be paired differences; ``clusters`` (n,) names the cluster of each. Whole clusters are drawn
    with replacement, and a draw's mean is the sum over its observations by their number; ``bootstrap_ends`` makes the
    interval of the draws. With all clusters of size one it is the ordinary bootstrap. The same arguments give the same
    interval.
    Source: Davison and Hinkley 1997, Bootstrap Methods and Their Application, section 3.8 (cluster resampling).
    """
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values but {len(clusters)} clusters: each value needs the name of its cluster")
    if len(values) == 0:
        return Interval(None, None, None, 0)
    observed = np.asarray(values, dtype=np.float64)
    index = {name: position for position, name in enumerate(dict.fromkeys(clusters))}
    membership = np.array([index[name] for name in clusters])
    n_clusters = len(index)
    mean = float(observed.mean())
    if n_clusters < 2:
        return Interval(mean, None, None, len(observed))
    sizes = np.bincount(membership, minlength=n_clusters)
    sums = np.bincount(membership, weights=observed, minlength=n_clusters)
    # Clusters with equal sum and size are interchangeable, so it is enough to draw how many come from each kind.
    # Answers are right or wrong: ten thousand images make a few dozen kinds.
    kinds, kind_counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    chunk = max(1, _COUNTS_PER_CHUNK // len(kinds))
    means = []
    for start in range(0, draws, chunk):
        counts = generator.multinomial(n_clusters, kind_counts / n_clusters, size=min(chunk, draws - start))
        totals = counts @ kinds  # (draws, 2): sum and number of observations
        means.append(totals[:, 0] / totals[:, 1])
    low, high = bootstrap_ends(np.concatenate(means), n_clusters, level)
    return Interval(mean, low, high, len(observed))


def bootstrap_ends(drawn: np.ndarray, n_clusters: int, level: float = 0.95) -> tuple[float, float]:
    """Ends of the interval of a mean, from its (D,) draws over at least two clusters.

    Percentiles of the draws with two corrections, without which the interval holds the truth less often than it says:

    * Few clusters are not taken for many: plain percentiles are too narrow by sqrt((G - 1) / G) times the ratio of
      normal to t quantiles. Source: Hesterberg 2015, What Teachers Should Know About the Bootstrap, The American
      Statistician 69:371, section 5.3 ("expanded percentile").
    * Answers are right or wrong, so over 50 of them a share moves in steps of 2 points, and a plain percentile can only
      be one of the steps. Half of each value's draws count as below it, and between values the line is straight.
      Source: Ma, Genton and Parzen 2011, Annals of the Institute of Statistical Mathematics 63:227 (mid-quantiles).
    """
    import scipy.special  # a part of scipy that loads fast, and only where it is needed

    if n_clusters < 2:
        raise ValueError(f"{n_clusters} clusters: an interval needs at least two")
    stretch = (n_clusters / (n_clusters - 1)) ** 0.5
    tail = NormalDist().cdf(stretch * float(scipy.special.stdtrit(n_clusters - 1, (1 - level) / 2)))
    values, counts = np.unique(drawn.round(12), return_counts=True)  # rounded: the same mean, summed in another order
    below = (counts.cumsum() - counts / 2) / len(drawn)
    low, high = np.interp([tail, 1 - tail], below, values)
    return float(low), float(high)


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided p-value that b and c, the examples only one of two raters has right, are equally likely.

    Binomial with share 1/2 over the b + c discordant examples, in exact integers. Takes examples to be independent.
    Source: McNemar 1947, Psychometrika 12:153, in its exact form.
    """
    if b < 0 or c < 0:
        raise ValueError(f"counts must not be negative, got {b} and {c}")
    n = b + c
    tail, ways = 0, 1
    for k in range(min(b, c) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)
