"""The GRPO loss, as pure functions of tensors.

    loss = sum over completions i and tokens t of  weight_i * (-objective_it + kl_coef * kl_it)

The weights are fixed over the whole step before it is cut into micro-batches (and ranks), so that however it is cut,
the parts add up to the same loss and the same gradient. Shapes: R completions, T tokens; a mask is 1 where a token
counts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from medrl.errors import SettingsError
from medrl.grpo.kl import k3_kl
from medrl.grpo.settings import GRPO


@dataclass(frozen=True, slots=True)
class LossTerms:
    """A micro-batch's share of a step's numbers: the shares of all its micro-batches add up to the step's."""

    loss: Tensor
    """() to call ``backward`` on: policy + kl_coef * kl."""
    policy: Tensor
    """() minus the mean clipped objective; detached."""
    kl: Tensor
    """() mean KL to the reference, nats per token, not multiplied by ``kl_coef``; 0 without a reference; detached."""
    clip_fraction: Tensor
    """() share of tokens whose ratio left the clip range in the direction their advantage pushes; detached."""


def clipped_policy_objective(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Clipped surrogate objective of each token (higher is better): min(ratio * A, clip(ratio) * A).

    ``(R, T)`` log-probabilities in nats and ``(R, 1)`` advantages give ``(R, T)``. Once a token's ratio leaves
    [1 - clip_low, 1 + clip_high] in the direction its advantage pushes, it has no gradient.
    Source: Schulman et al. 2017 (PPO), arXiv 1707.06347, eq. 7; in GRPO: DeepSeekMath, arXiv 2402.03300, eq. 3;
    clip_high > clip_low: DAPO, arXiv 2503.14476.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio * advantages, clipped_ratio * advantages)


def sequence_weights(lengths: Tensor) -> Tensor:
    """Every completion counts the same, whatever its length: 1 / (R * length). ``(R,)`` token counts give ``(R, 1)``.

    ``lengths`` are those of the whole step. A completion without tokens weighs 0 and still counts in R: it had its
    turn and said nothing. Source: DeepSeekMath, arXiv 2402.03300, eq. 3.
    """
    lengths = lengths.to(torch.float64).unsqueeze(-1)
    return torch.where(lengths > 0, 1 / (lengths.shape[0] * lengths.clamp(min=1)), 0.0)


def token_weights(lengths: Tensor) -> Tensor:
    """Every token of the step counts the same: 1 / (all tokens). ``(R,)`` token counts give ``(R, 1)``.

    ``lengths`` are those of the whole step. A completion without tokens weighs 0.
    Source: DAPO, arXiv 2503.14476, eq. 8.
    """
    lengths = lengths.to(torch.float64).unsqueeze(-1)
    return torch.where(lengths > 0, 1 / lengths.sum().clamp(min=1), 0.0)


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"sequence": sequence_weights, "token": token_weights}
"""From the lengths of all completions of a step to the weight of each completion's tokens in the loss."""


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    weights: Tensor,
    settings: GRPO,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
) -> LossTerms:
    """The GRPO loss of some completions of a step (lower is better).

    ``logprobs``, ``old_logprobs``, ``ref_logprobs`` and ``completion_mask`` are ``(R, T)``; ``advantages`` and
    ``weights`` (from ``REDUCTIONS``, over the whole step) are ``(R, 1)``. Where the mask is 0 the log-probabilities may
    hold anything, NaN included. Computed in float32, or in float64 when ``logprobs`` are.

    ``old_logprobs=None`` means on-policy, the first update on fresh completions: the ratio is exactly 1 and the
    gradient is that of advantage * log-probability.
    Source: DeepSeekMath, arXiv 2402.03300, eq. 3, with the signs turned.

    Raises ``SettingsError`` when ``kl_coef`` asks for a reference and ``ref_logprobs`` is None.
    """
    if settings.kl_coef > 0 and ref_logprobs is None:
        raise SettingsError(
            f"kl_coef is {settings.kl_coef:g}, which needs ref_logprobs, but none are given; "
            "give them, or set kl_coef to 0 to train without a reference"
        )
    counts = completion_mask.bool()
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    advantages, weights = advantages.to(dtype), weights.to(dtype)
    logprobs = _where_counted(logprobs, counts, dtype)
    old = logprobs.detach() if old_logprobs is None else _where_counted(old_logprobs.detach(), counts, dtype)

    objective = clipped_policy_objective(
        logprobs, old, advantages, clip_low=settings.clip_low, clip_high=settings.clip_high
    )
    token_weight = weights * counts
    policy = -(objective * token_weight).sum()
    loss, kl = policy, torch.zeros_like(policy)
    if ref_logprobs is not None:
        kl = (k3_kl(logprobs, _where_counted(ref_logprobs.detach(), counts, dtype)) * token_weight).sum()
        loss = policy + settings.kl_coef * kl if settings.kl_coef > 0 else policy
    clipped = _clipped(logprobs.detach() - old, advantages, settings)
    return LossTerms(loss, policy.detach(), kl.detach(), (clipped * token_weight).sum())


def _where_counted(logprobs: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros at padding, put there before any arithmetic: 0 * inf would be NaN, in the loss and in its gradient."""
    return torch.where(counts, logprobs, 0.0).to(dtype)


def _clipped(log_ratio: Tensor, advantages: Tensor, settings: GRPO) -> Tensor:
    ratio = log_ratio.exp()
    too_high = (ratio > 1 + settings.clip_high) & (advantages > 0)
    too_low = (ratio < 1 - settings.clip_low) & (advantages < 0)
    return too_high | too_low
