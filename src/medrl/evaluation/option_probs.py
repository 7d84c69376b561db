"""The probability of each option's letter at the place where the completion answers."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from medrl.errors import PolicyError
from medrl.policy.policy import EncodedPrompt, Policy
from medrl.rewards.parse import find_tags, parse_answer
from medrl.types import LETTERS, Completion, Example

log = logging.getLogger(__name__)


@torch.no_grad()
def option_probs(
    policy: Policy, examples: Sequence[Example], encoded: Sequence[EncodedPrompt], completions: Sequence[Completion]
) -> list[tuple[float, ...] | None]:
    """For each completion, the probabilities of its options' letters, which sum to 1; None for an unreadable answer and
    for questions that do not ask for one letter.

    What is asked is: having seen the prompt and having written all that stands before the answer, which letter comes
    next, of those offered? So it is about the letter, given the reasoning; not about the reasoning.

    One packed pass for all: image, prompt and reasoning are computed once per completion, the letters branch off.

    Args:
        encoded: (N,) the examples' prompts, as ``policy.encode`` made them.
        completions: (N,) one of each prompt.
    """
    found: list[tuple[float, ...] | None] = [None] * len(completions)
    stems, branches, rows = [], [], []
    for row, (example, prompt, completion) in enumerate(zip(examples, encoded, completions, strict=True)):
        place = answer_place(example, completion)
        if place is not None:
            kept, opening = split_before(policy, completion, place)
            stems.append(continued(prompt, kept))
            letters = LETTERS[: len(example.options)]
            branches.append([_token_ids(policy, opening + letter) for letter in letters])
            rows.append(row)
    if not rows:
        return found
    # All branches of a group begin with the same opening, so what it is worth cancels.
    for row, total in zip(rows, _score_what_fits(policy, stems, branches), strict=True):
        found[row] = tuple(total.double().softmax(-1).tolist())
    return found


def _score_what_fits(
    policy: Policy, stems: Sequence[EncodedPrompt], branches: Sequence[Sequence[Sequence[int]]]
) -> list[Tensor]:
    """For each stem, (letters,) log-probabilities of its branches; in one pass, or, where memory runs out, as rollouts
    are drawn: half of them after the other half, again and again."""
    try:
        scored = policy.logprobs(stems, branches)
        totals = (scored.logprobs * scored.completion_mask).sum(-1)
        return list(totals.split([len(group) for group in branches]))
    except torch.OutOfMemoryError as error:
        if len(stems) == 1:
            raise PolicyError(
                f"the memory is too small to score the options of example {stems[0].id} alone "
                f"({len(stems[0].token_ids)} tokens): lower max_pixels, or leave these figures out (--no-option-probs)"
            ) from error
    # Outside of the handler, whose traceback holds the tensors of what failed.
    log.warning("out of memory while scoring the options of %d answers together: half of them at a time", len(stems))
    policy.decode_graphs = None
    if policy.device.type == "cuda":
        torch.cuda.empty_cache()
    half = len(stems) // 2
    before = _score_what_fits(policy, stems[:half], branches[:half])
    return [*before, *_score_what_fits(policy, stems[half:], branches[half:])]


def answer_place(example: Example, completion: Completion) -> int | None:
    """Character of the completion at which its answer begins; None when there is no readable answer, or no choice."""
    text = completion.text
    if example.kind != "choice" or parse_answer(text, example.options, completion.mode).letter is None:
        return None
    # A readable answer stands in the only answer block of its region, which think_after has first and others last;
    # where there is no such block, it is all that stands in that region.
    first, tags = completion.mode == "think_after", find_tags(text)
    opened = [tag.end for tag in tags if tag.name == "answer"]
    bare = tags[-1].end if tags and not first else 0
    start = opened[0 if first else -1] if opened else bare
    return start + len(text[start:]) - len(text[start:].lstrip())


def split_before(policy: Policy, completion: Completion, place: int) -> tuple[list[int], str]:
    """The tokens before the answer block, as they were written, and the text from there up to ``place``.

    The tag itself is left to be tokenized anew together with each letter: a tokenizer may join ``>`` and ``A``. Before
    an answer without a tag of its own, that is the tag which ends the reasoning.
    """
    text, kept = completion.text, list(completion.token_ids)
    tag = max(0, text.rfind("<", 0, place))
    while kept:
        before = policy.decode(kept)
        if len(before) <= tag and text.startswith(before):
            return kept, text[len(before) : place]
        kept.pop()
    return kept, text[:place]


def continued(prompt: EncodedPrompt, token_ids: Sequence[int]) -> EncodedPrompt:
    """The prompt with these tokens written behind it."""
    positions = (prompt.next_position + torch.arange(len(token_ids))).expand(3, -1)
    return replace(
        prompt,
        token_ids=torch.cat([prompt.token_ids, torch.tensor(token_ids, dtype=torch.long)]),
        positions=torch.cat([prompt.positions, positions], dim=1),
    )


def _token_ids(policy: Policy, text: str) -> list[int]:
    return policy.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
