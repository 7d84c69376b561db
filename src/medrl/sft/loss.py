"""The loss of supervised fine-tuning."""

import torch
from torch import Tensor


def cross_entropy(logprobs: Tensor, completion_mask: Tensor, weights: Tensor) -> Tensor:
    """Mean negative log-likelihood of the answer tokens, in nats (lower is better).

    ``(R, T)`` log-probabilities of the target tokens and mask (1 = an answer token; prompt and image tokens are none),
    ``(R, 1)`` weights from ``medrl.grpo.REDUCTIONS`` over the whole step: ``token`` gives the mean over all tokens,
    ``sequence`` the mean over answers of each answer's mean. A micro-batch gives its share; the shares of a step add up
    to the mean. Where the mask is 0 the log-probabilities may hold anything, NaN included. Computed in float32, or in
    float64 when ``logprobs`` are.
    """
    counts = completion_mask.bool()
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    # Padding is cleared before the product: 0 * inf would be NaN.
    return -(torch.where(counts, logprobs, 0.0).to(dtype) * weights.to(dtype)).sum()
