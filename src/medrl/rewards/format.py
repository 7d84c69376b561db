"""Whether the completion has the form its prompt asked for."""

from medrl.rewards.parse import find_tags
from medrl.types import Completion, Example, Mode

BLOCKS: dict[Mode, tuple[str, ...]] = {
    "think": ("think", "answer"),
    "no_think": ("answer",),
    "think_after": ("answer", "think"),
}
"""The blocks of each mode, in order."""


def well_formed(example: Example, completion: Completion) -> float:
    """1.0 if the completion is exactly the blocks of its mode, each once and not empty; 0.0 otherwise.

    White space is free around and between the blocks, any other text outside them is not. A completion that the token
    limit cut off right behind its last tag has the form and earns it.
    """
    text, tags = completion.text, find_tags(completion.text)
    blocks = BLOCKS[completion.mode]
    if [tag.name for tag in tags] != [name for block in blocks for name in (block, f"/{block}")]:
        return 0.0
    edges = [0, *(edge for tag in tags for edge in (tag.start, tag.end)), len(text)]
    pieces = [text[start:end].strip() for start, end in zip(edges[::2], edges[1::2], strict=True)]
    outside, inside = pieces[::2], pieces[1::2]
    return float(not any(outside) and all(inside))
