"""Options rebuilt so that their texts no longer tell which one is right.

Where distractors come from a vocabulary of their own, whoever remembers which texts were ever right needs no image.
Here the distractors of a question are the right answers of other questions of the same type and modality:

questions -> groups of k with k different answers -> every question of a group offers exactly those k

Within a group each option is right once, so a rule that looks at option texts alone has one of k right, whatever it has
learned. k is the number of options a question had, or fewer where there are fewer answers. A type that has one answer
only within a modality (which modality is this?) is grouped over all modalities. Where one answer is so common that no
partners are left for it, nothing helps: those questions are counted as uneven.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import astuple, dataclass, replace

from medrl.types import LETTERS, Example

_YES_NO = frozenset({"yes", "no", "true", "false", "maybe", "unknown"})


@dataclass(frozen=True, slots=True)
class Resampled:
    """How many questions fared how."""

    balanced: int = 0
    """In a full group: the option texts tell nothing."""
    uneven: int = 0
    """New distractors, but their answer is too common for a group: always picking it still pays."""
    unchanged: int = 0
    """Their type has no other answer that could stand beside theirs."""
    dropped: int = 0
    """Left out because they would have been uneven or unchanged."""

    def __add__(self, other: "Resampled") -> "Resampled":
        return Resampled(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))


def resample_distractors(
    examples: Sequence[Example], *, seed: int, drop_unbalanced: bool = False
) -> tuple[list[Example], Resampled]:
    """The examples in their order with new distractors, and counts.

    Each keeps its question, its images, its right answer and its number of options; letters are drawn anew. An answer
    is never offered where it might be right as well: not where another question on the same image has it, and not
    beside an answer whose words contain it or are contained in it. ``drop_unbalanced`` leaves out the questions that
    can be answered from their options still.
    """
    taboo = _answers_by_image(examples)
    shuffled = sorted(examples, key=lambda row: _draw(seed, row.id))
    options: dict[str, tuple[str, ...]] = {}
    left: list[tuple[Example, list[Example]]] = []
    for pool in _pools(shuffled):
        groups, rest = _group(pool, taboo)
        options.update({row.id: tuple(other.target_text for other in group) for group in groups for row in group})
        left += [(row, pool) for row in rest]
    balanced = len(options)
    if drop_unbalanced:
        kept = [_with_options(row, options[row.id], seed) for row in examples if row.id in options]
        return kept, Resampled(balanced, dropped=len(examples) - balanced)
    uses: Counter[str] = Counter()
    for row, pool in left:
        drawn = _draw_distractors(row, pool, taboo, uses, seed)
        if drawn:
            options[row.id] = (row.target_text, *drawn)
    changed = [_with_options(row, options[row.id], seed) if row.id in options else row for row in examples]
    return changed, Resampled(balanced, len(options) - balanced, len(examples) - len(options))


def _pools(examples: Sequence[Example]) -> list[list[Example]]:
    """Examples whose answers may stand beside each other; yes and no go with yes and no only."""
    by_modality: dict[tuple[str, int, bool, str], list[Example]] = defaultdict(list)
    for row in examples:
        yes_no = all(_normal(option) in _YES_NO for option in row.options)
        by_modality[row.question_type, len(row.options), yes_no, row.modality].append(row)
    pools: dict[Hashable, list[Example]] = defaultdict(list)
    for key, pool in by_modality.items():
        one_answer = len({_normal(row.target_text) for row in pool}) == 1
        pools[key[:3] if one_answer else key] += pool
    return list(pools.values())


def _group(pool: Sequence[Example], taboo: dict[str, set[str]]) -> tuple[list[list[Example]], list[Example]]:
    """Groups of examples whose answers differ and could not be mistaken for each other, and those left over.

    As large as the number of options while that goes, then smaller. The most frequent answers are taken first: no other
    order makes more groups.
    """
    queues: dict[str, list[Example]] = defaultdict(list)
    for row in pool:
        queues[_normal(row.target_text)].append(row)
    groups: list[list[Example]] = []
    for size in range(len(pool[0].options), 1, -1):
        stuck: list[Example] = []
        while sum(1 for queue in queues.values() if queue) >= size:
            group: list[Example] = []
            for answer in sorted(
                (name for name in queues if queues[name]), key=lambda name: (-len(queues[name]), name)
            ):
                row = queues[answer][-1]
                if len(group) < size and all(_distinct(row, other, taboo) for other in group):
                    group.append(row)
            if len(group) == size:
                groups.append(group)
                for row in group:
                    queues[_normal(row.target_text)].pop()
            else:  # this one finds too few partners; smaller groups may have room for it
                stuck.append(queues[_normal(group[0].target_text)].pop())
        for row in stuck:
            queues[_normal(row.target_text)].append(row)
    return groups, [row for queue in queues.values() for row in queue]


def _distinct(one: Example, other: Example, taboo: dict[str, set[str]]) -> bool:
    a, b = _normal(one.target_text), _normal(other.target_text)
    return not _may_mean(a, b) and b not in taboo[one.id] and a not in taboo[other.id]


def _draw_distractors(
    row: Example, pool: Sequence[Example], taboo: dict[str, set[str]], uses: Counter[str], seed: int
) -> list[str]:
    """As many as the row needs or as there are, those used least so far first."""
    chosen = [row.target_text]
    spelled = {_normal(other.target_text): other.target_text for other in pool}
    for text in sorted(spelled, key=lambda text: (uses[text], _draw(seed, row.id, text))):
        if text not in taboo[row.id] and not any(_may_mean(text, _normal(other)) for other in chosen):
            chosen.append(spelled[text])
        if len(chosen) == len(row.options):
            break
    uses.update(map(_normal, chosen[1:]))
    return chosen[1:]


def _with_options(row: Example, texts: Sequence[str], seed: int) -> Example:
    answer = row.target_text
    options = tuple(sorted(texts, key=lambda text: _draw(seed, row.id, text)))
    return replace(row, options=options, target=LETTERS[options.index(answer)])


def _answers_by_image(examples: Sequence[Example]) -> dict[str, set[str]]:
    """Example id -> normalized right answers of all questions on its images, its own aside."""
    answers: dict[object, Counter[str]] = defaultdict(Counter)
    for row in examples:
        for image in row.images:
            answers[image][_normal(row.target_text)] += 1
    return {
        row.id: {text for image in row.images for text in answers[image]} - {_normal(row.target_text)}
        for row in examples
    }


def _may_mean(a: str, b: str) -> bool:
    """Equal, or one is the other with more words, as ``lung`` and ``left lung``."""
    one, other = set(a.split()), set(b.split())
    return one <= other or other <= one


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")


def _draw(seed: int, *names: str) -> bytes:
    return hashlib.sha256("\0".join(["medrl resample", str(seed), *names]).encode()).digest()
