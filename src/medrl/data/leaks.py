"""What a test set shares with a training set: pictures, near-duplicates of pictures, patients, whole questions."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medrl.data.fingerprints import TURNS, fingerprint_images
from medrl.data.near import find_near
from medrl.types import Example

FLAGS = ("images_exact", "near_duplicates", "patients", "question_answer")
"""Kinds of overlap, the names of the counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMatch:
    """One picture of the training set and one of the test set that are the same, or nearly."""

    train: Path
    test: Path
    exact: bool
    """The decoded pixels are equal."""
    agreement: float
    """Correlation of fine structure, 1 where exact."""
    turn: str
    """How the training picture was turned, one of ``fingerprints.TURNS``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaks:
    """Everything two sets share."""

    items: dict[str, tuple[str, ...]]
    """Test example id -> its flags of ``FLAGS``; only examples that have any."""
    matches: list[ImageMatch]
    """Each pair of pictures once, exact ones first, then the most alike."""
    patients_unknown: int
    """Test examples without a patient: nothing can be said about those."""
    same_wording: int
    """Test examples whose question and right answer, as text alone, occur in the training set: high where questions are
    made from templates, and no leak by itself."""

    def count(self, flag: str) -> int:
        """Test examples with that flag."""
        return sum(flag in flags for flags in self.items.values())


def find_leaks(train: Sequence[Example], test: Sequence[Example], *, quiet: bool = True) -> Leaks:
    """Compare two sets, example by example of the test set.

    ``images_exact``: an image has the decoded pixels of a training image. ``near_duplicates``: an image is, resized,
    compressed, mirrored, cropped a little or windowed anew, a training image with other pixels. ``patients``: same
    source and patient. ``question_answer``: the question and the text of its right answer, in any case and spacing,
    were in training about the same picture or a near-duplicate of it, or about no picture if there is none.

    Raises:
        ImageError: an image is missing or cannot be decoded.
    """
    records = fingerprint_images((image for row in (*train, *test) for image in row.images), quiet=quiet)
    sides = [_by_digest(rows, records) for rows in (train, test)]
    shared = sides[0].keys() & sides[1].keys()
    matches = [
        ImageMatch(train=sides[0][digest], test=sides[1][digest], exact=True, agreement=1.0, turn=TURNS[0])
        for digest in sorted(shared)
    ]
    near = _near_matches(sides[0], sides[1], records, quiet)
    alike = {digest: {digest} for digest in shared}  # test picture -> training pictures
    for match in near:
        alike.setdefault(_digest(records, match.test), set()).add(_digest(records, match.train))
    near_test = {_digest(records, match.test) for match in near}
    patients = {(row.source, row.patient) for row in train if row.patient is not None}
    asked: dict[tuple[str, str], set[bytes]] = defaultdict(set)
    for row in train:
        asked[_wording(row)] |= {_digest(records, image) for image in row.images} or {b""}
    items = {}
    for row in test:
        digests = {_digest(records, image) for image in row.images}
        about = {other for digest in digests for other in alike.get(digest, ())} if digests else {b""}
        found = {
            "images_exact": bool(digests & shared),
            "near_duplicates": bool(digests & near_test),
            "patients": row.patient is not None and (row.source, row.patient) in patients,
            "question_answer": bool(about & asked.get(_wording(row), set())),
        }
        if any(found.values()):
            items[row.id] = tuple(flag for flag in FLAGS if found[flag])
    return Leaks(
        items=items,
        matches=matches + near,
        patients_unknown=sum(row.patient is None for row in test),
        same_wording=sum(_wording(row) in asked for row in test),
    )


def _by_digest(rows: Sequence[Example], records: dict[Path, np.void]) -> dict[bytes, Path]:
    """Each picture once, with the first file that shows it."""
    first: dict[bytes, Path] = {}
    for row in rows:
        for image in row.images:
            first.setdefault(_digest(records, image), image)
    return first


def _near_matches(
    train: dict[bytes, Path], test: dict[bytes, Path], records: dict[Path, np.void], quiet: bool
) -> list[ImageMatch]:
    if not train or not test:
        return []
    train_images, test_images = list(train.values()), list(test.values())
    of_train, of_test = (np.array([records[image] for image in images]) for images in (train_images, test_images))
    matches = [
        ImageMatch(
            train=train_images[pair.a],
            test=test_images[pair.b],
            exact=False,
            agreement=pair.agreement,
            turn=TURNS[pair.turn],
        )
        for pair in find_near(of_train, of_test, quiet=quiet)
        if of_train[pair.a]["digest"].tobytes() != of_test[pair.b]["digest"].tobytes()
    ]
    return sorted(matches, key=lambda match: (-match.agreement, str(match.test)))


def _digest(records: dict[Path, np.void], image: Path) -> bytes:
    return records[image]["digest"].tobytes()


def _wording(row: Example) -> tuple[str, str]:
    question, answer = (" ".join(text.split()).casefold() for text in (row.question, row.target_text))
    return question, answer
