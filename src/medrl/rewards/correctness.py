"""Whether the answer is right."""

from medrl.errors import RewardError
from medrl.rewards.parse import parse_answer
from medrl.types import LETTERS, Completion, Example


def choice_correct(example: Example, completion: Completion) -> float:
    """1.0 if the option that was read from the completion is the target; 0.0 otherwise and for an unreadable answer.

    Raises `RewardError` for an example whose target is not one of its options.
    """
    offered = LETTERS[: len(example.options)]
    if len(example.target) != 1 or example.target not in offered:
        raise RewardError(
            f"example {example.id!r} has the target {example.target!r}, but the letters of its options are "
            f"{', '.join(offered) or 'none'}; correct the row in its data set"
        )
    return float(parse_answer(completion.text, example.options, completion.mode).letter == example.target)
