"""How the next token is drawn: temperature, top-k, top-p, and randomness that depends only on where the draw is."""

import hashlib

import numpy as np
import torch
from pydantic import field_validator
from torch import Tensor
from torch.nn.functional import pad

from medrl.settings import Settings

BLOCK = 128
"""Tokens that are weighed together when one is drawn; divides Qwen2-VL's vocabularies, so that nothing is copied."""


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
    """Draw one token per row by inverting its cumulative distribution: first the block it is in, then its place there.

    Nothing waits for the device and no shape depends on the numbers, so a CUDA graph can hold it.

    Args:
        logits: (B, V), not changed.
        uniform: (B,) float64 in [0, 1), one per row.

    Returns:
        token ids (B,), and their log-probabilities (B,) under the temperature alone: what the training pass computes.
        A row with a NaN gets any token and NaN.
    """
    scores = logits.float()
    if sampling.temperature not in (0, 1):
        scores = scores / sampling.temperature
    blocks = _in_blocks(scores)
    largest, shares, masses = _weigh(blocks)
    total = masses.sum(-1, dtype=torch.float64)
    if sampling.temperature == 0:
        block = largest.argmax(-1)
        place = _of_block(blocks, block).argmax(-1)
    else:
        kept = keep_likely(scores, sampling)
        if kept is not scores:
            _, shares, masses = _weigh(_in_blocks(kept))
        block, within = locate(masses, uniform)
        place, _ = locate(_of_block(shares, block), within)
    # Where the sum is not a number, the place may be one that only fills the last block up.
    tokens = (block * BLOCK + place).clamp(max=scores.shape[-1] - 1)
    logprobs = scores.gather(1, tokens[:, None]).squeeze(1) - largest.amax(-1) - total.log()
    return tokens, logprobs.float()


def locate(masses: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Which of n masses a uniform falls on, were they laid end to end and their sum 1; never on a mass of 0.

    Args:
        masses: (B, n), 0 or more.
        uniform: (B,) float64; what rounding put outside [0, 1) counts as the nearest inside.

    Returns:
        index (B,), and how much of that mass lies before the uniform (B,): again uniform in [0, 1).
    """
    # Summed in float64: the last step of a float32 cumulative sum may stay below a uniform close to 1.
    cumulative = masses.cumsum(-1, dtype=torch.float64)
    # At most two steps below 1: the product with 1 - 2**-53 can round to the sum, and no mass ends beyond that.
    point = uniform.clamp(0, 1 - 2**-52) * cumulative[:, -1]
    # Where the sum is not a number no mass is found, and the last is taken.
    index = torch.searchsorted(cumulative, point[:, None], right=True).clamp(max=masses.shape[-1] - 1)
    after = (cumulative.gather(1, index) - point[:, None]) / masses.gather(1, index)
    return index.squeeze(1), 1 - after.squeeze(1)


def _in_blocks(scores: Tensor) -> Tensor:
    """(B, V) -> (B, N, BLOCK), filled up with -inf; a view where the vocabulary is a multiple of a block."""
    missing = -scores.shape[-1] % BLOCK
    if missing:
        scores = pad(scores, (0, missing), value=-torch.inf)
    return scores.unflatten(1, (-1, BLOCK))


def _weigh(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, BLOCK) scores -> each block's largest (B, N), each token's share of its block's mass, and masses (B, N).

    A mass is the sum of exp(score - the row's largest score).
    """
    largest = blocks.amax(-1)
    shares = blocks.softmax(-1)
    # The likeliest token of a block weighs exp(largest - the row's largest), which is its share of the mass. So three
    # kernels read the vocabulary and one writes it; to subtract, exponentiate and add up takes four and two, and for
    # sums in float64 torch first copies everything to float64.
    masses = (largest - largest.amax(-1, keepdim=True)).exp() / shares.amax(-1)
    return largest, shares, masses.masked_fill(largest == -torch.inf, 0.0)  # no token of the block is possible


def _of_block(x: Tensor, block: Tensor) -> Tensor:
    """(B, N, BLOCK) and one block per row (B,) -> (B, BLOCK)."""
    return x.gather(1, block[:, None, None].expand(-1, 1, BLOCK)).squeeze(1)


def keep_likely(scores: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) logits or log-probabilities -> -inf where top-k or top-p rules a token out; the most likely always stays.

    Gives ``scores`` itself where the settings rule nothing out.
    """
    if sampling.top_k and sampling.top_k < scores.shape[-1]:
        threshold = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < threshold, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = scores.softmax(-1).sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, index, before >= sampling.top_p)
        scores = scores.masked_fill(dropped, -torch.inf)
    return scores
