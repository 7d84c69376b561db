"""Log-probabilities of completion tokens straight from hidden states, a chunk of rows at a time.

No ``(tokens, vocabulary)`` tensor outlives its chunk: the backward pass makes the logits again. Sums over the
vocabulary are in float32 (float64 for float64 weights), and so is the sum of the weight's gradient over chunks.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 2048


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, chunk_rows: int = CHUNK_ROWS
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token and entropy of its distribution.

    Args:
        hidden: (M, H) hidden state that predicts each token.
        weight: (V, H) output embedding, tied or not.
        targets: (M,) token ids.
        temperature: logits are divided by it, as the sampler did.

    Returns:
        logprobs (M,) and entropy (M,) in nats, both with gradient to ``hidden`` and ``weight``.
    """
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, chunk_rows)  # type: ignore[no-any-return]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_rows: int
    ) -> tuple[Tensor, Tensor]:
        wide = _wide(hidden.dtype)
        logprobs = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        normalizer, entropy = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for rows in _chunks(len(hidden), chunk_rows):
            logits = (hidden[rows] @ weight.t()).to(wide) / temperature
            normalizer[rows] = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - normalizer[rows]
            # H = log Z - sum p z
            entropy[rows] = normalizer[rows] - (logits.softmax(-1) * logits).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, normalizer, entropy)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        ctx.set_materialize_grads(False)  # an entropy that only is reported costs the backward pass nothing
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizer, entropy = ctx.saved_tensors
        grad, entropy_grad = (torch.zeros_like(normalizer) if grads[0] is None else grads[0]), grads[1]
        wide = _wide(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        for rows in _chunks(len(hidden), ctx.chunk_rows):
            logits = (hidden[rows] @ weight.t()).to(wide) / ctx.temperature
            logits -= normalizer[rows, None]  # log p
            # d logprob / d logits = onehot - p;  d H / d logits = -p (log p + H)
            slope = grad[rows, None]
            if entropy_grad is not None:
                slope = slope + entropy_grad[rows, None] * (logits + entropy[rows, None])
            grad_logits = logits.exp().mul_(-slope)
            grad_logits.scatter_add_(1, targets[rows, None], grad[rows, None])
            grad_logits = grad_logits / ctx.temperature
            grad_hidden[rows] = grad_logits.to(hidden.dtype) @ weight
            grad_weight.addmm_(grad_logits.t(), hidden[rows].to(wide))
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
