"""What a policy remembers of its prompts."""

from pathlib import Path

import torch

from medrl.policy import encoding
from medrl.policy.encoding import EncodedPrompt, EncodedPrompts
from medrl.types import Prompt


def asked(name: str) -> Prompt:
    return Prompt(id=name, text="which?", images=(Path(name),), mode="think")


def encoded(name: str, pixels: int) -> EncodedPrompt:
    nothing = torch.empty(0, dtype=torch.long)
    return EncodedPrompt(id=name, token_ids=nothing, positions=nothing, pixels=torch.empty(pixels), grids=nothing)


def test_the_oldest_are_forgotten_where_pixels_or_prompts_are_too_many(monkeypatch):
    monkeypatch.setattr(encoding, "REMEMBERED_PIXEL_BYTES", 4 * 10)
    monkeypatch.setattr(encoding, "REMEMBERED_PROMPTS", 3)
    known = EncodedPrompts()

    def names():
        return "".join(name for name in "abcdefg" if known.get(asked(name)))

    for name, pixels, left in [("a", 4, "a"), ("b", 4, "ab"), ("b", 6, "ab"), ("c", 1, "bc"), ("d", 1, "bcd")]:
        known.add(asked(name), encoded(name, pixels))
        assert names() == left
    known.add(asked("e"), encoded("e", 0))
    assert names() == "cde"  # three at most
    known.add(asked("f"), encoded("f", 99))
    assert names() == "f"  # the newest is kept, however large
    known.clear()
    known.add(asked("g"), encoded("g", 10))
    assert names() == "g"
