"""Qwen2-VL: a vision transformer whose merged patches replace ``<|image_pad|>`` tokens; three-axis rotary positions."""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from medrl.errors import PolicyError
from medrl.policy.attention import NAME, Visibility


class Qwen2VL:
    """The parts of a Qwen2-VL that the policy and the rollout engine work with."""

    def __init__(self, model: Qwen2VLForConditionalGeneration) -> None:
        config: Any = model.config  # transformers types its parts as optional dicts
        text_config = config.text_config
        if set(text_config.layer_types) != {"full_attention"}:
            raise PolicyError(
                "this Qwen2-VL uses sliding-window attention, which packed training cannot share prefixes under: "
                "set use_sliding_window to false in its config.json"
            )
        # Our own attention in the language model; the vision tower stays on transformers' SDPA.
        text_config._attn_implementation = NAME
        config.vision_config._attn_implementation = "sdpa"
        blocks: Any = model.model.visual.blocks
        for block in blocks:
            block.attn.forward = MethodType(attend_to_patches, block.attn)
        self.model: Any = model
        self.image_token_id = int(config.image_token_id)
        self.context_tokens = int(text_config.max_position_embeddings)

    @property
    def vision(self) -> nn.Module:
        return self.model.model.visual

    @property
    def head(self) -> Tensor:
        """(V, H) output embedding."""
        return self.model.lm_head.weight

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, key-value heads, head width."""
        config = self.model.config.text_config
        return (
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.hidden_size // config.num_attention_heads,
        )

    def positions(self, token_ids: Tensor, grids: Tensor) -> Tensor:
        """(P,) token ids, (images, 3) patch grids -> (3, P) rotary positions."""
        is_image = (token_ids == self.image_token_id).int()
        positions, _ = self.model.model.get_rope_index(
            token_ids[None], mm_token_type_ids=is_image[None], image_grid_thw=grids if len(grids) else None
        )
        return positions[:, 0]

    def image_features(self, pixels: Tensor, grids: Tensor) -> Tensor:
        """(patches, patch values), (images, 3) -> (image tokens, H): one pass for all images."""
        return self.vision(pixels, grid_thw=grids).pooler_output

    def embed(self, token_ids: Tensor) -> Tensor:
        """(...,) token ids -> (..., H)."""
        return self.model.get_input_embeddings()(token_ids)

    def embed_prompts(self, token_ids: Tensor, pixels: Sequence[Tensor], grids: Sequence[Tensor]) -> Tensor:
        """(tokens,) of prompts end to end, their images in the same order -> (tokens, H), images in their places."""
        embedded = self.embed(token_ids)
        if not pixels:
            return embedded
        parameter = self.head
        features = self.image_features(
            torch.cat(list(pixels)).to(parameter.device, parameter.dtype), torch.cat(list(grids))
        )
        places = (token_ids == self.image_token_id)[:, None]
        assert int(places.sum()) == len(features), "every image token has its feature"
        return embedded.masked_scatter(places, features.to(embedded.dtype))

    def hidden(
        self, embedded: Tensor, positions: Tensor, visibility: Visibility, cache: object | None = None
    ) -> Tensor:
        """(B, T, H) inputs, (3, B, T) positions -> (B, T, H) last hidden states."""
        output = self.model.model.language_model(
            inputs_embeds=embedded,
            position_ids=positions,
            attention_mask={"full_attention": visibility},
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state


def attend_to_patches(
    attention: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: object
) -> Tensor:
    """The vision tower's attention with one call for all images of a size, where transformers makes one per image.

    Args:
        attention: a ``VisionAttention`` module, in whose place this stands.
        hidden_states: (patches, width), the images end to end.
        cu_seqlens: (images + 1,) where each image begins.
        position_embeddings: cosine and sine (patches, head width).
    """
    patches = hidden_states.shape[0]
    qkv = attention.qkv(hidden_states).view(patches, 3, attention.num_heads, -1)
    cos, sin = position_embeddings
    query, key = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], cos, sin)
    lengths = cu_seqlens.diff()
    images = len(lengths)
    same_size = images * int(lengths[0]) == patches and bool((lengths == lengths[0]).all())
    if same_size:
        batches = [tuple(x.view(images, -1, *x.shape[1:]) for x in (query, key, qkv[:, 2]))]
    else:
        batches = [
            tuple(part[None] for part in parts)
            for parts in zip(*(x.split(lengths.tolist()) for x in (query, key, qkv[:, 2])), strict=True)
        ]
    attended = [
        F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=attention.scaling)
        .transpose(1, 2)
        .reshape(-1, attention.num_heads * q.shape[-1])
        for q, k, v in batches
    ]
    return attention.proj(torch.cat(attended))
