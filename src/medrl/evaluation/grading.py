"""One completion -> answer and verdict, by kind of question: the same for every way of asking."""

from medrl.rewards import from_weights
from medrl.types import KINDS, Completion, Example, Kind, Sample

RIGHT: dict[Kind, str] = {kind: "choice_correct" if kind == "choice" else "answer_correct" for kind in KINDS}
"""The part that tells whether an answer is right, by kind of question."""
REWARDS = {kind: from_weights({right: 1.0, "well_formed": 1.0}) for kind, right in RIGHT.items()}


def grade(example: Example, completion: Completion, tokens: int) -> Sample:
    """Read and judge what was written; ``tokens`` is how long it was."""
    score = REWARDS[example.kind](example, completion)
    return Sample(
        completion=completion.text,
        finish_reason=completion.finish_reason,
        answer=score.answer,
        correct=score.parts[RIGHT[example.kind]] == 1.0,
        parts=score.parts,
        tokens=tokens,
    )
