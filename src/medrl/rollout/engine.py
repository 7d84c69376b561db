"""Prompts -> completions: vision and prompt once per prompt, a static key-value cache, finished sequences dropped.

Rows of the cache are completions. A row's prompt fills the slots ``[0, P_i)``; the slots up to the longest prompt are
masked; completion token t of every row is written to slot ``longest prompt + t``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from medrl import stopping
from medrl.policy.attention import Causal, Masked
from medrl.policy.policy import EncodedPrompt, Policy
from medrl.rollout.sampling import Sampling, draw_tokens, uniforms
from medrl.types import Completion, Prompt

COMPACT_BELOW = 0.75
"""Finished rows are cut out of the cache once fewer than this share of its rows is still writing."""


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    group_size: int = 1,
    seed: int = 0,
    step: int = 0,
    encoded: Sequence[EncodedPrompt] | None = None,
) -> list[list[Completion]]:
    """Complete each prompt ``group_size`` times.

    What is drawn for a prompt depends on (seed, step, prompt id, completion index) alone, not on the rest of the batch.

    Args:
        encoded: the prompts as ``policy.encode`` made them, when the caller has them already.

    Returns:
        For each prompt, its completions in order.
    """
    if not prompts:
        return []
    encoded = encoded or policy.encode(prompts, room_tokens=sampling.max_new_tokens)
    uniform = torch.tensor(
        [
            uniforms(seed, step, prompt.id, index, sampling.max_new_tokens).tolist()
            for prompt in prompts
            for index in range(group_size)
        ],
        dtype=torch.float64,
        device=policy.device,
    )  # (N * G, limit)
    tokens, logprobs = _decode(policy, encoded, sampling, group_size, uniform)
    completions = [
        Completion(
            text=policy.decode(token_ids),
            token_ids=tuple(token_ids),
            finish_reason="stop" if token_ids[-1] in policy.stop_token_ids else "length",
            mode=prompts[row // group_size].mode,
            sampling_logprobs=tuple(values),
        )
        for row, (token_ids, values) in enumerate(zip(tokens, logprobs, strict=True))
    ]
    return [completions[start : start + group_size] for start in range(0, len(completions), group_size)]


def _decode(
    policy: Policy, encoded: Sequence[EncodedPrompt], sampling: Sampling, group_size: int, uniform: Tensor
) -> tuple[list[list[int]], list[list[float]]]:
    """Token ids and log-probabilities of N * G completions, each up to and including its end-of-turn token."""
    device, limit = policy.device, sampling.max_new_tokens
    rows = len(encoded) * group_size
    logits, cache = _prefill(policy, encoded, group_size, limit)  # (R, V)
    mask = _prompt_mask(encoded, group_size, cache.width, device)  # (R, slots)
    next_position = torch.tensor([prompt.next_position for prompt in encoded], device=device)
    next_position = next_position.repeat_interleave(group_size)  # (R,)
    prompt_slots = cache.slot
    stops = torch.tensor(policy.stop_token_ids, device=device)

    written = torch.zeros(rows, limit, dtype=torch.long, device=device)
    written_logprobs = torch.zeros(rows, limit, device=device)
    lengths = torch.full((rows,), limit, device=device)
    here = torch.arange(rows, device=device)  # which completion each row of the cache is writing
    alive = torch.ones(rows, dtype=torch.bool, device=device)  # of the rows of the cache

    for t in range(limit):
        stopping.check()
        tokens, logprobs = draw_tokens(logits, uniform[here, t], sampling)  # (rows in cache,)
        written[here[alive], t] = tokens[alive]
        written_logprobs[here[alive], t] = logprobs[alive]
        ended = alive & torch.isin(tokens, stops)
        lengths[here[ended]] = t + 1
        alive = alive & ~ended
        n_alive = int(alive.sum())
        if n_alive == 0 or t + 1 == limit:
            break
        if n_alive < COMPACT_BELOW * len(alive):
            keep = alive.nonzero().squeeze(1)
            cache.keep_rows(keep)
            here, tokens, mask, next_position = here[keep], tokens[keep], mask[keep], next_position[keep]
            alive = alive[keep]
        mask[:, prompt_slots + t] = True
        positions = (next_position + t).expand(3, -1)[..., None]  # (3, rows, 1)
        visibility = Masked(mask[:, None, None, : prompt_slots + t + 1])
        hidden = policy.family.hidden(policy.family.embed(tokens[:, None]), positions, visibility, cache)
        logits = hidden[:, -1] @ policy.family.head.t()
    counts = lengths.tolist()
    return (
        [row[:n] for row, n in zip(written.tolist(), counts, strict=True)],
        [row[:n] for row, n in zip(written_logprobs.tolist(), counts, strict=True)],
    )


def _prefill(
    policy: Policy, encoded: Sequence[EncodedPrompt], group_size: int, room: int
) -> tuple[Tensor, "KeyValueCache"]:
    """Run every prompt once. Returns the logits after it and the cache, both repeated ``group_size`` times."""
    lengths = [len(prompt.token_ids) for prompt in encoded]
    longest = max(lengths)
    flat = policy.embed_prompts(encoded)  # (sum of P, H)
    embedded = flat.new_zeros(len(encoded), longest, flat.shape[-1])
    positions = torch.zeros(3, len(encoded), longest, dtype=torch.long, device=flat.device)
    for n, (part, prompt) in enumerate(zip(flat.split(lengths), encoded, strict=True)):
        embedded[n, : len(part)] = part
        positions[:, n, : len(part)] = prompt.positions.to(flat.device)
    cache = KeyValueCache(policy, len(encoded), longest + room)
    # Padding is on the right: causal attention alone keeps it out of every real token.
    hidden = policy.family.hidden(embedded, positions, Causal(), cache)
    last = hidden[torch.arange(len(encoded)), torch.tensor(lengths, device=hidden.device) - 1]  # (N, H)
    cache.keep_rows(torch.arange(len(encoded), device=hidden.device).repeat_interleave(group_size))
    return (last @ policy.family.head.t()).repeat_interleave(group_size, dim=0), cache


def _prompt_mask(encoded: Sequence[EncodedPrompt], group_size: int, width: int, device: torch.device) -> Tensor:
    """(R, slots) True where a row's own prompt is."""
    lengths = torch.tensor([len(prompt.token_ids) for prompt in encoded], device=device)
    return (torch.arange(width, device=device) < lengths[:, None]).repeat_interleave(group_size, dim=0)


class KeyValueCache:
    """A static cache with transformers' ``update``: room for every token is made once, tokens are written in place."""

    def __init__(self, policy: Policy, rows: int, width: int) -> None:
        layers, heads, head_width = policy.family.cache_shape
        shape = (layers, rows, heads, width, head_width)
        self.keys = torch.zeros(shape, dtype=policy.family.head.dtype, device=policy.device)
        self.values = torch.zeros_like(self.keys)
        self.layers = layers
        self.width = width
        self.slot = 0
        """Slots written so far."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        end = self.slot + key.shape[2]
        self.keys[layer_idx][:, :, self.slot : end] = key
        self.values[layer_idx][:, :, self.slot : end] = value
        if layer_idx == self.layers - 1:
            self.slot = end
        return self.keys[layer_idx][:, :, :end], self.values[layer_idx][:, :, :end]

    def get_seq_length(self, *_: object) -> int:
        return self.slot

    def keep_rows(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
