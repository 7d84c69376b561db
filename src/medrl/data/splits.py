"""Train and test sets that share no picture (or patient), by domain.

examples -> parts: those joined by an image or a patient, through any number of steps
parts -> train or test, whole, once for all domains: so a specialist of one domain has not seen another's test images
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from medrl.data.images import pixel_digest
from medrl.errors import DataError, SettingsError
from medrl.types import Example

KeepTogether = Literal["image", "patient", "none"]
By = Literal["modality", "question_type"]

DOMAINS: dict[str | None, Callable[[Example], str]] = {
    None: lambda example: "all",
    "modality": lambda example: example.modality,
    "question_type": lambda example: example.question_type,
}


@dataclass(frozen=True, slots=True)
class _Part:
    """Examples that must stay on one side."""

    members: tuple[int, ...]
    sizes: Counter[str]
    """Members by domain."""


def split_examples(
    examples: Sequence[Example],
    *,
    test_fraction: float,
    seed: int,
    keep_together: KeepTogether = "image",
    by: By | None = None,
) -> dict[str, tuple[list[Example], list[Example]]]:
    """Domain -> (train, test), each in the order of ``examples``.

    Args:
        examples: what to divide; they need not come from one store.
        test_fraction: share of each domain that goes to test, about; parts are not torn to meet it exactly.
        seed: names the division; the order of ``examples`` does not matter to it.
        keep_together: ``image``: examples that show the same picture (same path or same decoded pixels) stay together;
            ``patient``: and those of the same patient of the same source; ``none``: each example on its own.
        by: what a domain is; None: one domain named ``all``.

    A domain of at least two parts has both a train and a test set; a domain of one part has only one of them.

    Raises:
        SettingsError: an argument that cannot mean anything.
        DataError: no examples, an example without a patient where patients are to be kept together, or domains so
            entangled that no division leaves each a train and a test set.
    """
    if not 0 < test_fraction < 1:
        raise SettingsError(f"test_fraction is {test_fraction}, but it must lie between 0 and 1, e.g. 0.2")
    if keep_together not in KEYS:
        raise SettingsError(f"keep_together is {keep_together!r}, but it must be one of {', '.join(KEYS)}")
    if by not in DOMAINS:
        raise SettingsError(f"by is {by!r}, but it must be modality, question_type or None")
    if not examples:
        raise DataError("there are no examples to split")
    domain_of = DOMAINS[by]
    parts = _find_parts(examples, KEYS[keep_together](examples), domain_of)
    parts.sort(key=lambda part: _draw(seed, [examples[member].id for member in part.members]))
    in_test = _repair(parts, _assign(parts, test_fraction))
    tested = {member for part, test in zip(parts, in_test, strict=True) if test for member in part.members}
    result: dict[str, tuple[list[Example], list[Example]]] = {}
    for index, example in enumerate(examples):
        result.setdefault(domain_of(example), ([], []))[index in tested].append(example)
    return result


def image_keys(examples: Sequence[Example]) -> list[list[Hashable]]:
    """Per example, what its pictures are known by: resolved path and digest of the decoded pixels."""
    digests = {path: pixel_digest(path) for path in dict.fromkeys(image for row in examples for image in row.images)}
    return [
        [key for image in row.images for key in (("path", image.resolve()), ("pixels", digests[image]))]
        for row in examples
    ]


def patient_keys(examples: Sequence[Example]) -> list[list[Hashable]]:
    """Image keys and the patient; DataError when a patient is unknown, for a guess would be a leak nobody sees."""
    unknown = [row.id for row in examples if row.patient is None]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(examples)} examples have no patient, e.g. {unknown[0]!r}, so patients cannot be "
            "kept together: use keep_together='image' and say so, or import the data with its patient column"
        )
    keys = image_keys(examples)
    return [[*keys[index], ("patient", row.source, row.patient)] for index, row in enumerate(examples)]


def no_keys(examples: Sequence[Example]) -> list[list[Hashable]]:
    return [[] for _ in examples]


KEYS: dict[str, Callable[[Sequence[Example]], list[list[Hashable]]]] = {
    "image": image_keys,
    "patient": patient_keys,
    "none": no_keys,
}


def _find_parts(
    examples: Sequence[Example], keys: list[list[Hashable]], domain_of: Callable[[Example], str]
) -> list[_Part]:
    """Connected components: two examples are joined when they share a key."""
    parent = list(range(len(examples)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[Hashable, int] = {}
    for index, own in enumerate(keys):
        for key in own:
            parent[root(index)] = root(first.setdefault(key, index))
    members: dict[int, list[int]] = defaultdict(list)
    for index in range(len(examples)):
        members[root(index)].append(index)
    return [_Part(tuple(m), Counter(domain_of(examples[i]) for i in m)) for m in members.values()]


def _draw(seed: int, ids: list[str]) -> bytes:
    """Place of a part in the shuffled order: depends on its ids alone, not on where they stood."""
    return hashlib.sha256("\0".join(["medrl split", str(seed), *sorted(ids)]).encode()).digest()


def _assign(parts: Sequence[_Part], test_fraction: float) -> list[bool]:
    """Part by part, to test while that brings the domains it belongs to nearer to their share."""
    seen: Counter[str] = Counter()
    tested: Counter[str] = Counter()
    in_test = []
    for part in parts:
        seen.update(part.sizes)
        weight = sum(part.sizes.values())
        gap = sum(
            size / weight * (test_fraction * seen[domain] - tested[domain] - size / 2)
            for domain, size in part.sizes.items()
        )
        in_test.append(gap > 0)
        if gap > 0:
            tested.update(part.sizes)
    return in_test


def _repair(parts: Sequence[_Part], in_test: list[bool]) -> list[bool]:
    """Move the smallest part that helps until every domain of two or more parts has both sides."""
    groups = Counter(domain for part in parts for domain in part.sizes)
    sides = Counter((domain, test) for part, test in zip(parts, in_test, strict=True) for domain in part.sizes)
    in_test = list(in_test)
    for wanted in (True, False):
        for domain in sorted(name for name, count in groups.items() if count > 1):
            if sides[domain, wanted]:
                continue
            movable = [
                index
                for index, part in enumerate(parts)
                if domain in part.sizes
                and all(sides[other, not wanted] > 1 or groups[other] == 1 for other in part.sizes)
            ]
            if not movable:
                side = "test" if wanted else "train"
                raise DataError(
                    f"domain {domain!r} gets no {side} set: its images are shared with domains that need them on "
                    "the other side; split without `by`, or add examples"
                )
            moved = min(movable, key=lambda index: sum(parts[index].sizes.values()))
            in_test[moved] = wanted
            for other in parts[moved].sizes:
                sides[other, wanted] += 1
                sides[other, not wanted] -= 1
    return in_test
