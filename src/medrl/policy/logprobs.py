"""Log-probabilities of completion tokens straight from hidden states, a chunk of rows at a time.

No ``(tokens, vocabulary)`` tensor outlives its chunk: the backward pass makes the logits again. Sums over the
vocabulary are in float32 (float64 for float64 weights), and so is the sum of the weight's gradient over chunks.
"""

from typing import Any

import torch
from torch import Tensor

from medrl.policy.products import product

HALF = (torch.float16, torch.bfloat16)
CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**27}
"""Logits that exist at a time. On a CPU, what stays in its caches; on a GPU half a gigabyte in float32, 883 tokens of
Qwen2-VL's vocabulary."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    kernels: Any = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token and entropy of its distribution.

    Args:
        hidden: (M, H) hidden state that predicts each token.
        weight: (V, H) output embedding, tied or not.
        targets: (M,) token ids.
        temperature: logits are divided by it, as the sampler did.
        chunk_rows: tokens whose logits exist at a time; None takes as many as ``CHUNK_LOGITS`` allows.
        kernels: ``policy/head_kernels.py``, to go over logits once instead of operation by operation.

    Returns:
        logprobs (M,) and entropy (M,) in nats, both with gradient to ``hidden`` and ``weight``.
    """
    chunk_rows = chunk_rows or max(1, CHUNK_LOGITS.get(hidden.device.type, 2**21) // len(weight))
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, chunk_rows, kernels)  # type: ignore[no-any-return]


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(M, H) hidden states, (V, H) output embedding -> (M, V) logits, float32 at least; the sampler uses it too.

    On a GPU the products of half-precision numbers leave the matrix units in float32: rounded to bfloat16 first, logits
    near 20 would be off by 0.06 and the entropy biased.
    """
    if hidden.is_cuda and hidden.dtype in HALF:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return product(hidden, weight.t()).to(_wide(hidden.dtype))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_rows: int, kernels: Any
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(hidden), dtype=_wide(hidden.dtype), device=hidden.device)
        normalizer, entropy = torch.empty_like(logprobs), torch.empty_like(logprobs)
        measure = statistics if kernels is None else kernels.statistics
        for rows in _chunks(len(hidden), chunk_rows):
            logits = head_logits(hidden[rows], weight)
            logprobs[rows], entropy[rows], normalizer[rows] = measure(logits, targets[rows], temperature)
            del logits  # before the next chunk's are made
        ctx.save_for_backward(hidden, weight, targets, normalizer, entropy)
        ctx.temperature, ctx.chunk_rows, ctx.kernels = temperature, chunk_rows, kernels
        ctx.set_materialize_grads(False)  # an entropy that only is reported costs the backward pass nothing
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizer, entropy = ctx.saved_tensors
        grad, entropy_grad = (torch.zeros_like(normalizer) if grads[0] is None else grads[0]), grads[1]
        grad_hidden = torch.empty_like(hidden)
        # A head that is frozen, as under adapters, is spared a third of the work and its sum of gradients.
        learns = ctx.needs_input_grad[1]
        grad_weight = torch.zeros(weight.shape, dtype=_wide(hidden.dtype), device=weight.device) if learns else None
        dtype = hidden.dtype if hidden.is_cuda else _wide(hidden.dtype)  # what the units that multiply take
        derive = slopes if ctx.kernels is None else ctx.kernels.slopes
        for rows in _chunks(len(hidden), ctx.chunk_rows):
            of_entropy = None if entropy_grad is None else entropy_grad[rows]
            logits = head_logits(hidden[rows], weight)
            grad_logits = derive(
                logits, targets[rows], normalizer[rows], entropy[rows], grad[rows], of_entropy, ctx.temperature, dtype
            )
            grad_hidden[rows] = product(grad_logits.to(hidden.dtype), weight)
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits, hidden[rows])
            del logits, grad_logits  # before the next chunk's are made
        of_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, of_weight, None, None, None, None


def statistics(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(M, V) logits, which are used up -> log-probability of the targets, entropy, log of the sum of exponentials."""
    logits = _heated(logits, temperature)
    largest = logits.amax(-1)
    logits -= largest[:, None]
    weights = logits.exp()  # Z p, for logits whose largest is 0
    total = weights.sum(-1)
    logprobs = logits.gather(1, targets[:, None]).squeeze(1) - total.log()
    # H = log Z - sum p z
    entropy = total.log() - torch.einsum("mv,mv->m", weights, logits) / total
    return logprobs, entropy, largest + total.log()


def slopes(
    logits: Tensor,
    targets: Tensor,
    normalizer: Tensor,
    entropy: Tensor,
    grad: Tensor,
    entropy_grad: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of (M, V) logits, which are used up, given that of log-probabilities and of entropies, each (M,)."""
    logits = _heated(logits, temperature)
    logits -= normalizer[:, None]  # log p
    # d logprob / d logits = onehot - p;  d H / d logits = -p (log p + H)
    slope = grad[:, None]
    if entropy_grad is not None:
        slope = slope + entropy_grad[:, None] * (logits + entropy[:, None])
    grad_logits = logits.exp_().mul_(-slope)
    grad_logits.scatter_add_(1, targets[:, None], grad[:, None])
    return _heated(grad_logits, temperature).to(dtype)


def _heated(logits: Tensor, temperature: float) -> Tensor:
    """Divided in place; most runs have a temperature of 1."""
    return logits if temperature == 1 else logits.div_(temperature)


def _add_product(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Add grad_logits^T hidden to ``total``, in its precision."""
    if hidden.is_cuda and hidden.dtype in HALF:
        # In place: another tensor of that size would be made at the moment when most memory is taken.
        torch.addmm(total, grad_logits.t(), hidden, out_dtype=torch.float32, out=total)
    else:
        total.add_(product(grad_logits.t(), hidden.to(total.dtype)))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
