"""What an update makes larger, per token: objectives and the ratios they look at.

Shapes: R completions, T tokens. ``logprobs`` and ``old_logprobs`` are ``(R, T)`` nats, 0 where nothing counts;
``counts`` is ``(R, T)``, true where a token counts; ``advantages`` are ``(R, 1)``. An objective gives ``(R, T)``, or
``(R, 1)`` where all tokens of a completion share one value. Higher is better.
"""

import math

import torch
from torch import Tensor


def token_log_ratio(logprobs: Tensor, old_logprobs: Tensor, counts: Tensor) -> Tensor:
    """log of pi(o_t) / pi_old(o_t), token by token: ``(R, T)``."""
    return logprobs - old_logprobs


def mean_log_ratio(logprobs: Tensor, old_logprobs: Tensor, counts: Tensor) -> Tensor:
    """log of (pi(o) / pi_old(o)) ^ (1 / length), one per completion: ``(R, 1)``.

    Source: GSPO, arXiv 2507.18071, eq. 7.
    """
    lengths = counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return summed_log_ratio(logprobs, old_logprobs, counts) / lengths


def summed_log_ratio(logprobs: Tensor, old_logprobs: Tensor, counts: Tensor) -> Tensor:
    """log of pi(o) / pi_old(o), the whole completion as one action: ``(R, 1)``. Source: RLOO, arXiv 2402.14740."""
    return torch.where(counts.bool(), logprobs - old_logprobs, 0.0).sum(dim=-1, keepdim=True)


def on_policy_objective(
    log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """ratio * A with a ratio that is exactly 1: its gradient is that of A * log pi. Nothing to clip.

    Source: the papers' trainer, -(exp(lp - sg(lp)) * A), which is DeepSeekMath, arXiv 2402.03300, eq. 21 with pi_old =
    pi.
    """
    return (logprobs - logprobs.detach()).exp() * advantages


def clipped_objective(
    log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A).

    Once a ratio leaves the range in the direction its advantage pushes, it has no gradient.
    Source: Schulman et al. 2017 (PPO), arXiv 1707.06347, eq. 7; in GRPO: DeepSeekMath, arXiv 2402.03300, eq. 3;
    clip_high > clip_low: DAPO, arXiv 2503.14476; of a completion's mean ratio: GSPO, arXiv 2507.18071, eq. 5.
    """
    # The same minimum, taken before exp: A * min(ratio, 1 + high) where A >= 0, A * max(ratio, 1 - low) where A < 0. An
    # infinite ratio then has the value and the gradient of the formula; after exp its gradient would be 0 * inf = NaN.
    at_most = log_ratio.clamp(max=math.log1p(clip_high))
    at_least = log_ratio.clamp(min=math.log1p(-clip_low) if clip_low < 1 else -math.inf)
    return torch.where(advantages >= 0, at_most, at_least).exp() * advantages


def cispo_objective(
    log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """sg(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * log pi: the *weight* is clipped, every token keeps a gradient.

    ``clip_low`` 1 bounds the weight on one side only. Source: CISPO (MiniMax-M1), arXiv 2506.13585, eq. 4 and 5.
    """
    bounded = log_ratio.detach().clamp(math.log1p(-clip_low) if clip_low < 1 else -math.inf, math.log1p(clip_high))
    return bounded.exp() * advantages * logprobs
