"""The order in which examples are drawn: a pure function of the seed, so a resumed run draws what it would have drawn.

stream = order(seed, 0) ++ order(seed, 1) ++ ...        each an order of all examples; ``position`` is a place in it
"""

import copy
import hashlib
from collections.abc import Sequence

import numpy as np

from medrl.errors import SettingsError


class Sampler:
    """Draws example indices without end. Its whole state is ``position``."""

    def __init__(self, n_examples: int, seed: int, position: int = 0, ranks: Sequence[float] | None = None) -> None:
        """
        Args:
            n_examples: size of the data set, at least 1.
            seed: names the order.
            position: how many examples have been drawn; 0 at the start, the saved value on resume.
            ranks: one per example; every epoch then goes from the lowest to the highest, the seed orders equal ones.
        """
        if n_examples < 1:
            raise SettingsError(f"n_examples is {n_examples}, but there must be at least 1 example to draw from")
        if position < 0:
            raise SettingsError(f"position is {position}, but the number of examples drawn cannot be negative")
        assert ranks is None or len(ranks) == n_examples
        self.n_examples = n_examples
        self.seed = seed
        self.ranks = ranks
        self.position = position
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def epoch(self) -> int:
        """Epoch of the next example, from 0."""
        return self.position // self.n_examples

    def next(self, k: int) -> list[int]:
        """The next ``k`` indices; no index twice unless ``k`` exceeds the number of examples.

        Where the ``k`` run over the end of an epoch, an example of the new epoch that was just drawn from the old one
        gives its turn to one from the far end of the new epoch, which then has two. Only such edges depart from "each
        example once an epoch"; there are none when ``k`` divides the number of examples.
        """
        if k < 1:
            raise SettingsError(f"k is {k}, but at least 1 example must be drawn")
        places = range(self.position, self.position + k)
        drawn = [self._at(place) for place in places]
        if k <= self.n_examples and len(set(drawn)) < k:
            drawn = self._without_repeats(drawn, last=places[-1] // self.n_examples)
        self.position += k
        return drawn

    def peek(self, k: int, *, skip: int = 0) -> list[int]:
        """What ``next(k)`` would draw once ``skip`` more examples are drawn; nothing is drawn."""
        later = copy.copy(self)
        later.position += skip
        return later.next(k)

    def _without_repeats(self, drawn: list[int], last: int) -> list[int]:
        """``drawn`` with second occurrences replaced by the latest of epoch ``last`` that are not in it."""
        present = set(drawn)
        spare = (
            index
            for index in epoch_order(self.n_examples, self.seed, last, self.ranks)[::-1].tolist()
            if index not in present
        )
        seen: set[int] = set()
        unique = []
        for index in drawn:
            unique.append(next(spare) if index in seen else index)
            seen.add(index)
        return unique

    def _at(self, place: int) -> int:
        epoch, offset = divmod(place, self.n_examples)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.n_examples, self.seed, epoch, self.ranks))
        return int(self._order[1][offset])


def epoch_order(n_examples: int, seed: int, epoch: int, ranks: Sequence[float] | None = None) -> np.ndarray:
    """(n_examples,) int64: the order of all examples in ``epoch``, by ``ranks`` where they are given.

    Sorting Philox's raw words instead of calling ``Generator.permutation``: NumPy keeps the bit stream of a generator
    the same over its versions, but not what its methods make of it.
    """
    key = hashlib.sha256(f"medrl order {seed} {epoch}".encode()).digest()[:16]
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(n_examples)
    order = np.argsort(words, kind="stable")
    return order if ranks is None else order[np.argsort(np.asarray(ranks)[order], kind="stable")]
