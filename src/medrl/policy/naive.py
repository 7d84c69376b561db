"""The slow, obvious way: every completion alone behind its own prompt and image, through transformers' own forward.

It is the oracle of ``Policy.logprobs`` and the baseline of its benchmark; nothing in training uses it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from medrl.policy.policy import EncodedPrompt, Policy


def naive_logprobs(
    policy: Policy,
    encoded: Sequence[EncodedPrompt],
    completions: Sequence[Sequence[Sequence[int]]],
    *,
    temperature: float = 1.0,
) -> list[Tensor]:
    """R tensors (T_i,): log-probabilities of each completion, group by group, one full forward pass each."""
    # Not "eager", whose softmax is in float32 also where the weights are in float64.
    with policy.using_attention("sdpa"):
        return [
            _one(policy, prompt, torch.tensor(token_ids, device=policy.device), temperature)
            for prompt, group in zip(encoded, completions, strict=True)
            for token_ids in group
        ]


def _one(policy: Policy, prompt: EncodedPrompt, completion: Tensor, temperature: float) -> Tensor:
    token_ids = torch.cat([prompt.token_ids.to(policy.device), completion])[None]
    images = {} if prompt.pixels is None else {"pixel_values": prompt.pixels, "image_grid_thw": prompt.grids}
    is_image = (token_ids == policy.family.image_token_id).int()
    logits = policy.model(input_ids=token_ids, mm_token_type_ids=is_image, **images).logits[0]  # (P + T, V)
    start = len(prompt.token_ids) - 1
    return (logits[start:-1] / temperature).log_softmax(-1).gather(1, completion[:, None]).squeeze(1)
