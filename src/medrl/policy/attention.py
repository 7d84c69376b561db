"""The attention function that medrl registers with transformers, and who may attend to whom.

transformers hands a layer's mask through untouched, so the mask slot carries one of our records instead of a tensor:
each knows how to attend, and choosing a back end is choosing a record. A layer that gets no record (plain ``generate``
on a model loaded by medrl) falls to causal attention, which is what a missing mask means in transformers.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

NAME = "medrl"
BY_ITSELF = "attention is a kernel by itself"
"""Where compiled layers are cut."""


class Visibility(Protocol):
    """Who may attend to whom in one forward pass."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """(B, heads, T, D), (B, kv_heads, S, D) twice -> (B, heads, T, D)."""
        ...


@dataclass(frozen=True, slots=True)
class Causal:
    """Every token sees itself and what came before it: prefill of prompts that are padded on the right."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        key, value = share_heads(query, key), share_heads(query, value)
        return F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, scale=scale)


@dataclass(frozen=True, slots=True)
class Masked:
    """An explicit mask: decoding against a cache that has holes."""

    mask: Tensor
    """(B, 1, T, S) True where a query may attend."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        batch, heads, length, width = query.shape
        kv_heads = key.shape[1]
        if length == 1:
            # The query heads that share a key head become rows of one query, so no key is copied.
            grouped = query.reshape(batch, kv_heads, heads // kv_heads, width)
            out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=self.mask, scale=scale)
            return out.reshape(batch, heads, 1, width)
        key, value = share_heads(query, key), share_heads(query, value)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, scale=scale)


def share_heads(query: Tensor, key: Tensor) -> Tensor:
    """Repeat key (or value) heads so that there is one per query head."""
    groups = query.shape[1] // key.shape[1]
    return key if groups == 1 else key.repeat_interleave(groups, dim=1)


@torch.compiler.disable(reason=BY_ITSELF)
def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visibility | Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (B, heads, T, D) -> (B, T, heads, D)."""
    if attention_mask is None:
        attention_mask = Causal()
    elif isinstance(attention_mask, Tensor):
        attention_mask = Masked(attention_mask)
    return attention_mask.attend(query, key, value, scaling).transpose(1, 2), None


AttentionInterface.register(NAME, attention)
