"""Rewards of groups -> advantages: how much better a completion was than the others of its prompt, or of its step.

Every function takes ``(N, G)`` rewards, gives ``(N, G)`` float64 where the rewards were, and raises ``NonFiniteError``
for a reward that is NaN or infinite and ``RewardError`` for groups of unequal size or of fewer than 2 completions.
Rewards that are all equal give exactly 0: they teach nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from medrl.errors import NonFiniteError, RewardError

SPREAD_FLOOR = 1e-4
"""Added to the standard deviation, as in TRL 0.14, which both papers used."""

Rewards = Sequence[Sequence[float]] | Tensor


def group_advantages(rewards: Rewards) -> Tensor:
    """(reward - mean of its group) / (standard deviation of its group + 1e-4).

    Source: DeepSeekMath, arXiv 2402.03300, section 4.1.2, with the unbiased standard deviation and the floor of TRL
    0.14.
    """
    rewards = _as_matrix(rewards)
    spread = rewards.std(dim=-1, correction=1, keepdim=True)
    return _centered(rewards) / (spread + SPREAD_FLOOR)


def centered_advantages(rewards: Rewards) -> Tensor:
    """reward - mean of its group: without the division, a group that all but agrees is not made loud.

    Source: Dr. GRPO, arXiv 2503.20783, section 3.
    """
    return _centered(_as_matrix(rewards))


def leave_one_out_advantages(rewards: Rewards) -> Tensor:
    """reward - mean of the *other* rewards of its group = (reward - mean) * G / (G - 1).

    Source: RLOO, arXiv 2402.14740, section 2.
    """
    rewards = _as_matrix(rewards)
    size = rewards.shape[1]
    return _centered(rewards) * (size / (size - 1))


def batch_advantages(rewards: Rewards) -> Tensor:
    """(reward - mean of the step) / (standard deviation over the step + 1e-4): a completion against all others of its
    step.

    A group of equal rewards is not idle here: it is better or worse than the step.
    Source: REINFORCE++, arXiv 2501.03262, global advantage normalization.
    """
    return _normalized_over_step(_as_matrix(rewards))


def group_then_batch_advantages(rewards: Rewards) -> Tensor:
    """reward - mean of its group, divided by the standard deviation of these differences over the step + 1e-4.

    Source: REINFORCE++ with baseline, arXiv 2501.03262.
    """
    return _normalized_over_step(_centered(_as_matrix(rewards)))


def balance_advantages(advantages: Tensor, scales: Tensor) -> Tensor:
    """Advantages made louder for rare and hard domains, then brought back to a standard deviation of 1 over the step.

    ``(N, G)`` advantages and the ``(N,)`` ``domain_scales`` of their prompts. The division keeps the length of the
    step; where every advantage is 0, they stay 0. Source: DRPO (QoQ-Med), arXiv 2506.00711.
    """
    scaled = advantages / scales.to(advantages)[:, None]
    return scaled / (scaled.std(correction=1) + SPREAD_FLOOR * scaled.abs().max()).clamp(
        min=torch.finfo(scaled.dtype).tiny
    )


MEAN_REWARD_FLOOR = 0.05
"""A domain in which nothing succeeds yet is as hard as one with this mean reward; without a floor it would drown the
rest."""


def domain_scales(counts: Sequence[int], mean_rewards: Sequence[float]) -> Tensor:
    """What the advantages of a domain are divided by: sqrt(prompts seen of it) * its mean reward so far.

    ``(D,)`` counts (at least 1) and mean rewards give ``(D,)`` float64. Rare and hard domains have a small scale.
    Source: DRPO (QoQ-Med), arXiv 2506.00711, the domain level; its clusters of questions within a domain are left out,
    and the floor under the mean reward is ours.
    """
    seen = torch.tensor(list(counts), dtype=torch.float64)
    means = torch.tensor(list(mean_rewards), dtype=torch.float64)
    return seen.sqrt() * means.clamp(min=MEAN_REWARD_FLOOR)


def overlong_penalty(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """0 for a completion that ends before the last ``buffer`` tokens below ``limit``, then falling linearly to -1 at
    the limit.

    Token counts of any shape in, float64 of that shape out. ``buffer`` is at least 1.
    Source: DAPO, arXiv 2503.14476, eq. 13 (soft overlong punishment).
    """
    assert 1 <= buffer <= limit, (limit, buffer)
    return ((limit - buffer - lengths.to(torch.float64)) / buffer).clamp(min=-1.0, max=0.0)


def _centered(rewards: Tensor) -> Tensor:
    # float64, and the equal case by name: in float32 eight rewards of 1.2 differ from their mean by a rounding error
    # that the division by a tiny spread turns into a signal.
    all_equal = (rewards == rewards[:, :1]).all(dim=-1, keepdim=True)
    return (rewards - rewards.mean(dim=-1, keepdim=True)).masked_fill(all_equal, 0.0)


def _normalized_over_step(values: Tensor) -> Tensor:
    if bool((values == values.flatten()[0]).all()):
        return torch.zeros_like(values)
    return (values - values.mean()) / (values.std(correction=1) + SPREAD_FLOOR)


def _as_matrix(rewards: Rewards) -> Tensor:
    if not isinstance(rewards, Tensor):
        sizes = [len(group) for group in rewards]
        if len(set(sizes)) > 1:
            raise RewardError(f"groups must have one size, but these have {sizes} rewards")
        rewards = torch.tensor([list(group) for group in rewards], dtype=torch.float64)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise RewardError(
            f"rewards have shape {tuple(rewards.shape)}, but must be (groups, group_size) with a group_size of at "
            "least 2: the advantage of a lone completion is always 0"
        )
    finite = rewards.isfinite()
    if not finite.all():
        group, member = (~finite).nonzero()[0].tolist()
        raise NonFiniteError(
            f"the reward of completion {member} of group {group} is {rewards[group, member].item()}; "
            "a reward must be a finite number: look at the reward's parts for that completion"
        )
    return rewards.to(torch.float64)
