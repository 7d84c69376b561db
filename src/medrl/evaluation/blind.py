"""Baselines that never see an image. What they reach is no evidence of looking, so they stand beside every accuracy."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from medrl.evaluation.intervals import Interval, wilson
from medrl.types import LETTERS, Example

Guess = Callable[[Example], str]
"""From an example, its images and target unread, to a letter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlindResult:
    """What one baseline answered; ``ids``, ``answers`` and ``correct`` run in parallel."""

    name: str
    ids: list[str]
    answers: list[str]
    """Letters."""
    correct: list[bool]
    accuracy: Interval

    @property
    def correct_by_id(self) -> dict[str, bool]:
        return dict(zip(self.ids, self.correct, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """As kept in ``summary.json``: ``{name, accuracy: {value, low, high, n}, correct: {id: bool}}``."""
        return {"name": self.name, "accuracy": self.accuracy.as_dict(), "correct": self.correct_by_id}


def blind_baselines(train: Sequence[Example] | None, test: Sequence[Example]) -> list[BlindResult]:
    """Answer the test examples without their images; baselines that are fit need the training examples.

    ``longest_option``: the longest option text. Needs no fit.
    ``majority_letter``: of the letters offered, the one most often right in train.
    ``option_prior``: of the options offered, the text that was most often right in train.
    ``question_option_prior``: the text with the highest share of being right when offered with this question, leaning
    on its share over all questions where there are few.
    Ties go to the first letter.
    """
    guesses: dict[str, Guess] = {"longest_option": longest_option}
    if train:
        guesses["majority_letter"] = fit_majority_letter(train)
        guesses["option_prior"] = fit_option_prior(train)
        guesses["question_option_prior"] = fit_question_option_prior(train)
    return [_answer(name, guess, test) for name, guess in guesses.items()]


def best_blind(results: Sequence[BlindResult]) -> BlindResult:
    """The most accurate baseline, the first of equals.

    It is picked on the test set, which flatters it a little: the safe direction for a bar to clear.
    """
    return max(results, key=lambda result: result.accuracy.value or 0.0)


def fit_majority_letter(train: Sequence[Example]) -> Guess:
    """Most frequent target among the letters an example offers."""
    counts = Counter(example.target for example in train)

    def guess(example: Example) -> str:
        return max(LETTERS[: len(example.options)], key=lambda letter: counts[letter])

    return guess


def fit_option_prior(train: Sequence[Example]) -> Guess:
    """Option text that was most often right in train; no image, no question, and no matter how often it was offered."""
    right = Counter(_normalized(example.target_text) for example in train)
    return lambda example: _first_best(example.options, lambda option: right[_normalized(option)])


def fit_question_option_prior(train: Sequence[Example], strength: float = 1.0) -> Guess:
    """Option text with the highest share of being right when offered with this question.

    The share is shrunk toward that over all questions, and that toward the share of the average option; ``strength`` is
    how many observations either counts for.
    """
    overall = _OptionShares(train, strength)
    offered: Counter[tuple[str, str]] = Counter()
    right: Counter[tuple[str, str]] = Counter()
    for example in train:
        question = _normalized(example.question)
        offered.update((question, _normalized(option)) for option in example.options)
        right[question, _normalized(example.target_text)] += 1

    def guess(example: Example) -> str:
        question = _normalized(example.question)

        def share(option: str) -> float:
            key = question, _normalized(option)
            return (right[key] + strength * overall.of(option)) / (offered[key] + strength)

        return _first_best(example.options, share)

    return guess


class _OptionShares:
    """How often each option text is right when it is offered, shrunk toward the average option."""

    def __init__(self, train: Sequence[Example], strength: float) -> None:
        self.strength = strength
        self.offered = Counter(_normalized(option) for example in train for option in example.options)
        self.right = Counter(_normalized(example.target_text) for example in train)
        self.average = len(train) / self.offered.total()

    def of(self, option: str) -> float:
        text = _normalized(option)
        return (self.right[text] + self.strength * self.average) / (self.offered[text] + self.strength)


def longest_option(example: Example) -> str:
    """Longest option text."""
    return _first_best(example.options, len)


def _first_best(options: Sequence[str], score: Callable[[str], float]) -> str:
    scores = [score(option) for option in options]
    return LETTERS[scores.index(max(scores))]


def _normalized(text: str) -> str:
    return " ".join(text.split()).casefold()


def _answer(name: str, guess: Guess, test: Iterable[Example]) -> BlindResult:
    examples = list(test)
    return grade_blind(name, examples, [guess(example) for example in examples])


def grade_blind(name: str, examples: Sequence[Example], answers: Sequence[str]) -> BlindResult:
    """What a baseline answered, letter by letter, against the targets."""
    correct = [answer == example.target for answer, example in zip(answers, examples, strict=True)]
    return BlindResult(
        name=name,
        ids=[example.id for example in examples],
        answers=list(answers),
        correct=correct,
        accuracy=wilson(sum(correct), len(correct)),
    )
