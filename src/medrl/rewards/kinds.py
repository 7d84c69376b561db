"""Reading and grading by kind of question: one visible table."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from medrl.errors import RewardError
from medrl.rewards.boxes import Box, iou, read_box
from medrl.rewards.closed import read_multi_select, read_yes_no
from medrl.rewards.numeric import allowed_difference, numbers_match, read_quantity, read_target
from medrl.rewards.open_text import exact, references_of
from medrl.rewards.option_text import trim, words_of
from medrl.rewards.parse import NO_BLOCK, Answer, find_block, read_choice
from medrl.types import KINDS, LETTERS, Completion, Example, Kind

RIGHT_IOU = 0.5
"""Overlap from which a box counts as right; the usual threshold of detection (PASCAL VOC)."""
_MAX_SHORT_CHARS = 2000
_BOXED = re.compile(r"[\s$]*\\(?:boxed|fbox)\s?\{(?:\\text\s?\{)?([^{}]*)\}{1,2}[\s$.]*")
_MAX_BARE_WORDS = 12
"""Longest text without answer tags that is taken for a short answer and not for reasoning."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How answers to one kind of question are read and graded."""

    read: Callable[[str, Sequence[str]], tuple[str | None, str]]
    """(text of the answer, options) -> what was answered, or None and the problem."""
    is_right: Callable[[str, Example], bool]
    """(what was answered, example) -> whether it is right."""


def read_answer(example: Example, completion: Completion) -> Answer:
    """What a completion answers, read by the rules of the example's kind. Never raises on any text of a completion."""
    if len(example.options) > len(LETTERS):
        raise RewardError(
            f"{len(example.options)} options were given, but letters reach only {len(LETTERS)} (A to {LETTERS[-1]})"
        )
    block = find_block(completion.text, completion.mode)
    if block.problem:
        return Answer(value=None, problem=block.problem)
    value, problem = rules_of(example).read(block.text, example.options)
    if not block.tagged and (value is None or not _may_be_bare(example.kind, block.text)):
        return Answer(value=None, raw=block.text, problem=NO_BLOCK)
    return Answer(value=value, raw=block.text, problem=problem)


def is_right(example: Example, answer: Answer) -> bool:
    """Whether what was answered is right; an unreadable answer is not."""
    check_target(example)  # a malformed example is an error also when the answer is unreadable
    return answer.value is not None and rules_of(example).is_right(answer.value, example)


def choices_in(kind: Kind, answer: str | None) -> list[str]:
    """The letters, or yes or no, that an answer or target is made of; none for kinds whose answers are free."""
    if answer is None or kind not in ("choice", "multi_select", "yes_no"):
        return []
    return answer.split(", ") if kind == "multi_select" else [answer]


def check_target(example: Example) -> None:
    """Raise `RewardError` naming the example when its target is none that its kind can have."""
    if example.kind in ("choice", "multi_select"):
        offered = LETTERS[: len(example.options)]
        chosen = example.target.split(", ") if example.kind == "multi_select" else [example.target]
        if not all(len(letter) == 1 and letter in offered for letter in chosen):
            raise RewardError(
                f"example {example.id!r} has the target {example.target!r}, but the letters of its options are "
                f"{', '.join(offered) or 'none'}; correct the row in its data set"
            )
    elif example.kind == "yes_no" and example.target not in ("yes", "no"):
        raise RewardError(f"example {example.id!r} has the target {example.target!r}; a yes_no target is yes or no")
    elif example.kind == "numeric":
        allowed_difference(read_target(example.target, example.id), example.tolerance)
    elif example.kind == "box":
        target_box(example)
    elif not words_of(example.target.casefold()):
        raise RewardError(f"example {example.id!r} has the target {example.target!r}, which has no words")


def rules_of(example: Example) -> Rules:
    """The rules of the example's kind. Raises `RewardError` naming it for a kind that does not exist."""
    if example.kind not in RULES:
        raise RewardError(f"example {example.id!r} is of kind {example.kind!r}; the kinds are {', '.join(KINDS)}")
    return RULES[example.kind]


def target_box(example: Example) -> Box:
    """The target of a box example. Raises `RewardError` naming the example when it is no box."""
    box, problem = read_box(example.target)
    if box is None:
        raise RewardError(
            f"example {example.id!r} has the target {example.target!r}, which cannot be read ({problem}); "
            "a target is 'x1, y1, x2, y2'"
        )
    return box


def _read_letter(text: str, options: Sequence[str]) -> tuple[str | None, str]:
    index, problem = read_choice(text, options)
    return (None, problem) if index is None else (LETTERS[index], "")


def _read_number(text: str, options: Sequence[str]) -> tuple[str | None, str]:
    quantity, problem = read_quantity(text)
    return (None, problem) if quantity is None else (str(quantity), "")


def _read_short(text: str, options: Sequence[str]) -> tuple[str | None, str]:
    if len(text) > _MAX_SHORT_CHARS:
        return None, "answer is too long"
    if boxed := _BOXED.fullmatch(text):
        text = boxed[1]
    return (trim(text), "") if words_of(text.casefold()) else (None, "empty answer")


def _read_box(text: str, options: Sequence[str]) -> tuple[str | None, str]:
    box, problem = read_box(text)
    return (None, problem) if box is None else (", ".join(f"{side:g}" for side in box), "")


def _may_be_bare(kind: Kind, text: str) -> bool:
    return kind != "short" or len(words_of(text.casefold())) <= _MAX_BARE_WORDS


def _same_text(answer: str, example: Example) -> bool:
    return answer == example.target


def _same_options(answer: str, example: Example) -> bool:
    return set(answer.split(", ")) == set(example.target.split(", "))


def _same_number(answer: str, example: Example) -> bool:
    quantity, _ = read_quantity(answer)
    target = read_target(example.target, example.id)
    return quantity is not None and numbers_match(quantity, target, example.tolerance)


def _same_words(answer: str, example: Example) -> bool:
    return exact(answer, references_of(example)) == 1.0


def _same_place(answer: str, example: Example) -> bool:
    box, _ = read_box(answer)
    return box is not None and iou(box, target_box(example)) >= RIGHT_IOU


RULES: dict[Kind, Rules] = {
    "choice": Rules(_read_letter, _same_text),
    "multi_select": Rules(read_multi_select, _same_options),
    "yes_no": Rules(read_yes_no, _same_text),
    "numeric": Rules(_read_number, _same_number),
    "short": Rules(_read_short, _same_words),
    "box": Rules(_read_box, _same_place),
}
