"""Parts -> one reward: a weighted sum that keeps its parts, and the check that a right answer earns all of it."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Real

from medrl.errors import RewardError, SettingsError
from medrl.rewards.correctness import (
    answer_correct,
    bleu,
    box_iou,
    choice_correct,
    option_overlap,
    rouge_l,
    token_f1,
)
from medrl.rewards.format import BLOCKS, well_formed
from medrl.rewards.kinds import is_right, read_answer
from medrl.rewards.parse import Answer, find_tags
from medrl.rewards.shaping import brief, names_option, no_repetition, think_agrees
from medrl.types import LETTERS, Completion, Example, Mode, Reward, Score

PartFunction = Callable[[Example, Completion], float]
"""One measure of a completion, 0 (bad) to 1 (good); a penalty is such a measure with a negative weight."""

PARTS: dict[str, PartFunction] = {
    "choice_correct": choice_correct,
    "answer_correct": answer_correct,
    "option_overlap": option_overlap,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "bleu": bleu,
    "box_iou": box_iou,
    "well_formed": well_formed,
    "brief": brief,
    "no_repetition": no_repetition,
    "think_agrees": think_agrees,
    "names_option": names_option,
}
"""The parts a recipe may name. Docs: docs/rewards.md has a line on each."""


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """The reward that `weighted` makes: call it with an example and a completion."""

    weights: dict[str, float]
    functions: dict[str, PartFunction]
    """Same names, same order as ``weights``."""

    @property
    def highest(self) -> float:
        """What a completion earns that has 1 in every part with a positive weight and 0 in the others."""
        return math.fsum(weight for weight in self.weights.values() if weight > 0)

    def highest_of(self, example: Example) -> float:
        """The same for one example; it is the same for all."""
        return self.highest

    def __call__(self, example: Example, completion: Completion) -> Score:
        parts = {name: _measure(name, part, example, completion) for name, part in self.functions.items()}
        answer = read_answer(example, completion)
        value = math.fsum(self.weights[name] * part for name, part in parts.items())
        return Score(value=value, parts=parts, answer=answer.value, explanation=_explain(example, answer, parts))


def weighted(*pairs: tuple[float, PartFunction]) -> WeightedReward:
    """The reward that sums ``weight * part`` over ``(weight, part)`` pairs; a part is known by its function's name.

    Raises `SettingsError` for no pair, a weight that is not a finite number, a part without a name, or a name given
    twice. The reward raises `RewardError` when a part returns anything but a finite number.
    """
    if not pairs:
        raise SettingsError("a reward needs at least one part, e.g. weighted((1.0, choice_correct))")
    weights: dict[str, float] = {}
    functions: dict[str, PartFunction] = {}
    for weight, part in pairs:
        name = getattr(part, "__name__", None)
        if not callable(part) or not isinstance(name, str):
            raise SettingsError(
                f"a part of a reward is a function with a name, not {part!r}; a pair is (weight, function)"
            )
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
            raise SettingsError(f"the weight of {name} is {weight!r}, but a weight is a finite number")
        if name in weights:
            raise SettingsError(f"{name} is given twice; give one weight, or another function its own __name__")
        weights[name] = float(weight)
        functions[name] = part
    return WeightedReward(weights, functions)


def from_weights(weights: Mapping[str, float]) -> WeightedReward:
    """The reward of named parts and their weights. Raises `SettingsError` as `find_part` and `weighted` do."""
    return weighted(*((weight, find_part(name)) for name, weight in weights.items()))


def find_part(name: str) -> PartFunction:
    """The part called ``name``. Raises `SettingsError` with the nearest name when there is none in `PARTS`."""
    if name in PARTS:
        return PARTS[name]
    near = difflib.get_close_matches(str(name), PARTS, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"choose from: {', '.join(PARTS)}, or FILE.py:FUNCTION"
    raise SettingsError(f"there is no reward part '{name}'; {hint}")


@dataclass(frozen=True, slots=True)
class BySource:
    """A reward of its own for each source of examples."""

    rewards: dict[str, Reward]
    """By `Example.source`."""
    default: Reward | None = None
    """For sources that are not named."""

    def of(self, example: Example) -> Reward:
        """The reward of the example's source. Raises `RewardError` naming both when there is none."""
        reward = self.rewards.get(example.source, self.default)
        if reward is None:
            raise RewardError(
                f"example {example.id!r} is of source {example.source!r}, which has no reward; there are rewards for "
                f"{', '.join(self.rewards)}: add one for it, or a default"
            )
        return reward

    def highest_of(self, example: Example) -> float | None:
        """The highest value of that reward; None where it does not state it."""
        return _highest_of(self.of(example), example)

    def __call__(self, example: Example, completion: Completion) -> Score:
        return self.of(example)(example, completion)


def gold_completion(example: Example, mode: Mode) -> Completion:
    """A completion in the form of ``mode`` that answers rightly, with a reasoning that says as much in words."""
    words = _in_words(example)
    # A tag in the data's own text would end the block that it is quoted in.
    fits = "" if find_tags(words) else f"The findings fit {words}. "
    last = f"The answer is option {example.target}." if example.kind == "choice" else ""
    content = {"think": f"{fits}{last}".strip() or "The findings fit.", "answer": example.target}
    text = "\n".join(f"<{block}>{content[block]}</{block}>" for block in BLOCKS[mode])
    return Completion(text=text, token_ids=(), finish_reason="stop", mode=mode)


def check_gold(reward: Reward, examples: Iterable[Example], mode: Mode) -> list[tuple[Example, Score]]:
    """The examples whose own right answer does not earn the highest value of ``reward``, with what it earned.

    Run before training: a grader that rejects the truth cannot teach it. The highest value is ``highest_of(example)``
    where the reward states it, else the best that any of these right answers earned. A right answer that earns no more
    than an empty completion is reported in any case.
    """
    scored = [(example, reward(example, gold_completion(example, mode))) for example in examples]
    best = max((score.value for _, score in scored), default=0.0)
    silent = Completion(text="", token_ids=(), finish_reason="stop", mode=mode)

    def earns_too_little(example: Example, score: Score) -> bool:
        stated = _highest_of(reward, example)
        highest = best if stated is None else stated
        short = score.value < highest and not math.isclose(score.value, highest, rel_tol=1e-9, abs_tol=1e-12)
        return short or score.value <= reward(example, silent).value

    return [(example, score) for example, score in scored if earns_too_little(example, score)]


def check_wrong(reward: Reward, examples: Iterable[Example], mode: Mode) -> list[tuple[Example, Score]]:
    """The examples of which a wrong answer earns as much as the right one, with what it earned.

    A reward may do so on purpose (one for the form alone), but it cannot teach what is right.
    """
    wrong = [(example, reward(example, wrong_completion(example, mode))) for example in examples]
    return [(row, score) for row, score in wrong if score.value >= reward(row, gold_completion(row, mode)).value]


def wrong_completion(example: Example, mode: Mode) -> Completion:
    """A completion in the form of ``mode`` that answers wrongly: by another option, by the other of yes and no, or by
    words that answer nothing."""
    wrong = {"yes": "no", "no": "yes"}.get(example.target, "nothing of the kind")
    if example.kind in ("choice", "multi_select"):
        chosen = example.target.split(", ")
        others = [letter for letter in LETTERS[: len(example.options)] if letter not in chosen]
        wrong = (others or chosen[1:] or [wrong])[0]
    return gold_completion(replace(example, kind="short", target=wrong), mode)


def _highest_of(reward: Reward, example: Example) -> float | None:
    stated = getattr(reward, "highest_of", None)
    return None if stated is None else stated(example)


def _in_words(example: Example) -> str:
    letters = example.target.split(", ") if example.kind in ("choice", "multi_select") else []
    known = [letter for letter in letters if letter and letter in LETTERS[: len(example.options)]]
    return " and ".join(example.options[LETTERS.index(letter)] for letter in known) if known else example.target


def _measure(name: str, part: PartFunction, example: Example, completion: Completion) -> float:
    value = part(example, completion)
    if not isinstance(value, Real) or not math.isfinite(value):
        raise RewardError(
            f"reward part {name} returned {value!r} for example {example.id!r}; it must be a finite number"
        )
    return float(value)


def _explain(example: Example, answer: Answer, parts: Mapping[str, float]) -> str:
    if answer.value is None:
        verdict = f"No answer could be read ({answer.problem})"
    elif is_right(example, answer):
        verdict = f"Answered {answer.value}, which is right"
    else:
        verdict = f"Answered {answer.value}, but {example.target} is right"
    return f"{verdict}: {', '.join(f'{name} {value:g}' for name, value in parts.items())}."
