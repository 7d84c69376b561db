"""What the models of a study wrote: the base beside the specialist of each item's own domain."""

from pathlib import Path

from medrl.evaluation.metrics import summarize
from medrl.report.tables import Evaluation
from medrl.runs import read_records, read_summary
from medrl.study.plan import Cell, Plan, domain_of
from medrl.study.runner import state_of
from medrl.study.settings import ALL


def in_domain(plan: Plan, out: Path) -> list[Evaluation]:
    """The first zero-shot row's evaluation and, of every method, one put together: each question as the specialist of
    its own domain answered it (first axis that has specialists, else the axis `all`; first seed). A method that lacks
    an evaluation is left out.

    Empty when nothing can be laid side by side.
    """
    axis = next((axis for axis in plan.rows if axis != ALL), ALL)
    own = [row for row in plan.rows[axis] if row in plan.columns[axis]]
    base = plan.find(next(iter(plan.study.zero_shot)), None, None, None)
    parts = {
        method: {row: plan.find(method, axis, row, plan.study.seeds[0]) for row in own} for method in plan.study.methods
    }
    whole = {method: cells for method, cells in parts.items() if all(_done(cell, out) for cell in cells.values())}
    if not _done(base, out) or not whole or not own:
        return []
    shown = {base.method: dict.fromkeys(own, base), **whole}
    return [_together(name, cells, axis, out) for name, cells in shown.items()]


def _together(name: str, cells: dict[str, Cell], axis: str, out: Path) -> Evaluation:
    """Each domain's questions as its own model answered them."""
    records = [
        record
        for row, cell in cells.items()
        for record in read_records(cell.result(out))
        if domain_of(record, axis) == row
    ]
    first = next(iter(cells.values())).result(out)
    summary = {"store": read_summary(first).get("store")}
    return Evaluation(name=name, path=first, records=records, summary=summary, figures=summarize(records))


def _done(cell: Cell, out: Path) -> bool:
    return state_of(cell, out) == "done"
