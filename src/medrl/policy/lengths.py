"""How long prompts are, from their texts and the sizes of their images: no pixel is decoded, so all can be checked."""

from collections.abc import Sequence

from medrl.data.images import stored_size
from medrl.errors import PromptTooLongError
from medrl.policy.policy import Policy
from medrl.types import Prompt


def prompt_lengths(policy: Policy, prompts: Sequence[Prompt]) -> list[int]:
    """Tokens of each prompt, as ``policy.encode`` would make them.

    Raises ``ImageError`` when an image is missing, or not what can be opened.
    """
    if not prompts:
        return []
    images = {path: _image_tokens(policy, *stored_size(path)) for prompt in prompts for path in prompt.images}
    turns = policy.processor.apply_chat_template(
        [_turn(prompt) for prompt in prompts], add_generation_prompt=True, tokenize=False
    )
    return [
        # A turn has one placeholder for each image already.
        len(token_ids) + sum(images[path] - 1 for path in prompt.images)
        for token_ids, prompt in zip(policy.processor.tokenizer(turns)["input_ids"], prompts, strict=True)
    ]


def check_room(policy: Policy, prompts: Sequence[Prompt], room_tokens: int) -> None:
    """Raise ``PromptTooLongError`` naming the longest when a prompt and ``room_tokens`` more do not fit the context."""
    lengths = prompt_lengths(policy, prompts)
    too_long = [row for row, length in enumerate(lengths) if length + room_tokens > policy.family.context_tokens]
    if too_long:
        longest = max(too_long, key=lambda row: lengths[row])
        try:
            policy.encode([prompts[longest]], room_tokens=room_tokens)
        except PromptTooLongError as error:
            raise PromptTooLongError(f"{len(too_long)} of {len(prompts)} prompts are too long; {error}") from error
        raise AssertionError("a prompt is as long as it was counted")


def _turn(prompt: Prompt) -> list[dict[str, object]]:
    content = [*({"type": "image"} for _ in prompt.images), {"type": "text", "text": prompt.text}]
    return [{"role": "user", "content": content}]


def _image_tokens(policy: Policy, width: int, height: int) -> int:
    """The same for a picture on its side, so EXIF orientation does not matter."""
    processor = policy.processor.image_processor
    # The third argument may be left out only from transformers 5.20 or so on.
    return processor.get_number_of_image_patches(height, width, {}) // processor.merge_size**2
