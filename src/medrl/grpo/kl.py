"""Distance of the policy from its reference, estimated per token from log-probabilities alone."""

import torch
from torch import Tensor


def k3_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(policy || reference) per token, from tokens sampled by the policy: exp(ref - lp) - (ref - lp) - 1.

    ``(R, T)`` nats in and out. Unbiased, and never negative; 0 where the two agree.
    Source: Schulman, "Approximating KL divergence" (2020), estimator k3; DeepSeekMath, arXiv 2402.03300, eq. 4.
    """
    log_ratio = ref_logprobs - logprobs
    # expm1(x) - x keeps the digits that exp(x) - x - 1 loses near 0, where the policy starts. The clamp is for devices
    # whose expm1 is off by an ulp.
    return (torch.expm1(log_ratio) - log_ratio).clamp(min=0.0)
