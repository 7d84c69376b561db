"""A study from its settings to its page: stores -> plan -> cells -> figures -> tables and page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medrl.errors import RunError
from medrl.files import write_json_atomically
from medrl.runs import PLAN
from medrl.settings import dump_settings, load_settings
from medrl.study.answers import read_tables
from medrl.study.claims import EXPIRY_S
from medrl.study.estimate import CALIBRATION, calibrate, estimate, plan_lines, time_left
from medrl.study.figures import study_figures
from medrl.study.page import write_study_page
from medrl.study.plan import Plan, make_plan
from medrl.study.runner import Outcome, Say, forget_failures, run_cells, state_of
from medrl.study.settings import Study
from medrl.study.stores import prepare_stores
from medrl.study.tables import write_tables
from medrl.study.work import command, run_cell

PAGE = "study.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A study whose cells are known."""

    plan: Plan
    out: Path

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON: what ``medrl study --plan --json`` prints."""
        found = estimate(self.plan, self.out, _calibration(self.out))
        return {
            "name": self.plan.study.name,
            "stores": {"train": str(self.plan.stores.train), "test": str(self.plan.stores.test)},
            "axes": {
                axis: {"trained_on": rows, "tested_on": self.plan.columns[axis], "n_train": self.plan.n_train[axis]}
                for axis, rows in self.plan.rows.items()
            },
            "test_questions": self.plan.n_test,
            "estimate": found,
            "cells": [
                {
                    "id": cell.id,
                    "kind": cell.kind,
                    "method": cell.method,
                    "axis": cell.axis,
                    "domain": cell.domain,
                    "seed": cell.seed,
                    "mode": cell.ask.mode,
                    "steps": cell.recipe.training.steps if cell.kind == "train" else None,
                    "needs": cell.needs,
                    "state": state_of(cell, self.out),
                    "command": command(self.plan, cell, self.out),
                }
                for cell in self.plan.cells
            ],
        }

    def lines(self) -> list[str]:
        """The plan in words."""
        states = [state_of(cell, self.out) for cell in self.plan.cells]
        return plan_lines(self.plan, estimate(self.plan, self.out, _calibration(self.out)), states)


def open_study(recipe: Path, overrides: Sequence[str] = (), *, out: Path, quiet: bool = False) -> Opened:
    """Read the settings, make the stores and work out the cells; nothing is trained.

    Raises SettingsError, DataError or RunError for what cannot be a study, or for a folder of something else.
    """
    study = load_settings(Study, recipe, overrides)
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; a study needs a folder: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    stores = prepare_stores(study.data, out, quiet=quiet)
    return Opened(plan=make_plan(study, stores, recipe.parent), out=out)


def measure(opened: Opened) -> None:
    """Try a few steps and answers, so that the plan can say how long it takes; done once."""
    if any(state_of(cell, opened.out) == "waiting" for cell in opened.plan.cells):
        calibrate(opened.plan, opened.out)


def run_study(
    opened: Opened,
    *,
    say: Say,
    retry_failed: bool = False,
    expiry_s: float = EXPIRY_S,
    poll_s: float = 1.0,
    quiet: bool = True,
) -> Outcome:
    """Do what is left to do, together with whoever else works in the folder, then write figures and page.

    ``quiet`` leaves out the progress inside cells. Raises Stopped or KeyboardInterrupt when asked to stop: the same
    call continues.
    """
    plan, out = opened.plan, opened.out
    write_json_atomically(out / "study.json", dump_settings(plan.study))
    cells = [{"id": c.id, "kind": c.kind, "method": c.method, "needs": c.needs} for c in plan.cells]
    write_json_atomically(out / PLAN, {"cells": cells})  # for who watches
    if retry_failed:
        for cell in forget_failures(plan.cells, out):
            say(f"tried again: {cell.id}")
    outcome = run_cells(
        plan.cells,
        out,
        lambda cell: run_cell(plan, cell, out, quiet=quiet),
        say=say,
        time_left=lambda: time_left(plan, out, _calibration(out)),
        expiry_s=expiry_s,
        poll_s=poll_s,
    )
    if any(cell.kind == "eval" for cell in outcome.done):
        write_results(opened)
    return outcome


def write_results(opened: Opened) -> dict[str, Any]:
    """Figures of the evaluations that are done: ``matrices.json``, ``tables/``, ``study.html``. Returns the figures."""
    figures = study_figures(read_tables(opened.plan, opened.out))
    write_tables(figures, opened.out)
    write_study_page(opened.plan, opened.out, figures, opened.out / PAGE)
    return figures


def _calibration(out: Path) -> dict[str, Any] | None:
    import json

    file = out / CALIBRATION
    return json.loads(file.read_text()) if file.exists() else None
