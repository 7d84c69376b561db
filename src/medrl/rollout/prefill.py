"""Prompts, before they are completed: all in one packed stream, each once, without padding."""

from collections.abc import Sequence

import torch
from torch import Tensor

from medrl.policy.attention import Visibility
from medrl.policy.layout import pack
from medrl.policy.logprobs import head_logits
from medrl.policy.packed_attention import BACK_ENDS
from medrl.policy.policy import EncodedPrompt, Policy
from medrl.rollout.rows import Prompts

PROMPT_BLOCK = {"cpu": 1, "cuda": 128}
"""Prompts are padded to a multiple of this; on a GPU so that batches of about the same length share captured steps."""


def prefill(policy: Policy, encoded: Sequence[EncodedPrompt]) -> tuple[Tensor, Prompts]:
    """Run every prompt once, all in one stream: (N, V) logits after each, and its keys and values."""
    # A completion of one token adds nothing to the stream, and its predictor is the prompt's last token.
    layout = pack([prompt.positions for prompt in encoded], [[1]] * len(encoded)).to(policy.device)
    embedded = policy.embed_prompts(encoded)  # (sum of P, H)
    recorded = Recording(BACK_ENDS[policy.attention](layout))
    hidden = policy.family.hidden(embedded[None], layout.positions[:, None], recorded)[0]
    logits = head_logits(hidden[layout.predictor], policy.family.head)
    lengths = torch.tensor(layout.prompt_lengths, device=policy.device)[:, None]
    block = PROMPT_BLOCK.get(policy.device.type, 1)
    inside = torch.arange(-(-max(layout.prompt_lengths) // block) * block, device=policy.device)
    there = inside < lengths  # (N, P)
    starts = lengths.cumsum(0) - lengths
    index = (starts + inside).where(there, starts)
    keys, values = (
        torch.stack([layer[:, index].transpose(0, 1) for layer in layers])
        for layers in (recorded.keys, recorded.values)
    )
    return logits, Prompts(keys=keys, values=values, padding=~there[:, None, None])


class Recording:
    """A visibility that remembers the keys and values it is asked with, layer by layer."""

    def __init__(self, visibility: Visibility) -> None:
        self.visibility = visibility
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.keys.append(key[0])
        self.values.append(value[0])
        return self.visibility.attend(query, key, value, scale)
