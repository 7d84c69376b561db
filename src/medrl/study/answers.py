"""Finished evaluations -> who has which question right, as arrays: what every figure of a study is computed from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from medrl.data import store
from medrl.errors import RunError
from medrl.evaluation.blind import BlindResult, best_blind, blind_baselines
from medrl.evaluation.compare import cluster_of
from medrl.runs import read_records
from medrl.study.plan import Cell, Plan, domain_of
from medrl.study.runner import state_of
from medrl.types import EvalRecord

MethodKind = Literal["zero_shot", "trained", "blind"]


@dataclass(frozen=True, eq=False)
class Method:
    """One method's answers to the questions of one axis."""

    name: str
    kind: MethodKind
    right: np.ndarray
    """(S, R, Q) 1 for right, 0 for wrong; NaN where a specialist is missing. R is 1 for what does not differ by row."""
    seeds: tuple[int, ...] = ()
    """Of the first axis; empty where there is none."""
    objective: str = ""
    """grpo, sft or rft; empty for what was not trained."""
    mode: str = ""


@dataclass(frozen=True, eq=False)
class Table:
    """Everything known of one axis."""

    axis: str
    rows: list[str]
    columns: list[str]
    place: np.ndarray
    """(Q,) column of each question."""
    clusters: np.ndarray
    """(Q,) number of each question's image or patient."""
    methods: list[Method]
    """Zero-shot rows, then the trained ones, as the study lists them."""
    blind: list[Method]
    """Rules that see no image, fit on the training questions of all rows."""
    blind_specialists: list[Method]
    """The same, fit on the training questions of one domain each."""
    best_blind: str

    def subset(self, kept: np.ndarray) -> "Table":
        """The same of some of the questions, (Q,) true for those."""
        _, clusters = np.unique(self.clusters[kept], return_inverse=True)

        def cut(methods: Sequence[Method]) -> list[Method]:
            return [Method(m.name, m.kind, m.right[:, :, kept], m.seeds, m.objective, m.mode) for m in methods]

        return Table(
            self.axis, self.rows, self.columns, self.place[kept], clusters, cut(self.methods), cut(self.blind),
            cut(self.blind_specialists), self.best_blind,
        )  # fmt: skip


def read_tables(plan: Plan, out: Path) -> list[Table]:
    """One table per axis, from the evaluations that are done.

    Raises RunError when an evaluation is over other questions than the test store's.
    """
    train, test = store.load(plan.stores.train), store.load(plan.stores.test)
    ids = [example.id for example in test]
    right, records = {}, None
    for cell in plan.cells:
        if cell.kind == "eval" and state_of(cell, out) == "done":
            records = read_records(cell.result(out))
            right[cell.id] = _in_order(records, ids, cell, out)
    if records is None:
        raise RunError(f"{out} has no finished evaluation: nothing can be said yet")
    by_id = {record.id: record for record in records}
    names = [cluster_of(by_id[id], plan.study.evaluation.cluster) for id in ids]
    clusters = np.unique(names, return_inverse=True)[1]
    tables = []
    for axis, rows in plan.rows.items():
        columns = plan.columns[axis]
        domains = [domain_of(example, axis) for example in test]
        kept = np.array([domain in columns for domain in domains])
        by_row = {row: blind_baselines([x for x in train if domain_of(x, axis) == row], test) for row in rows}
        fitted = blind_baselines([example for example in train if domain_of(example, axis) in rows], test)
        table = Table(
            axis=axis,
            rows=rows,
            columns=columns,
            place=np.array([columns.index(domain) if domain in columns else -1 for domain in domains]),
            clusters=clusters,
            methods=_methods(plan, axis, right, len(ids)),
            blind=[Method(result.name, "blind", _blind_rows([result])) for result in fitted],
            blind_specialists=[
                Method(result.name, "blind", _blind_rows([by_row[row][index] for row in rows]))
                for index, result in enumerate(fitted)
            ],
            best_blind=best_blind(fitted).name,
        )
        tables.append(table.subset(kept))
    return tables


def unsolvable(table: Table) -> np.ndarray:
    """(Q,) true for questions that the best blind rule has wrong."""
    best = next(method for method in table.blind if method.name == table.best_blind)
    return best.right[0, 0] == 0


def _methods(plan: Plan, axis: str, right: Mapping[str, np.ndarray], n: int) -> list[Method]:
    missing = np.full(n, np.nan)
    methods = []
    for name, ask in plan.study.zero_shot.items():
        answers = right.get(plan.find(name, None, None, None).id, missing)
        methods.append(Method(name, "zero_shot", answers[None, None], mode=ask.mode))
    for name in plan.study.methods:
        cells = {seed: [plan.find(name, axis, row, seed) for row in plan.rows[axis]] for seed in plan.study.seeds}
        whole = [seed for seed, row_cells in cells.items() if all(cell.id in right for cell in row_cells)]
        # A seed that misses a specialist would compare other domains: it counts only where no seed is whole.
        seeds = tuple(whole or plan.study.seeds[:1])
        answers = np.stack([np.stack([right.get(cell.id, missing) for cell in cells[seed]]) for seed in seeds])
        first = cells[seeds[0]][0]
        methods.append(Method(name, "trained", answers, seeds, first.recipe.method, first.ask.mode))
    return methods


def _blind_rows(results: Sequence[BlindResult]) -> np.ndarray:
    return np.array([[result.correct for result in results]], dtype=float)


def _in_order(records: Sequence[EvalRecord], ids: Sequence[str], cell: Cell, out: Path) -> np.ndarray:
    correct = {record.id: record.correct for record in records}
    if correct.keys() != set(ids):
        raise RunError(
            f"{cell.result(out)} answers other questions than the test store has: delete {cell.folder(out)} and start "
            "the study again"
        )
    return np.array([correct[id] for id in ids], dtype=float)
