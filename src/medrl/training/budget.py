"""The size of micro-batches: found on the GPU, halved when memory runs out; it never changes the result.

Memory of a backward pass grows with the tokens in the language model and, where the vision tower learns, with the
patches in it. Both are counted in one unit, a token of the language model.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from medrl.training.scorer import Scorer

log = logging.getLogger(__name__)
USUAL_TOKENS = 4096
"""Where nothing is measured: on a CPU."""
SHARE_OF_FREE = 0.8
"""Of the memory that is free, the part to plan with: the rest is lost between tensors of many sizes."""


class Pass(NamedTuple):
    """What a micro-batch took when it went through the model and back."""

    cost: float
    kept: int
    """Bytes kept for the backward pass."""
    peak: int
    """Bytes at the worst moment, its gradients included."""


class Budget:
    """Tokens and patches that go through the model together."""

    def __init__(self, policy: Scorer, tokens: int | None = None) -> None:
        """``tokens`` None: found at the first step on a GPU, ``USUAL_TOKENS`` elsewhere."""
        self.tokens = tokens
        self.whole = 0
        """Cost up to which a step is not cut: more than ``tokens``, as a step that is cut keeps sums of gradients."""
        self.tokens_per_patch = tokens_per_patch(policy)
        if tokens is None and policy.device.type != "cuda":
            self.tokens = USUAL_TOKENS

    def cost(self, tokens: int, patches: int) -> float:
        """In tokens of the language model."""
        return tokens + self.tokens_per_patch * patches

    def of_step(self, cost: float) -> float:
        """What a micro-batch of a step of this cost may cost."""
        return self.whole if cost <= self.whole else self.tokens or 0

    def find(self, passes: Sequence[Pass], *, to_stay: int, sums: int) -> None:
        """Set the budget from what passes took, on a GPU.

        Args:
            passes: of one group, or of one and of two. What is kept grows with the cost; the rest of a peak does not,
                and is gradients where the pass is small.
            to_stay: bytes that will be allocated later and stay: the optimizer's moments.
            sums: bytes of the gradients' sums, which only a step that is cut keeps.
        """
        first, last = passes[0], passes[-1]
        grown = (last.cost - first.cost, last.kept - first.kept) if len(passes) > 1 else (first.cost, first.kept)
        per_token = max(1.0, grown[1] / grown[0])
        fixed = max(0.0, *(taken.peak - per_token * taken.cost for taken in passes))
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - to_stay
        self.whole = max(0, int(SHARE_OF_FREE * (free - fixed) / per_token))
        self.tokens = max(1, int(SHARE_OF_FREE * (free - fixed - sums) / per_token))
        log.info(
            "micro-batches of up to %d tokens, %d where a step is not cut (%.2f MB each, %.1f GB free)",
            self.tokens, self.whole, per_token / 1e6, free / 1e9,
        )  # fmt: skip

    def halve(self, cost: float) -> None:
        """Half of what was just too much."""
        self.tokens, self.whole = max(1, int(cost / 2)), 0
        log.warning("out of memory with %.0f tokens in a micro-batch: going on with at most %d", cost, self.tokens)


def tokens_per_patch(policy: Scorer) -> float:
    """Activations of a patch in the vision tower over those of a token in the language model; 0 where it is frozen.

    Activations go with the outputs of the matrices: 0.57 for Qwen2-VL-2B (0.58, 1.9 MB over 3.3 MB, were measured with
    a prototype of this engine, see ``bench/memory.py``).
    """
    if policy.family.vision_frozen:
        return 0.0
    outputs = [
        sum(m.out_features for layer in layers for m in layer.modules() if isinstance(m, torch.nn.Linear))
        for layers in (policy.family.vision_blocks, policy.family.layers)
    ]
    return outputs[0] / outputs[1]
