"""Triton kernels for what the head does with logits: one pass over them forward, one backward.

As torch computes it, a chunk of logits is read and written some eight times in either direction, which for Qwen2-VL's
151,936 words takes longer than the matrix products that make them. Sums are in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# To a type checker Triton's language is not Python, and Triton is not everywhere.
# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false

WORDS = 4096
"""Logits that one program has at a time."""


@triton.jit
def _statistics(logits, targets, logprobs, entropy, normalizer, vocabulary, cold, WORDS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * vocabulary
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)  # sum of exp(z - largest)
    moment = tl.zeros([1], tl.float32)  # sum of exp(z - largest) (z - largest)
    for start in range(0, vocabulary, WORDS):
        at = start + tl.arange(0, WORDS)
        z = tl.load(base + at, mask=at < vocabulary, other=float("-inf")) * cold
        new = tl.maximum(largest, tl.max(z, 0))
        # What was summed under another largest logit; nothing before the first.
        kept = tl.exp(largest - new)
        moved = tl.where(total > 0, (largest - new) * total, 0.0)
        below = z - new
        weights = tl.exp(below)
        moment = kept * (moment + moved) + tl.sum(tl.where(at < vocabulary, weights * below, 0.0), 0)
        total = kept * total + tl.sum(weights, 0)
        largest = new
    log_total = tl.log(total)
    target = tl.load(targets + row)
    z = tl.load(base + target) * cold
    one = tl.arange(0, 1)
    tl.store(logprobs + row + one, z - largest - log_total)
    tl.store(entropy + row + one, log_total - moment / total)
    tl.store(normalizer + row + one, largest + log_total)


def statistics(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(M, V) float32 logits -> log-probability of the targets, entropy, log of the sum of exponentials, each (M,)."""
    logprobs, entropy, normalizer = (torch.empty(len(logits), device=logits.device) for _ in range(3))
    _statistics[(len(logits),)](
        logits, targets, logprobs, entropy, normalizer, logits.shape[1], 1 / temperature, WORDS=WORDS, num_warps=8
    )
    return logprobs, entropy, normalizer


@triton.jit
def _slopes(
    logits, targets, normalizer, entropy, grad, entropy_grad, slopes, vocabulary, cold,
    ENTROPY: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = at < vocabulary
    logp = tl.load(logits + row * vocabulary + at, mask=inside, other=0.0) * cold - tl.load(normalizer + row)
    g = tl.load(grad + row)
    slope = g
    if ENTROPY:
        slope = g + tl.load(entropy_grad + row) * (logp + tl.load(entropy + row))
    # d logprob / d logits = onehot - p;  d H / d logits = -p (log p + H)
    found = tl.where(at == tl.load(targets + row), g, 0.0) - tl.exp(logp) * slope
    tl.store(slopes + row * vocabulary + at, (found * cold).to(slopes.dtype.element_ty), mask=inside)


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
    """Gradient of (M, V) logits in ``dtype``, given that of log-probabilities and, or None, of entropies, each (M,)."""
    found = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    with_entropy = entropy_grad is not None
    rows, vocabulary = logits.shape
    grad = grad.contiguous()  # that of a sum is one number, expanded
    entropy_grad = grad if entropy_grad is None else entropy_grad.contiguous()
    _slopes[(rows, triton.cdiv(vocabulary, WORDS))](
        logits, targets, normalizer, entropy, grad, entropy_grad, found, vocabulary,
        1 / temperature, ENTROPY=with_entropy, WORDS=WORDS, num_warps=8,
    )  # fmt: skip
    return found
