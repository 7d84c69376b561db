"""The algorithms once more, in plain Python and NumPy float64, one token at a time, as their papers write them.

Written from the papers, not from the code under test: nothing here is imported from it.
"""

import math
from typing import Any

import numpy as np

FLOOR = 1e-4

Step = dict[str, np.ndarray]
"""logprobs, old_logprobs, ref_logprobs, completion_mask (R, T); advantages (R,); entropy (R, T)."""


def advantages(algorithm: str, rewards: np.ndarray) -> np.ndarray:
    """(N, G) -> (N, G)."""
    out = np.zeros_like(rewards)
    groups, size = rewards.shape
    centered = np.array([[r - sum(row) / size for r in row] for row in rewards])
    for n in range(groups):
        row = rewards[n]
        if len(set(row)) == 1 and algorithm != "reinforce++":
            centered[n] = 0.0
            continue
        for g in range(size):
            if algorithm in ("paper", "grpo", "dapo", "gspo", "cispo"):
                variance = sum((r - row.mean()) ** 2 for r in row) / (size - 1)
                out[n, g] = (row[g] - row.mean()) / (math.sqrt(variance) + FLOOR)
            elif algorithm == "dr_grpo":
                out[n, g] = row[g] - row.mean()
            elif algorithm == "rloo":
                others = [row[k] for k in range(size) if k != g]
                out[n, g] = row[g] - sum(others) / len(others)
    if algorithm in ("reinforce++", "reinforce++_baseline"):
        values = rewards if algorithm == "reinforce++" else centered
        if np.all(values == values.flat[0]):
            return np.zeros_like(rewards)
        mean = values.sum() / values.size
        variance = ((values - mean) ** 2).sum() / (values.size - 1)
        return (values - mean) / (math.sqrt(variance) + FLOOR)
    return out


def kl(algorithm: str, lp: float, ref: float) -> float:
    """The estimator in the loss."""
    if algorithm == "reinforce++_baseline":
        return 0.5 * (lp - ref) ** 2
    return math.exp(ref - lp) - (ref - lp) - 1


def kl_slope(algorithm: str, lp: float, ref: float) -> float:
    return lp - ref if algorithm == "reinforce++_baseline" else 1 - math.exp(ref - lp)


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, 1 - low), 1 + high)


def loss(algorithm: str, step: Step, s: Any, max_tokens: int) -> tuple[float, np.ndarray]:
    """The loss and its gradient with respect to every log-probability. ``s`` has the settings by name."""
    mask = step["completion_mask"]
    total, gradient = 0.0, np.zeros_like(mask)
    n_tokens = mask.sum()
    in_loss = 0.0 if algorithm in ("rloo", "reinforce++") else s.kl_coef
    for i in range(len(mask)):
        places = np.flatnonzero(mask[i])
        length = len(places)
        if length == 0:
            continue
        a = step["advantages"][i]
        lp, old, ref = (step[name][i] for name in ("logprobs", "old_logprobs", "ref_logprobs"))
        weight = {
            "sequence": 1 / (len(mask) * length),
            "token": 1 / n_tokens,
            "constant": 1 / (len(mask) * max_tokens),
        }[s.reduction]
        if algorithm in ("gspo", "rloo"):  # one ratio per completion
            summed = sum(lp[t] - old[t] for t in places)
            ratio = math.exp(summed / length if algorithm == "gspo" else summed)
            inner = min(ratio * a, clip(ratio, s.clip_low, s.clip_high) * a)
            moves = ratio * a <= clip(ratio, s.clip_low, s.clip_high) * a
            total -= inner / len(mask)
            for t in places:
                gradient[i, t] -= moves * ratio * a * (1 / length if algorithm == "gspo" else 1.0) / len(mask)
        for t in places:
            if algorithm == "paper":
                objective, slope = a, a
            elif algorithm == "cispo":
                bounded = clip(math.exp(lp[t] - old[t]), s.clip_low, s.clip_high)
                objective, slope = bounded * a * lp[t], bounded * a
            elif algorithm in ("gspo", "rloo"):
                objective, slope = 0.0, 0.0
            else:
                ratio = math.exp(lp[t] - old[t])
                bounded = clip(ratio, s.clip_low, s.clip_high)
                objective = min(ratio * a, bounded * a)
                slope = ratio * a if ratio * a <= bounded * a else 0.0
            total += weight * (-objective + in_loss * kl(algorithm, lp[t], ref[t]))
            gradient[i, t] += weight * (-slope + in_loss * kl_slope(algorithm, lp[t], ref[t]))
    return total - s.entropy_coef * (step["entropy"] * mask).sum() / max(1, n_tokens), gradient
