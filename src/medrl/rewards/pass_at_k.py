"""From how many of n completions are right to the chance that one of k is."""

from math import comb


def pass_at_k(n: int, right: int, k: int) -> float:
    """Share of all draws of ``k`` out of ``n`` completions that hold at least one of the ``right`` ones.

    Unbiased for the probability that k completions hold a right one. Source: Chen et al. 2021, arXiv 2107.03374, eq. 1.
    """
    if not 0 <= right <= n or not 1 <= k <= n:
        raise ValueError(f"{k} drawn from {n} samples of which {right} are right: needs 0 <= right <= n, 1 <= k <= n")
    return 1.0 - comb(n - right, k) / comb(n, k)
