"""The size of micro-batches: found on the GPU, halved when memory runs out; it never changes the result.

Memory of a backward pass grows with the tokens in the language model and, where the vision tower learns, with the
patches in it. Both are counted in one unit, a token of the language model.
"""

import logging
from collections.abc import Sequence

import torch

from medrl.training.scorer import Scorer

log = logging.getLogger(__name__)
USUAL_TOKENS = 4096
"""Where nothing is measured: on a CPU."""
SHARE_OF_FREE = 0.8
"""Of the memory that is free, the part to plan with: the rest is lost between tensors of many sizes."""


class Budget:
    """Tokens and patches that go through the model together."""

    def __init__(self, policy: Scorer, tokens: int | None = None) -> None:
        """``tokens`` None: found at the first step on a GPU, ``USUAL_TOKENS`` elsewhere."""
        self.tokens = tokens
        self.tokens_per_patch = tokens_per_patch(policy)
        if tokens is None and policy.device.type != "cuda":
            self.tokens = USUAL_TOKENS

    def cost(self, tokens: int, patches: int) -> float:
        """In tokens of the language model."""
        return tokens + self.tokens_per_patch * patches

    def find(self, peaks: Sequence[tuple[float, int]], total: float, *, to_stay: int, sums: int) -> None:
        """Set the budget from what passes took, on a GPU.

        Args:
            peaks: cost of a pass, and the bytes it took at most with its gradients; of one group, or of one and of two,
                which tells what grows with the cost from what does not.
            total: cost of the whole step.
            to_stay: bytes that will be allocated later and stay: the optimizer's moments.
            sums: bytes of the gradients' sums, which only a step that is cut keeps.
        """
        (cost, peak), *more = peaks
        per_token = max(1.0, (more[0][1] - peak) / (more[0][0] - cost) if more else peak / cost)
        fixed = max(0.0, peak - per_token * cost)
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - to_stay
        whole = SHARE_OF_FREE * (free - fixed) / per_token
        self.tokens = max(1, int(whole if total <= whole else SHARE_OF_FREE * (free - fixed - sums) / per_token))
        log.info(
            "micro-batches of up to %d tokens (%.2f MB each, %.1f GB free)", self.tokens, per_token / 1e6, free / 1e9
        )

    def halve(self, cost: float) -> None:
        """Half of what was just too much."""
        self.tokens = max(1, int(cost / 2))
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
