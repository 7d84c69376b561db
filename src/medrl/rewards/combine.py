"""Parts -> one reward: a weighted sum that keeps its parts, and the check that a right answer earns all of it."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real

from medrl.errors import RewardError, SettingsError
from medrl.rewards.correctness import choice_correct
from medrl.rewards.format import BLOCKS, well_formed
from medrl.rewards.parse import Answer, parse_answer
from medrl.types import Completion, Example, Mode, Reward, Score

PartFunction = Callable[[Example, Completion], float]
"""One measure of a completion, 0 (bad) to 1 (good); a penalty is such a measure with a negative weight."""

PARTS: dict[str, PartFunction] = {"choice_correct": choice_correct, "well_formed": well_formed}
"""The parts a recipe may name."""


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

    def __call__(self, example: Example, completion: Completion) -> Score:
        parts = {name: _measure(name, part, example, completion) for name, part in self.functions.items()}
        answer = parse_answer(completion.text, example.options, completion.mode)
        value = math.fsum(self.weights[name] * part for name, part in parts.items())
        return Score(value=value, parts=parts, answer=answer.letter, explanation=_explain(example, answer, parts))


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
    """The reward a recipe lists: names of `PARTS` and their weights.

    Raises `SettingsError` for a name that is not in `PARTS`, with the nearest one that is.
    """
    for name in weights:
        if name not in PARTS:
            near = difflib.get_close_matches(str(name), PARTS, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"choose from: {', '.join(sorted(PARTS))}"
            raise SettingsError(f"there is no reward part '{name}'; {hint}")
    return weighted(*((weight, PARTS[name]) for name, weight in weights.items()))


def gold_completion(example: Example, mode: Mode) -> Completion:
    """A completion in the form of ``mode`` that answers with the example's target letter."""
    content = {"think": "The findings were compared with each option.", "answer": example.target}
    text = "\n".join(f"<{block}>{content[block]}</{block}>" for block in BLOCKS[mode])
    return Completion(text=text, token_ids=(), finish_reason="stop", mode=mode)


def check_gold(reward: Reward, examples: Iterable[Example], mode: Mode) -> list[tuple[Example, Score]]:
    """The examples whose own right answer does not earn the highest value of ``reward``, with what it earned.

    Run before training: a grader that rejects the truth cannot teach it. The highest value is ``reward.highest`` where
    the reward states it, else the best that any of these right answers earned. A right answer that earns no more than
    an empty completion is reported in any case.
    """
    scored = [(example, reward(example, gold_completion(example, mode))) for example in examples]
    stated = getattr(reward, "highest", None)
    highest = stated if stated is not None else max((score.value for _, score in scored), default=0.0)
    silent = Completion(text="", token_ids=(), finish_reason="stop", mode=mode)

    def earns_too_little(example: Example, score: Score) -> bool:
        short = score.value < highest and not math.isclose(score.value, highest, rel_tol=1e-9, abs_tol=1e-12)
        return short or score.value <= reward(example, silent).value

    return [(example, score) for example, score in scored if earns_too_little(example, score)]


def _measure(name: str, part: PartFunction, example: Example, completion: Completion) -> float:
    value = part(example, completion)
    if not isinstance(value, Real) or not math.isfinite(value):
        raise RewardError(
            f"reward part {name} returned {value!r} for example {example.id!r}; it must be a finite number"
        )
    return float(value)


def _explain(example: Example, answer: Answer, parts: Mapping[str, float]) -> str:
    if answer.letter is None:
        verdict = f"No answer could be read ({answer.problem})"
    elif answer.letter == example.target:
        verdict = f"Answered {answer.letter}, which is right"
    else:
        verdict = f"Answered {answer.letter}, but {example.target} is right"
    return f"{verdict}: {', '.join(f'{name} {value:g}' for name, value in parts.items())}."
