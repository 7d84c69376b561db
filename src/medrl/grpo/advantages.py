"""Rewards of groups -> advantages: how much better a completion was than the others of its prompt."""

from collections.abc import Sequence

import torch
from torch import Tensor

from medrl.errors import NonFiniteError, RewardError

SPREAD_FLOOR = 1e-4
"""Added to the standard deviation, as in TRL 0.14, which both papers used."""


def group_advantages(rewards: Sequence[Sequence[float]] | Tensor) -> Tensor:
    """Advantage of each completion: (reward - mean of its group) / (standard deviation of its group + 1e-4).

    Takes ``(N, G)`` rewards, gives ``(N, G)`` float64 on the CPU or the device the rewards were on. A group whose
    rewards are all equal gives exactly 0: it teaches nothing. Source: DeepSeekMath, arXiv 2402.03300, section 4.1.2,
    with the unbiased standard deviation and the floor of TRL 0.14.

    Raises ``NonFiniteError`` for a reward that is NaN or infinite, ``RewardError`` for groups of unequal size or fewer
    than 2 completions.
    """
    rewards = _as_matrix(rewards)
    finite = rewards.isfinite()
    if not finite.all():
        group, member = (~finite).nonzero()[0].tolist()
        raise NonFiniteError(
            f"the reward of completion {member} of group {group} is {rewards[group, member].item()}; "
            "a reward must be a finite number: look at the reward's parts for that completion"
        )
    # float64, and the equal case by name: in float32 eight rewards of 1.2 differ from their mean by a rounding error
    # that the division by a tiny spread turns into a signal.
    centered = rewards - rewards.mean(dim=-1, keepdim=True)
    spread = rewards.std(dim=-1, correction=1, keepdim=True)
    all_equal = (rewards == rewards[:, :1]).all(dim=-1, keepdim=True)
    return (centered / (spread + SPREAD_FLOOR)).masked_fill(all_equal, 0.0)


def _as_matrix(rewards: Sequence[Sequence[float]] | Tensor) -> Tensor:
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
    return rewards.to(torch.float64)
