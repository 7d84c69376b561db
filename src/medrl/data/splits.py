"""Train and test sets that share no picture (or patient, or source), by domain.

examples -> parts: those joined by a picture, a near-duplicate, a patient or a source, through any number of steps
parts -> train or test, whole, once for all domains: so a specialist of one domain has not seen another's test images

Draws are sha256 of seed and ids, so the same examples and seed give the same division on any machine.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medrl.data.fingerprints import fingerprint_images
from medrl.data.near import clusters, find_near
from medrl.errors import DataError, SettingsError
from medrl.types import Example

KeepTogether = Literal["image", "patient", "source", "none"]
By = Literal["modality", "question_type", "source"]

DOMAINS: dict[str | None, Callable[[Example], str]] = {
    None: lambda example: "all",
    "modality": lambda example: example.modality,
    "question_type": lambda example: example.question_type,
    "source": lambda example: example.source,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """A named way to divide."""

    test_fraction: float
    keep_together: KeepTogether
    by: By | None = None
    """What its domains are; None leaves that open."""
    trained: tuple[str, ...] = ()
    """Domains that get a training set; empty: all."""
    tested: tuple[str, ...] = ()
    """Domains that get a test set; empty: all."""
    train_size: int | None = None
    test_size: int | None = None


PROTOCOLS = {
    "med-r1": Protocol(test_fraction=0.2, keep_together="none"),
    "med-r1-disjoint": Protocol(test_fraction=0.2, keep_together="image"),
    "medvlm-r1": Protocol(
        test_fraction=0.2,
        keep_together="image",
        by="modality",
        trained=("MRI",),
        tested=("MRI", "CT", "X-Ray"),
        train_size=600,
        test_size=300,
    ),
}
"""Med-R1, arXiv 2503.13939: 80/20 by question, so that 2 to 33 % of a modality's test questions show a training image;
and the same with no image on both sides. MedVLM-R1, arXiv 2502.19634: 600 questions on MRI to train on, 300 on each of
MRI, CT and X-ray to test on; which 600 it took is not public, so they are drawn here, with no image on both sides."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Examples that must stay on one side."""

    members: tuple[int, ...]
    sizes: Counter[str]
    """Members by domain."""
    strata: tuple[tuple[tuple[str, str], int], ...]
    """Members by modality and question type."""


def split_examples(
    examples: Sequence[Example],
    *,
    test_fraction: float,
    seed: int,
    keep_together: KeepTogether = "image",
    by: By | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    trained: Sequence[str] = (),
    tested: Sequence[str] = (),
    quiet: bool = True,
) -> dict[str, tuple[list[Example], list[Example]]]:
    """Domain -> (train, test), each in the order of ``examples``, stratified by modality and question type.

    Args:
        examples: what to divide; they need not come from one store.
        test_fraction: share of each domain that goes to test, to within one part; parts are not torn to meet it.
        seed: names the division; the order of ``examples`` does not matter to it.
        keep_together: ``image``: examples that show the same picture (same decoded pixels, or near-duplicates) stay
            together; ``patient``: and those of the same patient of the same source; ``source``: and those of one
            source; ``none``: each example on its own.
        by: what a domain is; None: one domain named ``all``.
        train_size, test_size: keep this many of each domain's side, stratified; the smaller lies inside the larger.
        trained, tested: domains that are wanted in training and in test; empty: all. Others are left out.
        quiet: show no progress while images are read.

    A domain of at least two parts has both a train and a test set; a domain of one part has only one of them.
    Where parts reach over several domains, all shares may not be had at once; they are then brought as near as moving
    single parts brings them.

    Raises:
        SettingsError: an argument that cannot mean anything.
        DataError: no examples, an example without a patient where patients are to be kept together, domains so
            entangled that no division leaves each a train and a test set, or a side smaller than the size wanted.
    """
    if not 0 < test_fraction < 1:
        raise SettingsError(f"--test (test_fraction) is {test_fraction}, but it must lie between 0 and 1, e.g. 0.2")
    if keep_together not in KEYS:
        raise SettingsError(f"keep_together is {keep_together!r}, but it must be one of {', '.join(KEYS)}")
    if by not in DOMAINS:
        names = ", ".join(name for name in DOMAINS if name)
        raise SettingsError(f"by is {by!r}, but it must be {names} or None")
    for name, size in (("train_size", train_size), ("test_size", test_size)):
        if size is not None and size < 1:
            raise SettingsError(f"--{name.replace('_', '-')} is {size}, but it must be at least 1")
    if not examples:
        raise DataError("there are no examples to split")
    domain_of = DOMAINS[by]
    if trained and tested:
        examples = _of_domains(examples, {*trained, *tested}, domain_of)
    parts = _find_parts(examples, KEYS[keep_together](examples, quiet), domain_of)
    # Kinds of parts one after the other: the running count then gives each kind its share, and the whole too.
    parts.sort(key=lambda part: (part.strata, _draw(seed, [examples[member].id for member in part.members])))
    in_test = _repair(parts, _polish(parts, _assign(parts, test_fraction), test_fraction))
    test_members = {member for part, test in zip(parts, in_test, strict=True) if test for member in part.members}
    result: dict[str, tuple[list[Example], list[Example]]] = {}
    for index, example in enumerate(examples):
        result.setdefault(domain_of(example), ([], []))[index in test_members].append(example)
    return {
        domain: (
            _sized(train, train_size, seed, domain, "train") if not trained or domain in trained else [],
            _sized(test, test_size, seed, domain, "test") if not tested or domain in tested else [],
        )
        for domain, (train, test) in result.items()
    }


def take_subset(examples: Sequence[Example], size: int, seed: int) -> list[Example]:
    """``size`` of the examples in their order, stratified by modality and question type; smaller subsets lie in larger.

    Each stratum is shuffled and spread evenly over one queue; a subset is the head of that queue.
    """
    strata: dict[tuple[str, str], list[Example]] = defaultdict(list)
    for example in sorted(examples, key=lambda example: _draw(seed, [example.id])):
        strata[example.modality, example.question_type].append(example)
    queue = [
        ((place + 0.5) / len(members), _draw(seed, [example.id]), example.id)
        for members in strata.values()
        for place, example in enumerate(members)
    ]
    taken = {id for _, _, id in sorted(queue)[:size]}
    return [example for example in examples if example.id in taken]


def slug(domain: str) -> str:
    """A domain's short name in paths and tables: ``Disease Diagnosis`` -> ``disease-diagnosis``."""
    return re.sub(r"[\W_]+", "-", domain.casefold()).strip("-") or "unnamed"


def image_keys(examples: Sequence[Example], quiet: bool = True) -> list[list[Hashable]]:
    """Per example, the pictures it shows; near-duplicates count as one picture."""
    records = fingerprint_images((image for row in examples for image in row.images), quiet=quiet)
    by_digest = {record["digest"].tobytes(): record for record in records.values()}
    pairs = find_near(np.array(list(by_digest.values())), quiet=quiet) if len(by_digest) > 1 else []
    names = list(by_digest)
    first = clusters(len(names), [(pair.a, pair.b) for pair in pairs])
    picture = {name: names[first[place]] for place, name in enumerate(names)}
    return [[("picture", picture[records[image]["digest"].tobytes()]) for image in row.images] for row in examples]


def patient_keys(examples: Sequence[Example], quiet: bool = True) -> list[list[Hashable]]:
    """Image keys and the patient; DataError when a patient is unknown, for a guess would be a leak nobody sees."""
    unknown = [row.id for row in examples if row.patient is None]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(examples)} examples have no patient, e.g. {unknown[0]!r}, so patients cannot be "
            "kept together: use --keep-together image, which needs no patients, or import the data with its "
            "patient column, --map patient=COLUMN"
        )
    keys = image_keys(examples, quiet)
    return [[*keys[index], ("patient", row.source, row.patient)] for index, row in enumerate(examples)]


def source_keys(examples: Sequence[Example], quiet: bool = True) -> list[list[Hashable]]:
    """Image keys and the source: whole data sets go to one side."""
    keys = image_keys(examples, quiet)
    return [[*keys[index], ("source", row.source)] for index, row in enumerate(examples)]


def no_keys(examples: Sequence[Example], quiet: bool = True) -> list[list[Hashable]]:
    return [[] for _ in examples]


KEYS: dict[str, Callable[[Sequence[Example], bool], list[list[Hashable]]]] = {
    "image": image_keys,
    "patient": patient_keys,
    "source": source_keys,
    "none": no_keys,
}


def _of_domains(
    examples: Sequence[Example], wanted: set[str], domain_of: Callable[[Example], str]
) -> Sequence[Example]:
    present = {domain_of(example) for example in examples}
    if not wanted <= present:
        raise DataError(
            f"there are no examples of {', '.join(sorted(wanted - present))}; there are {', '.join(sorted(present))}"
        )
    return [example for example in examples if domain_of(example) in wanted]


def _sized(side: list[Example], size: int | None, seed: int, domain: str, name: str) -> list[Example]:
    if size is None or not side:
        return side
    if size > len(side):
        has = f"domain {domain!r} has {len(side)} {name} examples"
        raise DataError(f"{has}, but --{name}-size is {size}: ask for fewer")
    return take_subset(side, size, seed)


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
    return [
        _Part(
            tuple(own),
            Counter(domain_of(examples[i]) for i in own),
            tuple(sorted(Counter((examples[i].modality, examples[i].question_type) for i in own).items())),
        )
        for own in members.values()
    ]


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


def _polish(parts: Sequence[_Part], in_test: list[bool], test_fraction: float) -> list[bool]:
    """Move single parts while a domain is off its share by more than half its largest part and a move helps."""
    in_test = list(in_test)
    total: Counter[str] = Counter()
    excess: dict[str, float] = defaultdict(float)
    largest: Counter[str] = Counter()
    for part, test in zip(parts, in_test, strict=True):
        total.update(part.sizes)
        for domain, size in part.sizes.items():
            excess[domain] += size * test
            largest[domain] = max(largest[domain], size)
    for domain in total:
        excess[domain] -= test_fraction * total[domain]

    def change(index: int) -> float:
        """Of the sum of squared excesses, if the part changed sides."""
        sign = -1 if in_test[index] else 1
        return sum(size * size + 2 * sign * size * excess[domain] for domain, size in parts[index].sizes.items())

    while any(abs(excess[domain]) > largest[domain] / 2 for domain in total):
        best = min(range(len(parts)), key=change)
        if change(best) >= -1e-9:
            break
        in_test[best] = not in_test[best]
        for domain, size in parts[best].sizes.items():
            excess[domain] += size if in_test[best] else -size
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
                    "the other side; --by none divides all of them as one domain, or add examples"
                )
            moved = min(movable, key=lambda index: sum(parts[index].sizes.values()))
            in_test[moved] = wanted
            for other in parts[moved].sizes:
                sides[other, wanted] += 1
                sides[other, not wanted] -= 1
    return in_test
