"""How the next token is drawn: temperature, top-k, top-p, and randomness that depends only on where the draw is."""

import hashlib

import numpy as np
import torch
from pydantic import field_validator
from torch import Tensor

from medrl.settings import Settings


class Sampling(Settings):
    """How completions are sampled."""

    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy."""
    top_p: float = 1.0
    """Keep the most likely tokens that together reach this probability; 1 keeps all."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""
    max_new_tokens: int = 256
    """Longest completion; what is cut off there counts as truncated."""

    @field_validator("temperature")
    @classmethod
    def _warm_or_greedy(cls, value: float) -> float:
        if value < 0:
            raise ValueError(f"temperature is {value:g}, but it must be 0 (greedy) or more")
        return value

    @field_validator("top_p")
    @classmethod
    def _some_probability_is_kept(cls, value: float) -> float:
        if not 0 < value <= 1:
            raise ValueError(f"top_p is {value:g}, but it must be above 0 and at most 1")
        return value

    @field_validator("top_k")
    @classmethod
    def _not_negative(cls, value: int) -> int:
        if value < 0:
            raise ValueError(f"top_k is {value}, but it must be 0 (keep all) or more")
        return value

    @field_validator("max_new_tokens")
    @classmethod
    def _at_least_one(cls, value: int) -> int:
        if value < 1:
            raise ValueError(f"max_new_tokens is {value}, but a completion needs at least 1 token")
        return value


def uniforms(seed: int, step: int, prompt_id: str, index: int, count: int) -> np.ndarray:
    """(count,) numbers in [0, 1), a pure function of run seed, step, prompt and completion index.

    So a completion does not depend on the batch it travelled in, on the machine count, or on whether the run was
    resumed. Source of bits: Philox keyed by a hash of the four.
    """
    digest = hashlib.blake2b(f"{seed}\0{step}\0{prompt_id}\0{index}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(count)


def draw_tokens(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting its cumulative distribution.

    Args:
        logits: (B, V).
        uniform: (B,) float64 in [0, 1), one per row.

    Returns:
        token ids (B,), and their log-probabilities (B,) under the temperature alone: what the training pass computes.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        logprobs = logits.log_softmax(-1)
        tokens = logits.argmax(-1)
        return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)
    logprobs = (logits if sampling.temperature == 1 else logits / sampling.temperature).log_softmax(-1)
    # Summed in float64: the last step of a float32 cumulative sum may stay below a uniform close to 1.
    cumulative = keep_likely(logprobs, sampling).exp().cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    tokens = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    # Rounding can point past the end: then the last possible token is meant, which completes the sum. Where the sum is
    # not a number no token does; any is drawn, and its log-probability says so.
    last = torch.searchsorted(cumulative, total).clamp(max=logits.shape[-1] - 1)
    tokens = torch.minimum(tokens, last).squeeze(1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def keep_likely(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) with -inf where top-k or top-p rules a token out; the most likely token always stays."""
    if sampling.top_k and sampling.top_k < logprobs.shape[-1]:
        threshold = logprobs.topk(sampling.top_k, dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < threshold, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logprobs.softmax(-1).sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, index, before >= sampling.top_p)
        logprobs = logprobs.masked_fill(dropped, -torch.inf)
    return logprobs
