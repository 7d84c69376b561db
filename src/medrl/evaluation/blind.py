"""Baselines that never see an image. What they reach is no evidence of looking, so they stand beside every accuracy."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from medrl.evaluation.intervals import Interval, wilson
from medrl.rewards.kinds import is_right
from medrl.rewards.parse import Answer
from medrl.types import LETTERS, Example

Guess = Callable[[Example], str]
"""From an example, its images and target unread, to an answer in the form of a target; empty where it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlindResult:
    """What one baseline answered; ``ids``, ``answers`` and ``correct`` run in parallel."""

    name: str
    ids: list[str]
    answers: list[str]
    """In the form of a target: letters for a choice."""
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
    Ties go to the first letter. Of several options to select, the priors take all that are right more often than not,
    or the best one. Where nothing is offered (a number, a few words, a box) the baselines that are fit give the answer
    that was most often right in train, to this question where it was asked there.
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


def offered(example: Example) -> dict[str, str]:
    """Each answer that a question offers, with its words; nothing where the answer is free."""
    if example.kind in ("choice", "multi_select"):
        return dict(zip(LETTERS, example.options, strict=False))
    return {"yes": "yes", "no": "no"} if example.kind == "yes_no" else {}


def right_words(example: Example) -> list[str]:
    """What is right, in words; several where several options are."""
    answers = example.target.split(", ") if example.kind == "multi_select" else [example.target]
    words = offered(example)
    return [words.get(answer, answer) for answer in answers]


def fit_majority_letter(train: Sequence[Example]) -> Guess:
    """Most frequent target of the kind among those an example can have."""
    counts = Counter((example.kind, example.target) for example in train)
    ranked = [target for target, _ in counts.most_common()]

    def guess(example: Example) -> str:
        answers = offered(example)
        if answers and example.kind != "multi_select":
            return max(answers, key=lambda answer: counts[example.kind, answer])
        fitting = (
            target
            for kind, target in ranked
            if kind == example.kind and (not answers or answers.keys() >= set(target.split(", ")))
        )
        return next(fitting, "")

    return guess


def fit_option_prior(train: Sequence[Example]) -> Guess:
    """Option text that was most often right in train; no image, no question, and no matter how often it was offered."""
    right = Counter(_normalized(words) for example in train for words in right_words(example))
    shares, usual = _OptionShares(train, strength=1.0), fit_majority_letter(train)

    def guess(example: Example) -> str:
        if example.kind == "multi_select":
            return _select(example, shares.of)
        return _first_best(example, lambda words: right[_normalized(words)]) or usual(example)

    return guess


def fit_question_option_prior(train: Sequence[Example], strength: float = 1.0) -> Guess:
    """Option text with the highest share of being right when offered with this question.

    The share is shrunk toward that over all questions, and that toward the share of the average option; ``strength`` is
    how many observations either counts for.
    """
    overall, usual = _OptionShares(train, strength), fit_majority_letter(train)
    offers: Counter[tuple[str, str]] = Counter()
    right: Counter[tuple[str, str]] = Counter()
    free: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for example in train:
        question = _normalized(example.question)
        offers.update((question, _normalized(words)) for words in offered(example).values())
        right.update((question, _normalized(words)) for words in right_words(example))
        if not offered(example):
            free[example.kind, question][example.target] += 1

    def guess(example: Example) -> str:
        question = _normalized(example.question)

        def share(words: str) -> float:
            key = question, _normalized(words)
            return (right[key] + strength * overall.of(words)) / (offers[key] + strength)

        if example.kind == "multi_select":
            return _select(example, share)
        if offered(example):
            return _first_best(example, share)
        asked = free.get((example.kind, question))
        return asked.most_common(1)[0][0] if asked else usual(example)

    return guess


class _OptionShares:
    """How often each option text is right when it is offered, shrunk toward the average option."""

    def __init__(self, train: Sequence[Example], strength: float) -> None:
        with_options = [example for example in train if offered(example)]
        self.strength = strength
        self.offered = Counter(_normalized(words) for example in with_options for words in offered(example).values())
        self.right = Counter(_normalized(words) for example in with_options for words in right_words(example))
        self.average = self.right.total() / self.offered.total() if with_options else 0.0

    def of(self, words: str) -> float:
        text = _normalized(words)
        return (self.right[text] + self.strength * self.average) / (self.offered[text] + self.strength)


def longest_option(example: Example) -> str:
    """Longest option text; no answer where there are no options."""
    return _first_best(example, len) if example.options else ""


def _first_best(example: Example, score: Callable[[str], float]) -> str:
    """The answer whose words score best, the first of equals; empty where nothing is offered."""
    answers = offered(example)
    return max(answers, key=lambda answer: score(answers[answer]), default="")


def _select(example: Example, share: Callable[[str], float]) -> str:
    """All options that are right more often than not, or the best one."""
    likely = [letter for letter, words in offered(example).items() if share(words) > 0.5]
    return ", ".join(likely) or _first_best(example, share)


def _normalized(text: str) -> str:
    return " ".join(text.split()).casefold()


def _answer(name: str, guess: Guess, test: Iterable[Example]) -> BlindResult:
    examples = list(test)
    return grade_blind(name, examples, [guess(example) for example in examples])


def grade_blind(name: str, examples: Sequence[Example], answers: Sequence[str]) -> BlindResult:
    """What a baseline answered, graded by the rules of each example's kind."""
    correct = [is_right(row, Answer(value=answer or None)) for row, answer in zip(examples, answers, strict=True)]
    return BlindResult(
        name=name,
        ids=[example.id for example in examples],
        answers=list(answers),
        correct=correct,
        accuracy=wilson(sum(correct), len(correct)),
    )
