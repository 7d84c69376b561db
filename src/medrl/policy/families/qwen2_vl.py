"""Qwen2-VL: a vision transformer whose merged patches replace ``<|image_pad|>`` tokens; three-axis rotary positions."""

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from medrl.errors import PolicyError
from medrl.policy.attention import BY_ITSELF, NAME, Visibility
from medrl.policy.positions import rotary_positions
from medrl.policy.products import linear, use_fast_products
from medrl.policy.transfer import bring


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
        patch_embed: Any = model.model.visual.patch_embed
        patch_embed.forward = MethodType(embed_patches, patch_embed)
        use_fast_products(model)
        self.model: Any = model
        self.image_token_id = int(config.image_token_id)
        self.merge_size = int(config.vision_config.spatial_merge_size)
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
        return rotary_positions(token_ids, grids, self.image_token_id, self.merge_size)

    def image_features(self, pixels: Tensor, grids: Tensor) -> Tensor:
        """(patches, patch values), (images, 3) -> (image tokens, H): one pass for all images; a frozen tower keeps no
        graph."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.vision_frozen):
            device, merged = self.head.device, self.model.config.vision_config.spatial_merge_size
            # From grids in main memory: transformers would ask the device for their values, four times.
            planned = {
                "images": Images.of(grids, device),
                "position_ids": bring(get_vision_position_ids(grids, merged), device),
                "cu_seqlens": bring(get_vision_cu_seqlens(grids), device),
            }
            return self.vision(pixels.to(device, self.head.dtype), grid_thw=grids, **planned).pooler_output

    @property
    def vision_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.vision.parameters())

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers of the language model."""
        return list(self.model.model.language_model.layers)

    @property
    def final_norm(self) -> nn.Module:
        return self.model.model.language_model.norm

    @property
    def query_heads(self) -> int:
        return int(self.model.config.text_config.num_attention_heads)

    @property
    def not_fusable(self) -> str | None:
        """What keeps a decode step from being computed as an ordinary Qwen2 layer is; None for ordinary ones."""
        config = self.model.config.text_config
        if config.hidden_act != "silu":
            return f"the kernels know the activation silu, not {config.hidden_act}"
        kind = self.model.model.language_model.rotary_emb.rope_type
        if kind in ("dynamic", "longrope"):
            return f"the kernels do not know rotary positions of type {kind}"
        return None

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(R,) positions, the same on all three axes -> cosine and sine (R, D / 2)."""
        rotary = self.model.model.language_model.rotary_emb
        angles = positions[:, None].float() * rotary.inv_freq.float()
        cos, sin = angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling
        return cos.to(self.head.dtype), sin.to(self.head.dtype)

    @property
    def vision_blocks(self) -> list[nn.Module]:
        return list(self.model.model.visual.blocks)

    def embed(self, token_ids: Tensor) -> Tensor:
        """(...,) token ids -> (..., H)."""
        return self.model.get_input_embeddings()(token_ids)

    def image_tokens(self, grids: Tensor) -> int:
        """How many tokens the images of these grids (images, 3) become."""
        return int(grids.prod(-1).sum()) // self.merge_size**2

    def embed_prompts(self, token_ids: Tensor, features: Tensor | None) -> Tensor:
        """(tokens,) of prompts end to end, features (image tokens, H) in the same order -> (tokens, H)."""
        embedded = self.embed(token_ids)
        if features is None:
            return embedded
        places = (token_ids == self.image_token_id)[:, None]
        return embedded.masked_scatter(places, features.to(embedded.dtype))

    def hidden(self, embedded: Tensor, positions: Tensor, visibility: Visibility) -> Tensor:
        """(B, T, H) inputs, (3, B, T) positions -> (B, T, H) last hidden states."""
        output = self.model.model.language_model(
            inputs_embeds=embedded,
            position_ids=positions,
            attention_mask={"full_attention": visibility},
            use_cache=False,
        )
        return output.last_hidden_state


@dataclass(slots=True)
class Images:
    """Which patches belong together, known before the first layer: no layer has to ask the device.

    Not frozen: the compiler looks into frozen records, and would compile a layer again for every mixture of sizes.
    """

    sizes: tuple[tuple[int, Tensor | None], ...]
    """Patches of an image, and where the patches of all images of that size are; None where that is everywhere."""

    @classmethod
    def of(cls, grids: Tensor, device: torch.device) -> "Images":
        """From (images, 3) patches in time, height, width; each frame is an image of its own."""
        lengths = [h * w for t, h, w in grids.tolist() for _ in range(t)]
        if len(set(lengths)) == 1:
            return cls(((lengths[0], None),))
        starts = [sum(lengths[:n]) for n in range(len(lengths))]
        index = {
            size: torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True) if n == size])
            for size in sorted(set(lengths))
        }
        return cls(tuple((size, bring(where, device)) for size, where in index.items()))


def attend_to_patches(
    attention: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    images: Images | None = None,
    **_: object,
) -> Tensor:
    """The vision tower's attention with one call for all images of a size, where transformers makes one per image.

    Args:
        attention: a ``VisionAttention`` module, in whose place this stands.
        hidden_states: (patches, width), the images end to end.
        cu_seqlens: (images + 1,) where each image begins; read only where ``images`` is not given.
        position_embeddings: cosine and sine (patches, head width).
    """
    if images is None:
        images = _images_between(cu_seqlens)
    qkv = attention.qkv(hidden_states).view(hidden_states.shape[0], 3, attention.num_heads, -1)
    cos, sin = position_embeddings
    query, key = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], cos, sin)
    return _attend_by_size(query, key, qkv[:, 2], attention, images)


@torch.compiler.disable(reason=BY_ITSELF)
def _attend_by_size(query: Tensor, key: Tensor, value: Tensor, attention: Any, images: Images) -> Tensor:
    attended = torch.empty_like(query)
    for size, where in images.sizes:
        q, k, v = (_by_image(x if where is None else x[where], size) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=attention.scaling).transpose(1, 2).flatten(0, 1)
        attended = out if where is None else attended.index_copy(0, where, out)
    # Here, because the compiler would make variants of what follows for one size of images, and for several.
    return attention.proj(attended.flatten(1))


@torch.compiler.disable(reason=BY_ITSELF)
def _images_between(ends: Tensor) -> Images:
    """Where a caller knows no grids, as transformers' own code does not."""
    return Images.of(F.pad(ends.diff()[:, None], (2, 0), value=1), ends.device)


def _by_image(x: Tensor, size: int) -> Tensor:
    """(patches, heads, width) -> (images, heads, patches of an image, width)."""
    return x.view(-1, size, *x.shape[1:]).transpose(1, 2)


def embed_patches(patch_embed: Any, pixels: Tensor) -> Tensor:
    """The convolution over single patches as the matrix product it is: (patches, patch values) -> (patches, width).

    In bfloat16 some cuDNN versions take seconds for the convolution (pytorch issue 174051).
    """
    weight = patch_embed.proj.weight.flatten(1)
    return linear(pixels.to(weight.dtype).view(-1, weight.shape[1]), weight)
