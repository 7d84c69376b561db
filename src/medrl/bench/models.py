"""Models of known shapes with random weights, and prompts of a known length: nothing is downloaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from medrl.errors import SettingsError
from medrl.policy.policy import Policy
from medrl.policy.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS
from medrl.types import Example, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A Qwen2-VL by its numbers."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    vision_hidden: int
    vision_layers: int
    vision_heads: int


SIZES = {
    "tiny": Size(
        hidden=128, layers=2, heads=4, kv_heads=2, intermediate=512, vocabulary=1024, tied=True,
        vision_hidden=64, vision_layers=2, vision_heads=2,
    ),
    "25m": Size(
        hidden=384, layers=8, heads=6, kv_heads=2, intermediate=1536, vocabulary=8192, tied=True,
        vision_hidden=256, vision_layers=6, vision_heads=4,
    ),
    "2b": Size(
        hidden=1536, layers=28, heads=12, kv_heads=2, intermediate=8960, vocabulary=151936, tied=True,
        vision_hidden=1280, vision_layers=32, vision_heads=16,
    ),
    "7b": Size(
        hidden=3584, layers=28, heads=28, kv_heads=4, intermediate=18944, vocabulary=152064, tied=False,
        vision_hidden=1280, vision_layers=32, vision_heads=16,
    ),
}  # fmt: skip
MERGED_PX = 28
"""Width of a merged patch, which is an image token."""
CONTEXT = 32768
"""Tokens of prompt and completion, as in Qwen2-VL."""
ALIASES = {"qwen2-vl-2b": "2b", "qwen2-vl-7b": "7b"}


def find_size(name: str) -> Size:
    """The size of that name. Raises ``SettingsError`` naming those there are."""
    if ALIASES.get(name, name) not in SIZES:
        raise SettingsError(f"there is no model size {name!r}: choose {', '.join([*SIZES, *ALIASES])}")
    return SIZES[ALIASES.get(name, name)]


def merged_side(image_px: int) -> int:
    """Pixels on a side of what is looked at of an image: whole merged patches, ``MERGED_PX`` wide."""
    return MERGED_PX * max(1, image_px // MERGED_PX)


class Endless(Policy):
    """A policy that never ends its turn: every completion is as long as it was asked to be."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return ()


def build_policy(size: Size, image_px: int, device: str, dtype: torch.dtype, attention: str = "auto") -> Endless:
    """A policy of this size with random weights, always the same, whose images are ``image_px`` squared."""
    processor = make_processor(size.vocabulary, image_px)
    model: Any = build_model(size, processor, device, dtype)
    return Endless(model, processor, attention=attention)


def build_model(size: Size, processor: Any, device: str, dtype: torch.dtype) -> Qwen2VLForConditionalGeneration:
    """Qwen2-VL's own class, filled with random weights on the device."""
    token_id = processor.tokenizer.convert_tokens_to_ids
    half = size.hidden // size.heads // 2
    temporal = half // 4
    height = (half - temporal) // 2
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": size.vocabulary,
            "hidden_size": size.hidden,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "intermediate_size": size.intermediate,
            "max_position_embeddings": CONTEXT,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [temporal, height, half - temporal - height],
                "rope_theta": 1e6,
            },
            "tie_word_embeddings": size.tied,
            "bos_token_id": None,
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
        },
        vision_config={
            "depth": size.vision_layers,
            "embed_dim": size.vision_hidden,
            "hidden_size": size.hidden,
            "num_heads": size.vision_heads,
            "mlp_ratio": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=size.tied,
    )
    before = torch.get_default_dtype()
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            model: Any = Qwen2VLForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(before)
    model.tie_weights()
    model.generation_config.eos_token_id = token_id("<|im_end|>")
    model.generation_config.pad_token_id = token_id("<|endoftext|>")
    return model.eval()


def make_processor(vocabulary: int, image_px: int) -> Qwen2VLProcessor:
    """Qwen2-VL's processor over a vocabulary of single characters and fillers; a character is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"<filler {n}>" for n in range(vocabulary - len(letters) - len(SPECIAL_TOKENS))]
    tokenizer = Tokenizer(models.BPE(vocab={text: n for n, text in enumerate(letters + fillers)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    fast.chat_template = CHAT_TEMPLATE
    side = merged_side(image_px)
    pixels: Any = {"min_pixels": (side - 1) ** 2, "max_pixels": (side + 1) ** 2}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=fast,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=CHAT_TEMPLATE,
    )


def question(processor: Any, prompt_tokens: int) -> str:
    """A question that makes a turn of ``prompt_tokens`` text tokens, chat template included, image tokens not."""
    turn = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ""}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    frame = len(processor.tokenizer(turn)["input_ids"]) - 1  # without the image's one token
    if prompt_tokens <= frame:
        raise SettingsError(
            f"--prompt-tokens is {prompt_tokens}, but the chat template alone takes {frame}: give at least {frame + 1}"
        )
    return ("Which organ is shown here? " * prompt_tokens)[: prompt_tokens - frame]


def make_examples(folder: Path, count: int, image_px: int, text: str) -> list[Example]:
    """``count`` examples, each with an image of noise of its own on the disk."""
    examples = []
    for n in range(count):
        path = folder / f"{n}.png"
        pixels = np.random.default_rng(n).integers(0, 256, (image_px, image_px, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, compress_level=1)
        examples.append(
            Example(id=str(n), source="bench", images=(path,), question=text, options=("a", "b"), target="A")
        )
    return examples


def ask(example: Example) -> Prompt:
    """The question as it is."""
    return Prompt(id=example.id, text=example.question, images=example.images, mode="think")
