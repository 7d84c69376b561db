"""The back ends of packed attention, in one table, and the choice among them.

All give the same numbers; they differ in where they run and in what they waste:

    dense   masked blocks, group by group: the oracle; memory grows with the square of a group's length
    varlen  prompt part and completion part apart, merged: no mask at all            (policy/varlen.py)
    flex    one compiled kernel that skips blocks nobody sees; CUDA only: it has no backward on a CPU
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from medrl.errors import PolicyError
from medrl.policy.attention import Visibility, share_heads
from medrl.policy.layout import Layout, visible
from medrl.policy.varlen import HALF, VarlenPacked

log = logging.getLogger(__name__)

FLEX_BLOCK = 128
REMEMBERED_MASKS = 16


class DensePacked:
    """A packed stream as padded groups under a dense mask.

    Groups never attend to each other, so the (T, T) mask is only made block by block: (N, L, L), L the longest group.
    """

    def __init__(self, layout: Layout) -> None:
        device, lengths = layout.group.device, torch.tensor(layout.group_lengths)
        starts = lengths.cumsum(0) - lengths
        inside = torch.arange(max(layout.group_lengths))
        there = inside < lengths[:, None]  # (N, L)
        index = (starts[:, None] + inside).where(there, starts[:, None])  # (N, L), padding repeats a token
        # Where the tokens are among all places is found here: every layer would wait for the device to count them.
        self.index, self.places = index.to(device), there.flatten().nonzero()[:, 0].to(device)
        self.mask = torch.zeros(len(lengths), 1, len(inside), len(inside), dtype=torch.bool, device=device)
        for n in range(len(lengths)):
            block = visible(_group(layout, n))
            self.mask[n, 0, : len(block), : len(block)] = block
        # A padded query attends to itself, so that its softmax is finite; it is dropped again below.
        self.mask |= torch.eye(len(inside), dtype=torch.bool, device=device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        key, value = share_heads(query, key), share_heads(query, value)
        q, k, v = (x[0][:, self.index].transpose(0, 1) for x in (query, key, value))  # (N, heads, L, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=scale)
        return out.transpose(0, 1).flatten(1, 2)[:, self.places][None]  # (1, heads, T, D)


def _group(layout: Layout, n: int) -> Layout:
    start = sum(layout.group_lengths[:n])
    part = slice(start, start + layout.group_lengths[n])
    moved = {name: getattr(layout, name) for name in layout.__dataclass_fields__}
    return Layout(**{**moved, "group": layout.group[part], "branch": layout.branch[part]})


class FlexPacked:
    """FlexAttention over the stream, padded to whole blocks; no copy of keys or values is made for shared heads."""

    _masks: ClassVar[OrderedDict[tuple[Any, ...], BlockMask]] = OrderedDict()

    def __init__(self, layout: Layout) -> None:
        self.tokens = len(layout.group)
        self.padding = -self.tokens % FLEX_BLOCK
        self.mask = self._mask(layout, self.padding)

    @classmethod
    def _mask(cls, layout: Layout, padding: int) -> BlockMask:
        """Made once per layout: the reference, the policy and the next step with equal lengths share it."""
        key = (layout.shape, layout.group.device)
        if key not in cls._masks:
            group = F.pad(layout.group, (0, padding), value=-1)
            branch = F.pad(layout.branch, (0, padding))

            def sees(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return (group[q] == group[k]) & (q >= k) & ((branch[k] == 0) | (branch[k] == branch[q]))

            length = len(group)
            device = str(layout.group.device)
            cls._masks[key] = create_block_mask(sees, None, None, length, length, device=device, BLOCK_SIZE=FLEX_BLOCK)
            while len(cls._masks) > REMEMBERED_MASKS:
                cls._masks.popitem(last=False)
        cls._masks.move_to_end(key)
        return cls._masks[key]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        q, k, v = (F.pad(x, (0, 0, 0, self.padding)) for x in (query, key, value))
        kernel: Any = _compiled_flex() if query.is_cuda else flex_attention
        out = kernel(q, k, v, block_mask=self.mask, scale=scale, enable_gqa=True)
        return out[:, :, : self.tokens]


@cache
def _compiled_flex() -> Any:
    # Completion lengths differ from step to step: one kernel for any number of blocks, not one compilation for each.
    return torch.compile(flex_attention, dynamic=True)


BACK_ENDS: dict[str, Callable[[Layout], Visibility]] = {
    "dense": DensePacked,
    "varlen": VarlenPacked,
    "flex": FlexPacked,
}

PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("varlen",), "cuda": ("varlen", "flex", "dense")}
"""What ``auto`` tries on a device, the fastest first; on any other device it takes ``dense``."""


def choose_back_end(wanted: str, head: Tensor, head_width: int) -> str:
    """The back end to use for a model with this output embedding and head width.

    Raises ``PolicyError`` when the one asked for does not exist or cannot run there, naming those that can.
    """
    able = [name for name in BACK_ENDS if obstacle(name, head.device, head.dtype, head_width) is None]
    if wanted == "auto":
        order = PREFERENCE.get(head.device.type, ("dense",))
        chosen = next(name for name in (*order, "dense") if name in able)
        level = logging.INFO if len(order) > 1 else logging.DEBUG  # a choice among one is no news
        log.log(level, "packed attention: %s (chosen by auto for %s on %s)", chosen, head.dtype, head.device)
        return chosen
    if wanted not in BACK_ENDS:
        raise PolicyError(f"there is no attention back end {wanted!r}: choose auto, {', '.join(BACK_ENDS)}")
    problem = obstacle(wanted, head.device, head.dtype, head_width)
    if problem is not None:
        raise PolicyError(f"the attention back end {wanted} {problem}: choose auto or {' or '.join(able)}")
    return wanted


def obstacle(name: str, device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Why a back end cannot be trained with there; None when it can."""
    if name == "flex":
        if device.type != "cuda":
            return f"has no backward pass on a {device.type}"
        if dtype == torch.float64:
            return "has no float64 kernel"
        if head_width < 16:
            return f"needs a head width of at least 16, not {head_width}"
    if name == "varlen":
        if device.type == "cuda":
            if dtype not in HALF:
                return f"has no {str(dtype).removeprefix('torch.')} kernel on a GPU, only float16 and bfloat16"
            if torch.cuda.get_device_capability(device) < (8, 0):
                return "needs a GPU of compute capability 8.0 or later"
            if head_width % 8 or head_width > 256:
                return f"needs a head width that is a multiple of 8 and at most 256, not {head_width}"
        elif device.type != "cpu":
            return f"has no kernel on a {device.type}"
    return None
