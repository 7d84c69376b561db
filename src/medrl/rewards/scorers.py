"""Scorers by name: the same completions, graded by our rules, by forgiving ones, or as the papers' code does."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from medrl.errors import SettingsError
from medrl.rewards import papers
from medrl.rewards.format import well_formed
from medrl.rewards.kinds import is_right, read_answer
from medrl.rewards.lenient import read_leniently
from medrl.rewards.parse import Answer
from medrl.types import LETTERS, Completion, Example, Score

CORRECT = "correct"
"""The part of a scorer's score that tells how right the answer is, 0 to 1; ``value`` is the same."""
FORM = "well_formed"

Scorer = Callable[[Example, Completion], Score]
"""Grades one completion; ``Score.answer`` is None where the scorer could not read one."""


def strict(example: Example, completion: Completion) -> Score:
    """By `parse_answer` and the rules of the example's kind: what rewards and evaluations use."""
    return _by_reading(example, completion, read_answer(example, completion))


def lenient(example: Example, completion: Completion) -> Score:
    """By `read_leniently`: answers outside their tags and in sentences count, guesses do not."""
    return _by_reading(example, completion, read_leniently(example, completion))


def _by_reading(example: Example, completion: Completion, answer: Answer) -> Score:
    right = float(is_right(example, answer))
    return make_score(example, right, well_formed(example, completion), answer.value, answer.problem)


def make_score(example: Example, correct: float, form: float, answer: str | None, problem: str) -> Score:
    """A scorer's score, with its sentence."""
    if answer is None:
        verdict = f"No answer could be read ({problem})"
    elif correct == 1.0:
        verdict = f"Answered {answer}, which is right"
    else:
        verdict = f"Answered {answer}, but {example.target} is right"
    shape = "" if form == 1.0 else "; not well formed"
    return Score(value=correct, parts={CORRECT: correct, FORM: form}, answer=answer, explanation=f"{verdict}{shape}.")


@dataclass(frozen=True, slots=True)
class _Released:
    """A released grader: how it rates, and what it looks at. What is no letter on offer counts as unreadable."""

    accuracy: Callable[[Example, Completion], float]
    reads: Callable[[Completion], str | None]
    source: str

    def __call__(self, example: Example, completion: Completion) -> Score:
        correct, form = self.accuracy(example, completion), papers.med_r1_format(example, completion)
        read = self.reads(completion)
        offered = example.kind != "choice" or read in tuple(LETTERS[: len(example.options)])
        answer = read if read and offered else None
        shown = "nothing" if read is None else repr(read if len(read) <= 40 else f"{read[:40]}...")
        sentence = f"{self.source} reads {shown}, expects {example.target!r} and gives {correct:g}."
        return Score(value=correct, parts={CORRECT: correct, FORM: form}, answer=answer, explanation=sentence)


SCORERS: dict[str, Scorer] = {
    "strict": strict,
    "lenient": lenient,
    "med-r1": _Released(papers.med_r1_accuracy, papers.med_r1_answer, "Med-R1's training reward"),
    "med-r1-eval": _Released(papers.med_r1_eval_accuracy, papers.med_r1_eval_answer, "Med-R1's evaluation"),
    "medvlm-r1": _Released(papers.medvlm_r1_accuracy, papers.medvlm_r1_answer, "MedVLM-R1's training reward"),
    "medvlm-r1-eval": _Released(papers.medvlm_r1_eval_accuracy, papers.medvlm_r1_eval_answer, "MedVLM-R1's evaluation"),
    "raw": _Released(papers.raw_accuracy, lambda completion: completion.text, "The papers' evaluation without tags"),
}
"""All that need nothing but the completion; ``judge`` also needs an endpoint, see `medrl.rewards.judge`."""


def find_scorer(name: str) -> Scorer:
    """The scorer called ``name``. Raises `SettingsError` with the nearest names when there is none."""
    if name in SCORERS:
        return SCORERS[name]
    known = [*SCORERS, "judge"]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"choose from: {', '.join(known)}"
    raise SettingsError(f"there is no scorer {name!r}; {hint}")
