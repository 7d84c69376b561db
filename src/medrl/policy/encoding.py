"""Prompts -> token ids, positions and pixels. No model is needed, so that it can be done in another process."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from medrl.data.images import open_image
from medrl.policy.positions import rotary_positions
from medrl.types import Prompt

REMEMBERED_PIXEL_BYTES, REMEMBERED_PROMPTS = 2**30, 4096
"""Enough for the prompts of two steps: of the one that computes, and of the one that is prepared meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A prompt as the model reads it."""

    id: str
    token_ids: Tensor
    """(P,) image placeholders expanded."""
    positions: Tensor
    """(3, P) rotary positions."""
    pixels: Tensor | None
    """(patches, patch values) of all its images."""
    grids: Tensor
    """(images, 3) patches in time, height, width."""

    @property
    def pixel_bytes(self) -> int:
        return 0 if self.pixels is None else self.pixels.nbytes

    @property
    def next_position(self) -> int:
        """Position of the first completion token, on all three axes."""
        return int(self.positions.max()) + 1


class EncodedPrompts:
    """Those encoded last, as many as fit: a step reads its prompts twice, for the rollouts and for the update."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, EncodedPrompt] = OrderedDict()
        self._pixel_bytes = 0
        self._changing = threading.Lock()

    def get(self, prompt: Prompt) -> EncodedPrompt | None:
        """By what it asks of which images; another example may have asked the same."""
        return self._known.get(_key(prompt))

    def add(self, prompt: Prompt, encoded: EncodedPrompt) -> None:
        """Remember it, and forget the oldest for it where there is no room."""
        with self._changing:
            before = self._known.pop(_key(prompt), None)
            self._known[_key(prompt)] = encoded
            self._pixel_bytes += encoded.pixel_bytes - (before.pixel_bytes if before else 0)
            while len(self._known) > REMEMBERED_PROMPTS or (
                len(self._known) > 1 and self._pixel_bytes > REMEMBERED_PIXEL_BYTES
            ):
                _, oldest = self._known.popitem(last=False)
                self._pixel_bytes -= oldest.pixel_bytes

    def clear(self) -> None:
        """Forget all."""
        with self._changing:
            self._known.clear()
            self._pixel_bytes = 0


def _key(prompt: Prompt) -> str:
    return "\0".join([prompt.text, *map(str, prompt.images)])


class Encodes(Protocol):
    """An encoder, or a process that has one."""

    def encode(self, prompt: Prompt) -> EncodedPrompt: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """A processor, and what else a prompt is encoded with. For one thread: a tokenizer that two use at once fails."""

    processor: Any
    image_token_id: int
    merge_size: int
    """Patches of an image token along height, and along width."""

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Open its images, and tokenize.

        Raises ``ImageError`` when an image cannot be decoded.
        """
        return self.encode_turn(prompt.id, prompt.text, [open_image(path) for path in prompt.images])

    def encode_turn(self, id: str, text: str, images: Sequence[Image]) -> EncodedPrompt:
        """One user turn, images first, as the chat template writes it with the assistant's turn begun."""
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        turn = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        # Nothing is made that is not read: looking for image tokens is left to ``rotary_positions``.
        inputs = self.processor(
            text=[turn], images=list(images) or None, return_tensors="pt", return_mm_token_type_ids=False
        )
        token_ids = inputs["input_ids"][0]
        grids = inputs.get("image_grid_thw", torch.empty(0, 3, dtype=torch.long))
        return EncodedPrompt(
            id=id,
            token_ids=token_ids,
            positions=rotary_positions(token_ids, grids, self.image_token_id, self.merge_size),
            pixels=inputs.get("pixel_values"),
            grids=grids,
        )
