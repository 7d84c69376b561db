"""Whether the answer is right, and how near it comes where right and wrong are too coarse."""

from collections.abc import Callable, Sequence

from medrl.errors import RewardError
from medrl.rewards import open_text
from medrl.rewards.boxes import iou, read_box
from medrl.rewards.kinds import check_target, is_right, read_answer, target_box
from medrl.types import Completion, Example, Kind


def choice_correct(example: Example, completion: Completion) -> float:
    """1.0 if the option that was read from the completion is the target; 0.0 otherwise and for an unreadable answer.

    Raises `RewardError` for an example whose target is not one of its options, or that is no choice.
    """
    _demand(example, "choice", "choice_correct")
    return answer_correct(example, completion)


def answer_correct(example: Example, completion: Completion) -> float:
    """1.0 if the answer is right by the rules of the example's kind; 0.0 otherwise and for an unreadable answer.

    A choice or a list of options must be the target, a number within its tolerance, a short answer equal to a
    reference up to case, punctuation and article, a box must overlap the target by at least half (IoU).
    Raises `RewardError` for an example whose target its kind cannot have.
    """
    return float(is_right(example, read_answer(example, completion)))


def option_overlap(example: Example, completion: Completion) -> float:
    """For several options: how many were chosen rightly, over all that were chosen or should have been (Jaccard)."""
    _demand(example, "multi_select", "option_overlap")
    answer = read_answer(example, completion).value
    chosen, wanted = set(answer.split(", ") if answer else ()), set(example.target.split(", "))
    return len(chosen & wanted) / len(chosen | wanted)


def token_f1(example: Example, completion: Completion) -> float:
    """For a short answer: words in common with the nearest reference, see `open_text.token_f1`."""
    return _nearness("token_f1", open_text.token_f1, example, completion)


def rouge_l(example: Example, completion: Completion) -> float:
    """For a short answer: words in common and in order, see `open_text.rouge_l`."""
    return _nearness("rouge_l", open_text.rouge_l, example, completion)


def bleu(example: Example, completion: Completion) -> float:
    """For a short answer: word sequences in common, see `open_text.bleu`."""
    return _nearness("bleu", open_text.bleu, example, completion)


def box_iou(example: Example, completion: Completion) -> float:
    """For a box: its overlap with the target (intersection over union)."""
    _demand(example, "box", "box_iou")
    box, _ = read_box(read_answer(example, completion).value or "")
    target = target_box(example)
    return 0.0 if box is None else iou(box, target)


def embedding_similarity(model: str | open_text.Embed) -> Callable[[Example, Completion], float]:
    """A part for short answers: cosine similarity with the nearest reference.

    ``model`` is a folder or hub id of a transformers encoder, loaded at the first answer, or your own function from
    texts to vectors. A right opposite can lie near: "no fracture" and "fracture" share most of their vector.
    """

    def embedding_similarity(example: Example, completion: Completion) -> float:
        embed = open_text.text_encoder(model) if isinstance(model, str) else model

        def nearness(answer: str, references: Sequence[str]) -> float:
            return open_text.cosine(answer, references, embed)

        return _nearness("embedding_similarity", nearness, example, completion)

    return embedding_similarity


def _nearness(
    name: str, measure: Callable[[str, Sequence[str]], float], example: Example, completion: Completion
) -> float:
    _demand(example, "short", name)
    check_target(example)
    answer = read_answer(example, completion).value
    return 0.0 if answer is None else measure(answer, open_text.references_of(example))


def _demand(example: Example, kind: Kind, part: str) -> None:
    if example.kind != kind:
        raise RewardError(
            f"{part} grades questions of kind {kind}, but example {example.id!r} is of kind {example.kind}: "
            "take answer_correct, which grades every kind, or choose rewards by source"
        )
