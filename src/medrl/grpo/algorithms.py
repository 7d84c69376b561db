"""The algorithms, in one table: what each takes for the advantage, the ratio, the objective and the KL.

    loss = sum over completions i and tokens t of  weight_i * (-objective_it + kl_coef * kl_it) - entropy_coef * mean
    entropy

A row says where an algorithm differs; ``losses.policy_loss`` puts it together. ``docs/grpo.md`` has a section on each.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from medrl.grpo.advantages import (
    Rewards,
    batch_advantages,
    centered_advantages,
    group_advantages,
    group_then_batch_advantages,
    leave_one_out_advantages,
)
from medrl.grpo.kl import k2_kl, k3_kl
from medrl.grpo.objectives import (
    cispo_objective,
    clipped_objective,
    mean_log_ratio,
    on_policy_objective,
    summed_log_ratio,
    token_log_ratio,
)

AlgorithmName = Literal[
    "paper", "grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce++", "reinforce++_baseline", "cispo"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """One row: how rewards become a loss."""

    source: str
    advantages: Callable[[Rewards], Tensor] = group_advantages
    """(N, G) rewards -> (N, G)."""
    log_ratio: Callable[[Tensor, Tensor, Tensor], Tensor] = token_log_ratio
    """(logprobs, old_logprobs, counts) -> (R, T), or (R, 1) where a completion has one ratio."""
    objective: Callable[[Tensor, Tensor, Tensor, float, float], Tensor] = clipped_objective
    """(log_ratio, logprobs, advantages, clip_low, clip_high) -> what grows."""
    kl: Callable[[Tensor, Tensor], Tensor] = k3_kl
    """(logprobs, ref_logprobs) -> (R, T), the estimator in the loss."""
    kl_in_reward: bool = False
    """The KL is taken off the reward before advantages are made (k1, summed over the completion), not added to the
    loss."""
    on_policy: bool = False
    """Only one update per rollout makes sense."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Settings in which it differs from ``GRPO``'s own defaults."""

    @property
    def by_completion(self) -> bool:
        """A completion has one ratio, so its tokens cannot be weighed one by one."""
        return self.log_ratio is not token_log_ratio


ALGORITHMS: dict[AlgorithmName, Algorithm] = {
    "paper": Algorithm(
        source="Med-R1, arXiv 2503.13939, and MedVLM-R1, arXiv 2502.19634: TRL 0.14's GRPO",
        objective=on_policy_objective,
        on_policy=True,
        defaults={"group_size": 4},
    ),
    "grpo": Algorithm(
        source="DeepSeekMath, arXiv 2402.03300, eq. 3",
    ),
    "dr_grpo": Algorithm(
        source="Dr. GRPO, arXiv 2503.20783",
        advantages=centered_advantages,
        defaults={"reduction": "constant", "kl_coef": 0.0},
    ),
    "dapo": Algorithm(
        source="DAPO, arXiv 2503.14476",
        defaults={
            "reduction": "token", "clip_high": 0.28, "kl_coef": 0.0, "dynamic_sampling": 4, "overlong_share": 0.2,
        },
    ),
    "gspo": Algorithm(
        source="GSPO, arXiv 2507.18071",
        log_ratio=mean_log_ratio,
        defaults={"clip_low": 3e-4, "clip_high": 4e-4, "kl_coef": 0.0},
    ),
    "rloo": Algorithm(
        source="RLOO, arXiv 2402.14740",
        advantages=leave_one_out_advantages,
        log_ratio=summed_log_ratio,
        kl_in_reward=True,
        defaults={"kl_coef": 0.05},
    ),
    "reinforce++": Algorithm(
        source="REINFORCE++, arXiv 2501.03262",
        advantages=batch_advantages,
        kl_in_reward=True,
        defaults={"reduction": "token", "kl_coef": 0.0},
    ),
    "reinforce++_baseline": Algorithm(
        source="REINFORCE++ with baseline, arXiv 2501.03262",
        advantages=group_then_batch_advantages,
        kl=k2_kl,
        defaults={"reduction": "token", "kl_coef": 0.0},
    ),
    "cispo": Algorithm(
        source="CISPO (MiniMax-M1), arXiv 2506.13585",
        objective=cispo_objective,
        defaults={"reduction": "token", "clip_low": 1.0, "clip_high": 4.0, "kl_coef": 0.0},
    ),
}  # fmt: skip
