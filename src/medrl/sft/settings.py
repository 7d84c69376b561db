"""Settings of supervised fine-tuning."""

from typing import Literal

from pydantic import Field

from medrl.settings import Settings


class SFT(Settings):
    """Supervised fine-tuning on the right answers."""

    reduction: Literal["sequence", "token"] = "token"
    """``token``: every answer token counts the same; ``sequence``: every answer counts the same."""
    rationale: Literal["none", "column"] = "none"
    """What stands in the reasoning block: nothing, or the example's ``rationale``; an example without one is then
    refused."""
    emulate: Literal["none", "med-r1-released"] = "none"
    """``med-r1-released`` trains as Med-R1's released script does, faults included, to show what they cost: the word
    "None" before every answer, a loss on the prompt too, a new turn begun after the answer, the image behind the
    text."""


class RFT(Settings):
    """Rejection-sampling fine-tuning: sample from the policy itself, keep what is right, imitate it.

    Source: RAFT, arXiv 2304.06767 (the best of each prompt's completions, drawn anew from the policy at every step);
    keeping all right ones: RFT, arXiv 2308.01825.
    """

    group_size: int = Field(default=8, ge=2)
    """Completions per prompt, of which the best is kept."""
    keep: Literal["best", "all"] = "best"
    """``best``: one completion per prompt, the one with the highest reward, the shortest of equals; ``all``: each right
    one."""
    reduction: Literal["sequence", "token"] = "token"
    """``token``: every kept token counts the same; ``sequence``: every kept completion counts the same."""
