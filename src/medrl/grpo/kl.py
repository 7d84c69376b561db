"""Distance of the policy from its reference, estimated per token from log-probabilities alone.

``(R, T)`` nats in and out, for tokens sampled by the policy. Source of the names: Schulman, "Approximating KL
divergence" (2020).
"""

import torch
from torch import Tensor


def k3_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(ref - lp) - (ref - lp) - 1: unbiased, and never negative; 0 where the two agree.

    Source: Schulman, estimator k3; DeepSeekMath, arXiv 2402.03300, eq. 4.
    """
    log_ratio = ref_logprobs - logprobs
    # expm1(x) - x keeps the digits that exp(x) - x - 1 loses near 0, where the policy starts. The clamp is for devices
    # whose expm1 is off by an ulp.
    return (torch.expm1(log_ratio) - log_ratio).clamp(min=0.0)


def k2_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(lp - ref)^2 / 2: biased, but its gradient on policy is that of the KL itself.

    Source: Schulman, estimator k2; as a loss: REINFORCE++ with baseline, arXiv 2501.03262.
    """
    return (logprobs - ref_logprobs).square() / 2


def k1_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """lp - ref: unbiased, negative for some tokens. Summed over a completion it is what a KL *in the reward* takes off.

    Source: Schulman, estimator k1; in the reward: RLOO, arXiv 2402.14740, eq. 1.
    """
    return logprobs - ref_logprobs
