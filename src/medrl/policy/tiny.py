"""A very small Qwen2-VL built from code: the real architecture class and processor, for tests, examples and the demo.

    processor = train_processor(texts, image_px=112)
    model = build_model(processor, seed=0)

The tokenizer is a byte-level BPE trained on the given texts, so any string can be written, and strings like those texts
are short. Special tokens have Qwen2-VL's own names; the reasoning and answer tags are ordinary tokens of their own.
"""

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAG_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")

# Qwen2-VL's chat format without its default system turn, which a model of this size would only pay for.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_processor(texts: Iterable[str], *, vocab_size: int = 1024, image_px: int = 112) -> Qwen2VLProcessor:
    """A Qwen2-VL processor whose tokenizer is trained on ``texts``; every image becomes ``image_px`` squared pixels.

    ``image_px`` 112 gives 8 x 8 patches, 16 image tokens; ``vocab_size`` is an upper bound.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(TAG_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tags: Any = [AddedToken(tag, special=False, normalized=False) for tag in TAG_TOKENS]
    fast.add_tokens(tags)
    fast.chat_template = CHAT_TEMPLATE
    # One pixel of slack on either side, so that a square image becomes image_px and not the next multiple of 28 below.
    pixels: Any = {"min_pixels": (image_px - 1) ** 2, "max_pixels": (image_px + 1) ** 2}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=fast,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    processor: Qwen2VLProcessor,
    *,
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 512,
    vision_hidden: int = 128,
    vision_layers: int = 3,
    vision_heads: int = 4,
    context_tokens: int = 2048,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Qwen2VLForConditionalGeneration:
    """A randomly initialised Qwen2-VL, 2.1 million parameters by default; the same seed gives the same weights."""
    tokenizer = processor.tokenizer
    token_id = tokenizer.convert_tokens_to_ids
    # transformers' own 0.02 suits a width of 2,000. At this width it would leave attention flat and learning slow.
    std = hidden**-0.5
    half = hidden // heads // 2
    temporal = half // 4
    height = (half - temporal) // 2
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": intermediate,
            "max_position_embeddings": context_tokens,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [temporal, height, half - temporal - height],
                "rope_theta": 10_000.0,
            },
            "initializer_range": std,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": vision_layers,
            "embed_dim": vision_hidden,
            "hidden_size": hidden,
            "num_heads": vision_heads,
            "mlp_ratio": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": std,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = Qwen2VLForConditionalGeneration(config)
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.to(dtype)
