"""The report: one HTML file that needs no network and no other file. Its one script filters and sorts test items;
all of it can be read without.

What models and data sets wrote is text to be shown, never markup: the template escapes everything, invisible
characters are spelled out, images are encoded anew, and the page's own policy forbids connections and every script but
this one, which it knows by its hash.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from medrl.errors import RunError
from medrl.evaluation.intervals import Interval
from medrl.evaluation.samples import summarize_samples
from medrl.files import write_text_atomically
from medrl.report import lead, plots
from medrl.report.environment import filter_script, page_environment
from medrl.report.gallery import RULE, by_heading, choose_items, filters
from medrl.report.monitors import Reading, read_monitors
from medrl.report.tables import (
    DomainRow,
    Evaluation,
    Field,
    best_blind_name,
    blind_of,
    by_test_set,
    compare_to_best_blind,
    domain_rows,
    evaluation_alarms,
    failure_rows,
    headline_rows,
    read_evaluation,
    run_alarms,
)
from medrl.runs import SUMMARY, Run, is_evaluation, is_run, read_summary

MAX_TITLE_NAMES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPart:
    """One run as the page shows it."""

    name: str
    run: Run
    metrics: list[dict[str, Any]]
    checkpoints: list[str]
    monitors: list[Reading]

    @property
    def recipe_yaml(self) -> str:
        return yaml.safe_dump(self.run.recipe, sort_keys=False, allow_unicode=True)


def write_report(dirs: Sequence[Path], out: Path, *, title: str | None = None) -> Path:
    """Write the report over run folders and evaluation folders; a run brings its evaluations along.

    ``title`` None: the names of the runs.

    Raises RunError when a folder is neither, or when there is nothing to report.
    """
    out = Path(out)
    if out.is_dir():
        raise RunError(f"--out {out} is a folder: give a file, e.g. {out / 'report.html'}")
    runs, evaluations = _gather([Path(folder) for folder in dirs])
    groups = by_test_set(evaluations)
    test_sets = [_test_set_part(group) for group in groups]
    page = (
        page_environment()
        .get_template("report.html.jinja")
        .render(
            **filter_script(),
            title=title or _title([part.name for part in runs] or [evaluation.name for evaluation in evaluations]),
            runs=runs,
            asked=lead.asked([(part.name, part.run, len(part.metrics)) for part in runs], groups),
            answers=[lead.answer(group) for group in groups],
            commands=lead.commands([(part.name, part.run) for part in runs], groups),
            curves=_curves(runs),
            test_sets=test_sets,
            alarms=_alarms(runs, test_sets),
            provenance=[(evaluation.name, lead.provenance(evaluation)) for evaluation in evaluations],
            gallery_rule=RULE,
            flatten=lead.flatten,
        )
    )
    write_text_atomically(out, page)
    return out


def _title(names: Sequence[str]) -> str:
    """The first few names; all of them stand in the results and the provenance."""
    more = f" and {len(names) - MAX_TITLE_NAMES} more" if len(names) > MAX_TITLE_NAMES else ""
    return ", ".join(names[:MAX_TITLE_NAMES]) + more


def _gather(dirs: Sequence[Path]) -> tuple[list[RunPart], list[Evaluation]]:
    runs, folders = [], {}
    for folder in dirs:
        if is_run(folder):
            runs.append(_run_part(folder))
            folders.update({path.resolve(): path for path in _evaluations_in_order(runs[-1].run)})
        elif is_evaluation(folder):
            folders.setdefault(folder.resolve(), folder)
        else:
            raise RunError(
                f"{folder} is neither a run folder (recipe.yaml) nor a finished evaluation folder "
                "(records.jsonl and summary.json)"
            )
    evaluations = [read_evaluation(path) for path in folders.values()]
    names = Counter(evaluation.name for evaluation in evaluations)
    evaluations = [
        dataclasses.replace(evaluation, name=f"{_owner(evaluation.path)}/{evaluation.name}")
        if names[evaluation.name] > 1
        else evaluation
        for evaluation in evaluations
    ]
    if not any(evaluation.records for evaluation in evaluations) and not any(part.metrics for part in runs):
        given = ", ".join(map(str, dirs)) or "no folder"
        raise RunError(f"nothing to report in {given}: no training step and no evaluation record")
    return runs, [evaluation for evaluation in evaluations if evaluation.records]


def _evaluations_in_order(run: Run) -> list[Path]:
    """As they were made: the first one is what the others are compared with."""

    def started(path: Path) -> str:
        written = datetime.fromtimestamp((path / SUMMARY).stat().st_mtime, UTC)
        return str(read_summary(path).get("started") or written.isoformat())

    return sorted(run.evals().values(), key=started)


def _owner(path: Path) -> str:
    path = path.resolve()
    return path.parent.parent.name if path.parent.name == "eval" else path.parent.name


def _run_part(folder: Path) -> RunPart:
    run = Run.open(folder)
    checkpoints = sorted(path.name for path in run.checkpoints.glob("step-*") if path.is_dir())
    metrics = run.metrics()
    monitors = read_monitors(run, metrics)
    return RunPart(name=folder.resolve().name, run=run, metrics=metrics, checkpoints=checkpoints, monitors=monitors)


def _curves(runs: Sequence[RunPart]) -> list[tuple[str, str, str]]:
    metrics = [part.metrics for part in runs]
    return [(*plots.curve_title(name), plots.learning_curve(name, metrics)) for name in plots.curve_names(metrics)]


def _test_set_part(evaluations: list[Evaluation]) -> dict[str, Any]:
    baselines = blind_of(evaluations)
    best = best_blind_name(baselines)
    rows = headline_rows(evaluations)
    series = [(evaluation.name, f"s{index % plots.N_COLORS}") for index, evaluation in enumerate(evaluations)]
    if best:
        series.append((f"{best} (blind)", "blind"))
    shown = [row for row in rows if row.kind == "evaluation" or row.best_blind]
    overview = [(row.name, [(css, row.accuracy)]) for row, (_, css) in zip(shown, series, strict=True)]
    domains: list[tuple[str, Field]] = [("modality", "modality"), ("question type", "question_type")]
    store = evaluations[0].summary.get("store")
    items = choose_items(evaluations)
    return {
        "name": Path(store).name if store else evaluations[0].name,
        "evaluations": evaluations,
        "rows": rows,
        "series": series,
        "chance": evaluations[0].figures["chance"],
        "overview": plots.dot_chart(overview, "Accuracy of each evaluation with its 95 % interval"),
        "domains": [_domain_part(title, domain_rows(evaluations, field), series) for title, field in domains],
        "letters": _letters(evaluations),
        "against_blind": [compare_to_best_blind(evaluation, baselines) for evaluation in evaluations],
        "failures": failure_rows(evaluations),
        "passes": _passes(evaluations),
        "gallery": by_heading(items),
        "filters": filters(items),
        "alarms": evaluation_alarms(evaluations),
    }


def _domain_part(title: str, rows: Sequence[DomainRow], series: Sequence[tuple[str, str]]) -> dict[str, Any]:
    groups = [
        (
            f"{row.name} (n = {row.n})",
            [(css, accuracy) for (_, css), accuracy in zip(series, row.accuracies, strict=True)],
        )
        for row in rows
    ]
    return {"title": title, "rows": rows, "chart": plots.dot_chart(groups, f"Accuracy by {title}")}


def _letters(evaluations: Sequence[Evaluation]) -> str:
    """How often each letter was answered, per evaluation, and how often it is right; empty where answers are free."""
    targets = evaluations[0].figures["target_letters"]
    histograms = [
        *((f"s{index % plots.N_COLORS}", item.figures["answer_letters"]) for index, item in enumerate(evaluations)),
        ("target", targets),
    ]
    letters = sorted({letter for _, histogram in histograms for letter in histogram})
    groups = [
        (letter, [(css, histogram.get(letter, 0) / (sum(histogram.values()) or 1)) for css, histogram in histograms])
        for letter in letters
    ]
    return plots.bar_chart(groups, "Share of each letter among the answers and among the targets") if groups else ""


def _passes(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[tuple[str, Interval]]]]:
    """(evaluation, [(k, pass@k), ...]) of those with several samples per question."""
    found = [(evaluation.name, summarize_samples(evaluation.records)) for evaluation in evaluations]
    return [
        (name, [(k, Interval(**interval)) for k, interval in figures["pass@k"].items()])
        for name, figures in found
        if figures
    ]


def _alarms(runs: Sequence[RunPart], test_sets: Sequence[Mapping[str, Any]]) -> list[str]:
    alarms = [alarm for part in runs for alarm in run_alarms(part.name, part.monitors)]
    return alarms + [alarm for test_set in test_sets for alarm in test_set["alarms"]]
