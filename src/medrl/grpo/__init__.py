"""Group-relative policy optimization: pure functions of tensors that know no models, files or ranks."""

from medrl.grpo.advantages import group_advantages
from medrl.grpo.kl import k3_kl
from medrl.grpo.losses import REDUCTIONS, LossTerms, clipped_policy_objective, policy_loss
from medrl.grpo.settings import GRPO

__all__ = [
    "GRPO",
    "REDUCTIONS",
    "LossTerms",
    "clipped_policy_objective",
    "group_advantages",
    "k3_kl",
    "policy_loss",
]
