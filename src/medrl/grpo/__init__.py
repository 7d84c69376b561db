"""Group-relative policy optimization: pure functions of tensors that know no models, files or ranks."""

from medrl.grpo.advantages import (
    balance_advantages,
    batch_advantages,
    centered_advantages,
    domain_scales,
    group_advantages,
    group_then_batch_advantages,
    leave_one_out_advantages,
    overlong_penalty,
)
from medrl.grpo.algorithms import ALGORITHMS, Algorithm
from medrl.grpo.kl import k1_kl, k2_kl, k3_kl
from medrl.grpo.losses import REDUCTIONS, LossTerms, policy_loss, sampling_weights
from medrl.grpo.objectives import cispo_objective, clipped_objective, on_policy_objective
from medrl.grpo.settings import GRPO

__all__ = [
    "ALGORITHMS",
    "GRPO",
    "REDUCTIONS",
    "Algorithm",
    "LossTerms",
    "balance_advantages",
    "batch_advantages",
    "centered_advantages",
    "cispo_objective",
    "clipped_objective",
    "domain_scales",
    "group_advantages",
    "group_then_batch_advantages",
    "k1_kl",
    "k2_kl",
    "k3_kl",
    "leave_one_out_advantages",
    "on_policy_objective",
    "overlong_penalty",
    "policy_loss",
    "sampling_weights",
]
