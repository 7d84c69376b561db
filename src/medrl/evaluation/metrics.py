"""What is said of one evaluation: a pure function of its records."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from medrl.evaluation.intervals import wilson
from medrl.rewards.kinds import choices_in
from medrl.types import EvalRecord, Kind


def summarize(records: Sequence[EvalRecord]) -> dict[str, Any]:
    """Figures over records, ready for ``summary.json``; None stands for what no record can tell.

    ``accuracy``: share of right answers with its 95 % Wilson interval. An unreadable answer is a wrong answer.
    ``by_modality``, ``by_question_type``, ``by_source``: the same, per name, sorted by name.
    ``chance``: expected accuracy of drawing an answer at random; see ``chance``.
    ``parse_fail_rate``, ``truncated_rate``: share of completions without a readable answer, and cut off by the limit.
    ``well_formed``: mean of that reward part, over the records that have it.
    ``answer_letters``, ``target_letters``: how often each letter (or yes, or no) was answered, and was right; what is
    unreadable or free (a number, words, a box) is not counted.
    """
    return {
        "n": len(records),
        "accuracy": accuracy(records),
        "chance": _mean(chance(record.kind, len(record.options)) for record in records),
        "by_modality": _accuracy_by(records, lambda record: record.modality),
        "by_question_type": _accuracy_by(records, lambda record: record.question_type),
        "by_source": _accuracy_by(records, lambda record: record.source),
        "parse_fail_rate": _mean(record.answer is None for record in records),
        "truncated_rate": _mean(record.finish_reason == "length" for record in records),
        "well_formed": _mean(record.parts["well_formed"] for record in records if "well_formed" in record.parts),
        "mean_tokens": _mean(record.tokens for record in records),
        **_letter_histograms(records),
    }


def accuracy(records: Sequence[EvalRecord]) -> dict[str, float | int | None]:
    """Share of right answers: ``{value, low, high, n}``."""
    return wilson(sum(record.correct for record in records), len(records)).as_dict()


def chance(kind: Kind, n_options: int) -> float:
    """Probability that an answer drawn at random is right; 0 where nothing is offered to draw from."""
    if kind == "multi_select":
        return 1 / (2**n_options - 1)  # any options but none
    return {"choice": 1 / max(n_options, 1), "yes_no": 1 / 2}.get(kind, 0.0)


def _accuracy_by(
    records: Sequence[EvalRecord], key: Callable[[EvalRecord], str]
) -> dict[str, dict[str, float | int | None]]:
    groups: dict[str, list[EvalRecord]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return {name: accuracy(groups[name]) for name in sorted(groups)}


def _letter_histograms(records: Sequence[EvalRecord]) -> dict[str, dict[str, int]]:
    answers = Counter(letter for record in records for letter in choices_in(record.kind, record.answer))
    targets = Counter(letter for record in records for letter in choices_in(record.kind, record.target))
    letters = sorted(answers.keys() | targets.keys())  # the same letters in both, so that they can be laid side by side
    return {
        "answer_letters": {letter: answers[letter] for letter in letters},
        "target_letters": {letter: targets[letter] for letter in letters},
    }


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return sum(listed) / len(listed) if listed else None
