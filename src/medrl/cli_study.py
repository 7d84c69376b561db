"""The command that makes a whole study: study."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medrl import terminal

if TYPE_CHECKING:
    from medrl.study.runner import Outcome
    from medrl.study.study import Opened


def study(
    recipe: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="Data, domains, methods, seeds.")],
    out: Annotated[Path, typer.Option(help="The study's folder; several workers may share it.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings to change, e.g. 'seeds=[0,1,2]'.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the cells and stop. Divides the data, trains nothing.")
    ] = False,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            help="Run a few steps and answers to estimate time and disk.  [default: before a run, not for --plan]"
        ),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Retry failed cells.")] = False,
    expiry: Annotated[
        float, typer.Option(min=1, help="Seconds of silence after which a worker on another machine counts as dead.")
    ] = 120.0,
    workers: Annotated[
        int,
        typer.Option(min=1, help="Processes that share the work here, each on a GPU of its own where there are any."),
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Train specialists, test each on every domain.

    And say what is significant. Every cell is one training or one evaluation. Stopped or killed, the same command
    continues; the same command on another GPU or node, with the same --out on a shared disk, takes cells from the same
    study. Finished cells are reused. Leaves matrices.json, tables/ (CSV, Markdown, LaTeX) and study.html.

    Exit code 1: a cell failed; the rest was done, and --retry-failed tries it again.

    \b
    Example:
      medrl study recipes/study-mini.yaml --plan --out runs/study-mini
      medrl study recipes/study-mini.yaml --out runs/study-mini
      medrl study recipes/study-med-r1.yaml --workers 8 --out runs/study-med-r1
    """
    from medrl.study.runner import forget_failures
    from medrl.study.study import measure, open_study, run_study
    from medrl.study.workers import run_workers

    terminal.quiet_libraries()
    opened = open_study(recipe, overrides or (), out=out, quiet=as_json)
    if retry_failed and not plan:  # before the estimate counts what is left, and once for all workers
        for cell in forget_failures(opened.plan.cells, out):
            typer.echo(f"tried again: {cell.id}", err=True)
    if calibrate if calibrate is not None else not plan:
        measure(opened)
    if plan:
        typer.echo(json.dumps(opened.as_dict(), indent=2) if as_json else "\n".join(opened.lines()))
        return
    if not as_json:
        typer.echo("\n".join(opened.lines()))
    if workers > 1:
        # --json: their bars would be drawn over each other.
        words = ["study", str(recipe), *(overrides or ()), "--out", str(out), "--no-calibrate", "--json"]
        run_workers([*words, "--expiry", str(expiry)], workers)
    outcome = run_study(  # where workers were, what they left, and the figures
        opened,
        say=lambda line: typer.echo(line, err=True),
        expiry_s=expiry,
        quiet=as_json or not sys.stderr.isatty(),  # inside a cell there is a bar, or nothing
    )
    _show(opened, outcome, as_json)
    if outcome.failed:
        terminal.fail(f"{len(outcome.failed)} cells failed; --retry-failed tries them again", 1)


def _show(opened: "Opened", outcome: "Outcome", as_json: bool) -> None:
    from medrl.study.sentences import answer
    from medrl.study.tables import MATRICES

    file = opened.out / MATRICES
    figures = json.loads(file.read_text()) if file.exists() else {}
    if as_json:
        counts = {name: [cell.id for cell in getattr(outcome, name)] for name in ("done", "failed", "blocked")}
        terminal.print_json({**counts, "matrices": figures})
        return
    for axis, found in figures.items():
        rows = [
            (name, *(terminal.percent(means[scope]["value"]) for scope in ("diagonal", "off_diagonal", "overall")))
            for name, means in found["means"].items()
        ]
        terminal.print_table(f"Mean accuracy by {axis}", ["", "in domain", "off domain", "overall"], rows)
        typer.echo("\n".join(f"- {sentence}" for sentence in answer(found)))
    typer.echo(f"{opened.out / 'study.html'}\n{file}")
