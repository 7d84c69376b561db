"""What goes wrong in reinforcement before the reward shows it: figures of one step, from its groups alone.

    think-implied option against answer · tags · letters against gold · length of right and wrong · pass@k

Pure functions without torch: the report reads the same figures, and the same completions, from a run folder.
"""

from collections import Counter
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from medrl.rewards.format import BLOCKS
from medrl.rewards.kinds import choices_in
from medrl.rewards.kinds import is_right as answer_is_right
from medrl.rewards.parse import Answer, find_tags
from medrl.rewards.pass_at_k import pass_at_k
from medrl.rewards.shaping import implied_option, reasoning_of
from medrl.types import Completion, Example, Group, Groups, Mode, Rollout


def step_monitors(groups: Groups) -> dict[str, Any]:
    """The monitors of a step that was sampled; a figure that does not exist in it is left out."""
    rollouts = [(group, rollout) for group in groups for rollout in group.rollouts]
    pairs = [(group.example, rollout.completion, rollout) for group, rollout in rollouts]
    agreeing = [
        letter == rollout.score.answer
        for example, completion, rollout in pairs
        if (letter := implied(example, completion)) and rollout.score.answer
    ]
    right = [len(completion.token_ids) for example, completion, r in pairs if is_right(example, r)]
    wrong = [len(completion.token_ids) for example, completion, r in pairs if not is_right(example, r)]
    answers, targets = letter_counts(groups)
    return {
        **({"think_agreement": fmean(agreeing), "think_implied": len(agreeing) / len(pairs)} if agreeing else {}),
        "tags_off": fmean(tags_off(completion) for _, completion, _ in pairs),
        "answer_letters": answers,
        "target_letters": targets,
        **({"completions/mean_length_right": fmean(right)} if right else {}),
        **({"completions/mean_length_wrong": fmean(wrong)} if wrong else {}),
        **{f"pass@{k}": value for k, value in pass_rates(groups).items()},
    }


def is_right(example: Example, rollout: Rollout) -> bool:
    """Whether the answer that was read is right by the rules of the example's kind."""
    return answer_is_right(example, Answer(value=rollout.score.answer))


def implied(example: Example, completion: Completion) -> str | None:
    """Letter of the option that the reasoning comes out at; None where it names none or several, or is no choice."""
    if example.kind != "choice":
        return None
    return implied_option(reasoning_of(completion), example.options)


def tags_off(completion: Completion) -> bool:
    """Whether any tag of the mode does not occur exactly once, or one that the mode does not know occurs."""
    counts = Counter(tag.name for tag in find_tags(completion.text))
    return counts != Counter(_expected_tags(completion.mode))


def _expected_tags(mode: Mode) -> list[str]:
    return [name for block in BLOCKS[mode] for name in (block, f"/{block}")]


def letter_counts(groups: Iterable[Group]) -> tuple[dict[str, int], dict[str, int]]:
    """How often each letter was answered, and how often it would have been right; the same letters in both.

    Yes and no count as letters do; answers that are free (a number, words, a box) are not counted.
    """
    answers: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    for group in groups:
        kind = group.example.kind
        for rollout in group.rollouts:
            answers.update(choices_in(kind, rollout.score.answer))
            targets.update(choices_in(kind, group.example.target))
    letters = sorted(answers.keys() | targets.keys())
    return {letter: answers[letter] for letter in letters}, {letter: targets[letter] for letter in letters}


def letter_excess(answers: dict[str, int], targets: dict[str, int]) -> tuple[str, float] | None:
    """The most over-predicted letter, and its share among answers minus its share among targets; None if no answers."""
    n_answers, n_targets = sum(answers.values()), sum(targets.values())
    if not n_answers or not n_targets:
        return None
    excess = {name: answers[name] / n_answers - targets.get(name, 0) / n_targets for name in answers}
    letter = max(excess, key=lambda name: excess[name])
    return letter, excess[letter]


def pass_rates(groups: Groups) -> dict[int, float]:
    """Chance that one of k completions of a prompt is right, for k = 1, 2, 4, ... up to the group size."""
    sizes = [len(group.rollouts) for group in groups]
    right = [sum(is_right(group.example, rollout) for rollout in group.rollouts) for group in groups]
    ks = [2**power for power in range(min(sizes, default=0).bit_length())]
    return {k: fmean(pass_at_k(n, c, k) for n, c in zip(sizes, right, strict=True)) for k in ks}
