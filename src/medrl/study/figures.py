"""Answers -> matrices, means, gains and claims, each with its interval: what ``matrices.json`` holds.

All shares are of 1, differences too. What no answer can tell is None.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medrl.evaluation.intervals import Interval, wilson
from medrl.study.answers import Method, Table, unsolvable
from medrl.study.statistics import (
    DRAWS,
    Average,
    Layout,
    Spread,
    holm,
    interval,
    join_spreads,
    paired_test,
    scope_mean,
    seed_spread,
)

SCOPES = ("diagonal", "off_diagonal", "overall")
BLIND = "blind: "
"""Before the name of a rule, where it stands among methods."""


@dataclass(frozen=True, eq=False)
class _Drawn:
    """A method with its cell means, observed and drawn; what was not trained by domain stands in every row."""

    method: Method
    answers: np.ndarray
    """(R, Q) mean over seeds."""
    by_seed: np.ndarray
    """(S, R, M)"""
    cells: np.ndarray
    """(R, M)"""
    draws: np.ndarray
    """(D, R, M)"""


class AxisFigures:
    """The figures of one axis. ``as_dict`` is all of them."""

    def __init__(self, table: Table, draws: int = DRAWS) -> None:
        self.table = table
        self.layout = Layout(table.place, table.clusters, len(table.columns), draws)
        self.scopes = _scopes(table)
        best = next(method for method in table.blind if method.name == table.best_blind)
        self.bar = Method(BLIND + best.name, "blind", best.right)
        methods = [*table.methods, self.bar]
        averaged = [method.right.mean(axis=0) for method in methods]
        drawn, self.counts = self.layout.resample(averaged)
        shape = (len(table.rows), len(table.columns))
        self.drawn = {
            method.name: _Drawn(
                method,
                np.broadcast_to(answers, (shape[0], answers.shape[1])),
                np.stack([np.broadcast_to(self.layout.cell_means(seed), shape) for seed in method.right]),
                np.broadcast_to(self.layout.cell_means(answers), shape),
                np.broadcast_to(cells, (len(cells), *shape)),
            )
            for method, answers, cells in zip(methods, averaged, drawn, strict=True)
        }

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; see docs/study.md for every name."""
        table = self.table
        means = {method.name: self.means(method.name) for method in [*table.methods, self.bar]}
        return {
            "domains": table.columns,
            "trained_on": table.rows,
            "n": [int(count) for count in self.layout.counts],
            "n_clusters": self.layout.n_clusters,
            "methods": {m.name: {**self.matrix(m), "means": means[m.name]} for m in table.methods},
            "means": means,
            "gains": [self.gain(a, b) for a, b in self.gain_pairs()],
            "blind": {m.name: self.matrix(m)["accuracy"][0] for m in table.blind},
            "blind_intervals": {m.name: {k: self.matrix(m)[k][0] for k in ("low", "high", "n")} for m in table.blind},
            "blind_specialists": {m.name: self.matrix(m) for m in table.blind_specialists},
            "best_blind": table.best_blind,
            "claims": self.claims(),
        }

    def matrix(self, method: Method) -> dict[str, Any]:
        """Accuracies of a method's cells, mean over seeds, with Wilson intervals over questions."""
        cells = self.layout.cell_means(method.right.mean(axis=0))
        shares = [[_wilson(share, int(n)) for share, n in zip(row, self.layout.counts, strict=True)] for row in cells]
        return {
            "accuracy": [[share.value for share in row] for row in shares],
            "low": [[share.low for share in row] for row in shares],
            "high": [[share.high for share in row] for row in shares],
            "n": [[share.n for share in row] for row in shares],
            "trained_on": self.table.rows if len(cells) == len(self.table.rows) and method.kind == "trained" else None,
            "seeds": list(method.seeds),
            "by_seed": [_plain(self.layout.cell_means(seed)) for seed in method.right] if method.seeds else [],
            "mode": method.mode or None,
            "objective": method.objective or None,
        }

    def means(self, name: str) -> dict[str, Any]:
        """Mean over each scope, macro with micro beside it, and of every row and column."""
        found: dict[str, Any] = {scope: self._mean(name, mask) for scope, mask in self.scopes.items()}
        shape = (len(self.table.rows), len(self.table.columns))
        found["rows"] = [self._mean(name, _only(shape, row=row)) for row in range(shape[0])]
        found["columns"] = [self._mean(name, _only(shape, column=column)) for column in range(shape[1])]
        return found

    def gain(self, a: str, b: str) -> dict[str, Any]:
        """A minus B, cell by cell."""
        shape = (len(self.table.rows), len(self.table.columns))
        cells = [
            [self.difference(a, b, _only(shape, row=row, column=column)) for column in range(shape[1])]
            for row in range(shape[0])
        ]
        return {
            "a": a,
            "b": b,
            **{key: [[getattr(cell, key) for cell in row] for row in cells] for key in ("low", "high")},
            "difference": [[cell.value for cell in row] for row in cells],
            "means": {scope: _ends(self.difference(a, b, mask)) for scope, mask in self.scopes.items()},
        }

    def gain_pairs(self) -> list[tuple[str, str]]:
        """Over zero-shot; over supervised training; thinking over not thinking."""
        trained = [method for method in self.table.methods if method.kind == "trained"]
        first = self.table.methods[0].name
        supervised = [method for method in trained if method.objective == "sft"]
        reinforced = [method for method in trained if method.objective != "sft"]
        pairs = [(method.name, first) for method in trained]
        pairs += [(method.name, supervised[0].name) for method in reinforced if supervised]
        for mode in ("think", "think_after"):
            pairs += [
                (a.name, b.name)
                for a in trained
                for b in trained
                if a.objective == b.objective and (a.mode, b.mode) == (mode, "no_think")
            ]
        return list(dict.fromkeys(pairs))

    def difference(self, a: str, b: str, scope: np.ndarray, average: Average = "macro") -> Interval:
        """A minus B over a scope, paired by question."""
        ours, theirs = self.drawn[a], self.drawn[b]
        counts = self.layout.counts
        value = float(scope_mean(ours.cells, scope, counts, average) - scope_mean(theirs.cells, scope, counts, average))
        drawn = self._drawn_mean(ours, scope, average) - self._drawn_mean(theirs, scope, average)
        return interval(value, drawn, self.layout, self._spread([ours, theirs], scope, average))

    def claims(self) -> list[dict[str, Any]]:
        """Every trained method against every zero-shot row, the best blind rule and every method listed before it."""
        table = self.table
        zero_shot = [method.name for method in table.methods if method.kind == "zero_shot"]
        trained = [method.name for method in table.methods if method.kind == "trained"]
        pairs = [(a, b) for i, a in enumerate(trained) for b in [*zero_shot, self.bar.name, *trained[:i]]]
        scopes = {"overall": self.scopes["overall"]} if self.scopes["overall"].sum() == 1 else self.scopes
        claims = [self._claim(a, b, name, mask) for a, b in pairs for name, mask in scopes.items() if mask.any()]
        known = [claim for claim in claims if claim["p"] is not None]
        for claim, p in zip(known, holm([claim["p"] for claim in known]), strict=True):
            claim["p_holm"] = p
            apart = claim["low"] is not None and not claim["low"] <= 0 <= claim["high"]
            # Both must agree, as for two evaluations: the test has few assumptions less than the interval, not none.
            claim["shown"] = bool(p < 0.05 and apart)
        return claims

    def _claim(self, a: str, b: str, name: str, scope: np.ndarray) -> dict[str, Any]:
        ours, theirs = self.drawn[a], self.drawn[b]
        claim: dict[str, Any] = {"a": a, "b": b, "scope": name}
        found = self.difference(a, b, scope)
        claim |= {"difference": found.value, "low": found.low, "high": found.high}
        if found.value is None:
            return {**claim, "p": None, "p_holm": None, "detectable": None, "shown": False}
        spread = self._spread([ours, theirs], scope, "macro")
        test = paired_test(ours.answers - theirs.answers, scope, self.layout, spread)
        return {**claim, "p": test.p, "p_holm": test.p, "detectable": test.detectable, "shown": False}

    def _mean(self, name: str, scope: np.ndarray) -> dict[str, Any]:
        found = {average: self._interval(name, scope, average) for average in ("macro", "micro")}
        return {**_ends(found["macro"]), "micro": _ends(found["micro"])}

    def _interval(self, name: str, scope: np.ndarray, average: Average) -> Interval:
        one = self.drawn[name]
        value = float(scope_mean(one.cells, scope, self.layout.counts, average))
        if value in (0.0, 1.0):  # every draw says the same, which is no certainty: Wilson, with clusters for questions
            return self._all_alike(value, scope)
        drawn = self._drawn_mean(one, scope, average)
        return interval(value, drawn, self.layout, self._spread([one], scope, average))

    def _all_alike(self, value: float, scope: np.ndarray) -> Interval:
        asked = scope.any(axis=0)[self.table.place]
        n = len(np.unique(self.table.clusters[asked]))
        ends = wilson(value * n, n)
        known = n > 1
        return Interval(value, ends.low if known else None, ends.high if known else None, int(asked.sum()))

    def _drawn_mean(self, one: _Drawn, scope: np.ndarray, average: Average) -> np.ndarray:
        """(D,) means of the draws; a cell counts in every draw, its answers as often as they were drawn."""
        return scope_mean(one.draws, scope, self.layout.counts if average == "macro" else self.counts, average)

    def _spread(self, drawn: Sequence[_Drawn], scope: np.ndarray, average: Average) -> Spread:
        counts = self.layout.counts
        return join_spreads(
            [seed_spread([float(scope_mean(s, scope, counts, average)) for s in d.by_seed]) for d in drawn]
        )


def study_figures(tables: Sequence[Table], draws: int = DRAWS) -> dict[str, Any]:
    """Axis -> its figures, and the same over the questions that no blind rule of ours can answer."""
    return {table.axis: _axis(table, draws) for table in tables}


def _axis(table: Table, draws: int) -> dict[str, Any]:
    found = AxisFigures(table, draws).as_dict()
    kept = unsolvable(table)
    share = {"rule": table.best_blind, "share": float(kept.mean())}
    found["blind_unsolvable"] = share
    if kept.any():
        inner = AxisFigures(table.subset(kept), draws).as_dict()
        chosen = ("n", "n_clusters", "methods", "means", "gains", "claims")
        found["blind_unsolvable"] = {**share, **{name: inner[name] for name in chosen}}
    return found


def _scopes(table: Table) -> dict[str, np.ndarray]:
    same = np.array([[row == column for column in table.columns] for row in table.rows])
    return {"diagonal": same, "off_diagonal": ~same, "overall": np.ones_like(same)}


def _only(shape: tuple[int, int], row: int | None = None, column: int | None = None) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[slice(None) if row is None else row, slice(None) if column is None else column] = True
    return mask


def _wilson(share: float, n: int) -> Interval:
    return Interval(None, None, None, n) if math.isnan(share) else wilson(min(share * n, n), n)


def _ends(found: Interval) -> dict[str, float | None]:
    return {"value": found.value, "low": found.low, "high": found.high}


def _plain(cells: np.ndarray) -> list[list[float | None]]:
    return [[None if math.isnan(cell) else float(cell) for cell in row] for row in cells]


def by_name(claims: Sequence[Mapping[str, Any]], a: str, b: str, scope: str) -> Mapping[str, Any] | None:
    """The claim of A over B, when there is one."""
    return next((claim for claim in claims if (claim["a"], claim["b"], claim["scope"]) == (a, b, scope)), None)
