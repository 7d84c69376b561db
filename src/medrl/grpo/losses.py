"""The loss of an algorithm, as pure functions of tensors.

    loss = sum over completions i and tokens t of  weight_i * (-objective_it + kl_coef * kl_it) - entropy_coef * mean
    entropy

Objective and KL are those of the algorithm's row in ``algorithms.py``. The weights are fixed over the whole step before
it is cut into micro-batches (and ranks), so that however it is cut, the parts add up to the same loss and the same
gradient. Shapes: R completions, T tokens; a mask is 1 where a token counts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from medrl.errors import SettingsError
from medrl.grpo.settings import GRPO


@dataclass(frozen=True, slots=True)
class LossTerms:
    """A micro-batch's share of a step's numbers: the shares of all its micro-batches add up to the step's."""

    loss: Tensor
    """() to call ``backward`` on: policy + kl_coef * kl - entropy_coef * entropy."""
    policy: Tensor
    """() minus the mean objective; detached."""
    kl: Tensor
    """() KL to the reference in the weights of the loss, nats per token (``constant``: times length over limit), not
    multiplied by ``kl_coef``; 0 without a reference; detached."""
    clip_fraction: Tensor
    """() share of tokens, in the same weights, whose ratio left the clip range in the direction their advantage
    pushes; detached."""
    kl_per_token: Tensor
    """(R, T) the KL that ``kl`` is the mean of, 0 where nothing counts; detached."""
    clipped_per_token: Tensor
    """(R, T) 1.0 where ``clip_fraction`` counts a token; detached."""
    sampling_weight: Tensor | None = None
    """(R, T) ``sampling_weights``, 0 where nothing counts; None where the sampler needed no correction."""
    sampling_capped: Tensor | None = None
    """(R, T) 1.0 where the weight was cut off at the cap."""


def sequence_weights(lengths: Tensor, max_tokens: int | None = None) -> Tensor:
    """Every completion counts the same, whatever its length: 1 / (R * length). ``(R,)`` token counts give ``(R, 1)``.

    ``lengths`` are those of the whole step. A completion without tokens weighs 0 and still counts in R: it had its
    turn and said nothing. Source: DeepSeekMath, arXiv 2402.03300, eq. 3.
    """
    lengths = lengths.to(torch.float64).unsqueeze(-1)
    return torch.where(lengths > 0, 1 / (lengths.shape[0] * lengths.clamp(min=1)), 0.0)


def token_weights(lengths: Tensor, max_tokens: int | None = None) -> Tensor:
    """Every token of the step counts the same: 1 / (all tokens). ``(R,)`` token counts give ``(R, 1)``.

    ``lengths`` are those of the whole step. A completion without tokens weighs 0.
    Source: DAPO, arXiv 2503.14476, eq. 8.
    """
    lengths = lengths.to(torch.float64).unsqueeze(-1)
    return torch.where(lengths > 0, 1 / lengths.sum().clamp(min=1), 0.0)


def constant_weights(lengths: Tensor, max_tokens: int | None = None) -> Tensor:
    """A completion counts by the sum over its tokens: 1 / (R * max_tokens), however long it and the others are.

    ``(R,)`` token counts of the whole step give ``(R, 1)``; ``max_tokens`` is the longest allowed completion.
    Source: Dr. GRPO, arXiv 2503.20783, section 3 (no length bias). Raises ``SettingsError`` without ``max_tokens``.
    """
    if max_tokens is None:
        raise SettingsError("reduction 'constant' divides by the longest allowed completion: give max_tokens")
    counted = (lengths > 0).to(torch.float64).unsqueeze(-1)
    return counted / (max(1, len(lengths)) * max_tokens)


REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "sequence": sequence_weights,
    "token": token_weights,
    "constant": constant_weights,
}
"""From the lengths of all completions of a step (and the longest allowed) to the weight of each completion's tokens."""


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    weights: Tensor,
    settings: GRPO,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_weight: float = 0.0,
    sampling_logprobs: Tensor | None = None,
) -> LossTerms:
    """The loss of some completions of a step (lower is better), by the algorithm ``settings`` names.

    ``logprobs``, ``old_logprobs``, ``ref_logprobs``, ``entropy`` and ``completion_mask`` are ``(R, T)``; ``advantages``
    and ``weights`` (from ``REDUCTIONS``, over the whole step) are ``(R, 1)``; ``entropy_weight`` is 1 / (tokens of the
    step). Where the mask is 0 the log-probabilities may hold anything, NaN included. Computed in float32, or in float64
    when ``logprobs`` are.

    ``old_logprobs=None`` means on-policy, the first update on fresh completions: the ratio is exactly 1 and the
    gradient is that of advantage * log-probability.

    ``sampling_logprobs`` ``(R, T)`` are given where another program drew the tokens: the objective (not the KL) of each
    is then multiplied with its ``sampling_weights``.
    Source: DeepSeekMath, arXiv 2402.03300, eq. 3, with the signs turned; of the others: their rows.

    Raises ``SettingsError`` when ``kl_coef`` asks for a reference and ``ref_logprobs`` is None, or ``entropy_coef`` for
    the entropy.
    """
    row = settings.row
    kl_coef = 0.0 if row.kl_in_reward else settings.kl_coef
    if kl_coef > 0 and ref_logprobs is None:
        raise SettingsError(
            f"kl_coef is {settings.kl_coef:g}, which needs ref_logprobs, but none are given; "
            "give them, or set kl_coef to 0 to train without a reference"
        )
    if settings.entropy_coef > 0 and entropy is None:
        raise SettingsError(f"entropy_coef is {settings.entropy_coef:g}, which needs the entropy, but none is given")
    counts = completion_mask.bool()
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    advantages, weights = advantages.to(dtype), weights.to(dtype)
    logprobs = _where_counted(logprobs, counts, dtype)
    old = logprobs.detach() if old_logprobs is None else _where_counted(old_logprobs.detach(), counts, dtype)

    log_ratio = row.log_ratio(logprobs, old, counts)
    objective = row.objective(log_ratio, logprobs, advantages, settings.clip_low, settings.clip_high)
    token_weight = weights * counts
    correction = capped = None
    if sampling_logprobs is not None:
        sampled = _where_counted(sampling_logprobs.detach(), counts, dtype)
        correction = sampling_weights(old, sampled, settings.sampling_cap) * counts
        capped = ((old - sampled).detach() > math.log(settings.sampling_cap)).to(dtype)
        objective = objective * correction
    policy = -(objective * token_weight).sum()
    loss, kl, kl_per_token = policy, torch.zeros_like(policy), torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        kl_per_token = row.kl(logprobs, _where_counted(ref_logprobs.detach(), counts, dtype))
        kl = (kl_per_token * token_weight).sum()
        loss = policy + kl_coef * kl if kl_coef > 0 else policy
    if settings.entropy_coef > 0 and entropy is not None:
        loss = loss - settings.entropy_coef * entropy_weight * _where_counted(entropy, counts, dtype).sum()
    clipped = _clipped(log_ratio.detach(), advantages, settings) * counts.to(dtype)
    clip_fraction = (clipped * token_weight).sum()
    return LossTerms(
        loss, policy.detach(), kl.detach(), clip_fraction, kl_per_token.detach(), clipped, correction, capped
    )


def sampling_weights(old_logprobs: Tensor, sampling_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old(o_t) / mu(o_t), cap), without gradient: what a token counts that another program, mu, has drawn.

    Both are ``(R, T)`` nats; pi_old is the policy when its completions were drawn, as the training pass computes it.
    The same weights in another engine are not quite the same distribution, and its draws are off-policy by that much;
    the cap bounds the variance of the correction. Source: truncated importance sampling, Yao et al. 2025, "Your
    Efficient RL Framework Secretly Brings You Off-Policy RL Training" (fengyao.notion.site/off-policy-rl); the idea:
    Ionides 2008.
    """
    # Cut off before exp, so that a token the sampler thought impossible does not become infinite.
    return (old_logprobs - sampling_logprobs).detach().clamp(max=math.log(cap)).exp()


def _where_counted(logprobs: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros at padding, put there before any arithmetic: 0 * inf would be NaN, in the loss and in its gradient."""
    return torch.where(counts, logprobs, 0.0).to(dtype)


def _clipped(log_ratio: Tensor, advantages: Tensor, settings: GRPO) -> Tensor:
    ratio = log_ratio.exp()
    too_high = (ratio > 1 + settings.clip_high) & (advantages > 0)
    too_low = (ratio < 1 - settings.clip_low) & (advantages < 0)
    return too_high | too_low
