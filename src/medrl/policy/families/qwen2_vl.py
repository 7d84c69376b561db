"""Qwen2-VL: a vision transformer whose merged patches replace ``<|image_pad|>`` tokens, and three-axis rotary positions."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration

from medrl.errors import PolicyError
from medrl.policy.attention import NAME, Visibility


class Qwen2VL:
    """The parts of a Qwen2-VL that the policy and the rollout engine work with."""

    def __init__(self, model: Qwen2VLForConditionalGeneration) -> None:
        text_config = model.config.text_config
        if set(text_config.layer_types) != {"full_attention"}:
            raise PolicyError(
                "this Qwen2-VL uses sliding-window attention, which packed training cannot share prefixes under: "
                "set use_sliding_window to false in its config.json"
            )
        # Our own attention in the language model; the vision tower stays on transformers' SDPA.
        text_config._attn_implementation = NAME
        model.config.vision_config._attn_implementation = "sdpa"
        self.model = model
        self.image_token_id = int(model.config.image_token_id)
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
        """(tokens,) of several prompts end to end, their images in the same order -> (tokens, H), images in their places."""
        embedded = self.embed(token_ids)
        if not pixels:
            return embedded
        parameter = self.head
        features = self.image_features(torch.cat(list(pixels)).to(parameter.device, parameter.dtype), torch.cat(list(grids)))
        places = (token_ids == self.image_token_id)[:, None]
        assert int(places.sum()) == len(features), "every image token has its feature"
        return embedded.masked_scatter(places, features.to(embedded.dtype))

    def hidden(self, embedded: Tensor, positions: Tensor, visibility: Visibility, cache: object | None = None) -> Tensor:
        """(B, T, H) inputs, (3, B, T) positions -> (B, T, H) last hidden states."""
        output = self.model.model.language_model(
            inputs_embeds=embedded,
            position_ids=positions,
            attention_mask={"full_attention": visibility},
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state
