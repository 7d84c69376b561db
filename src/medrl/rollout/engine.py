"""Prompts -> completions: vision and prompt once per prompt, rows that never wait for each other.

completions = generate(policy, prompts, sampling, group_size=8, seed=seed, step=step)       # all at once
for finished in complete(policy, prompts, sampling, at_once=64):                            # as they end
"""

import logging
from collections.abc import Iterator, Sequence

import torch

from medrl.errors import PolicyError
from medrl.policy.policy import EncodedPrompt, Policy
from medrl.rollout.sampling import Sampling
from medrl.rollout.scheduler import Encode, Finished, How, Tally, schedule
from medrl.types import Completion, Prompt

log = logging.getLogger(__name__)


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
    """Complete each prompt ``group_size`` times, all at once.

    What is drawn for a prompt depends on (seed, step, prompt id, completion index) alone, not on the rest of the batch.

    Args:
        encoded: the prompts as ``policy.encode`` made them, when the caller has them already.

    Returns:
        For each prompt, its completions in order.
    """
    if not prompts:
        return []
    ready = encoded or policy.encode(prompts, room_tokens=sampling.max_new_tokens)
    batches = complete(
        policy,
        prompts,
        sampling,
        at_once=len(prompts),
        group_size=group_size,
        seed=seed,
        step=step,
        encode=lambda numbers: [ready[number] for number in numbers],
    )
    found = {finished.number: finished.completions for batch in batches for finished in batch}
    return [found[number] for number in range(len(prompts))]


@torch.no_grad()
def complete(
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    at_once: int,
    group_size: int = 1,
    seed: int = 0,
    step: int = 0,
    encode: Encode | None = None,
    tally: Tally | None = None,
) -> Iterator[list[Finished]]:
    """Complete each prompt ``group_size`` times; prompts are handed over as their last completion ends.

    The completions are those of ``generate``, whatever ``at_once`` is.

    Args:
        at_once: ``at_once * group_size`` completions are written at a time; half of that where memory runs out, from
            then on (``policy.tokens_at_once``).
        encode: asked for the next prompts in order; None: ``policy.encode``.
        tally: what to count on.
    """

    def encode_here(numbers: Sequence[int]) -> list[EncodedPrompt]:
        return policy.encode([prompts[number] for number in numbers], room_tokens=sampling.max_new_tokens)

    how = How(policy, prompts, sampling, group_size, seed, step, encode or encode_here, tally or Tally())
    left = dict.fromkeys(range(len(prompts)))
    tokens = group_size * sampling.max_new_tokens  # that a prompt asks room for
    if policy.tokens_at_once is not None:
        at_once = min(at_once, max(1, policy.tokens_at_once // tokens))
    while left:
        at_once = min(at_once, len(left))
        try:
            for finished in schedule(how, list(left), at_once):
                for one in finished:
                    del left[one.number]
                yield finished
            return
        except torch.OutOfMemoryError as error:
            if at_once == 1:
                raise PolicyError(
                    f"the memory is too small for {group_size} completions of example {prompts[next(iter(left))].id} "
                    f"alone (up to {sampling.max_new_tokens} new tokens): lower policy.max_pixels, grpo.group_size or "
                    "sampling.max_new_tokens"
                ) from error
        # Outside of the handler, whose traceback holds the tensors of what failed.
        at_once //= 2
        log.warning("out of memory while completing prompts: going on with %d at a time", at_once)
        policy.tokens_at_once = at_once * tokens
        policy.decode_graphs = None
        if policy.device.type == "cuda":
            torch.cuda.empty_cache()
