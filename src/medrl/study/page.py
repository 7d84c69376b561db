"""A study as one HTML file: what was asked, the answer in three sentences, matrices, claims, how to do it again."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medrl.data import store
from medrl.evaluation.intervals import Interval
from medrl.files import write_text_atomically
from medrl.report import matrix_plots, plots, text
from medrl.report.environment import filter_script, page_environment
from medrl.report.gallery import RULE, by_heading, choose_items, filters
from medrl.report.tables import failure_rows
from medrl.runs import CELL_FAILED, Run, is_run
from medrl.study.plan import Cell, Plan
from medrl.study.sentences import answer
from medrl.study.settings import Study
from medrl.study.tables import TITLES
from medrl.study.work import command
from medrl.study.written import in_domain

ONLY_SFT = {"loss", "entropy", "grad_norm", "lr"}
"""Curves that mean something where nothing was sampled."""


def write_study_page(plan: Plan, out: Path, figures: Mapping[str, Any], file: Path) -> Path:
    """Write the page of a study's figures."""
    written = in_domain(plan, out)
    items = choose_items(written) if written else []
    page = (
        page_environment()
        .get_template("study.html.jinja")
        .render(
            **filter_script(),
            written=[evaluation.name for evaluation in written],
            kinds_of_failure=failure_rows(written) if written else [],
            gallery_rule=RULE,
            gallery=by_heading(items),
            filters=filters(items) if items else [],
            title=plan.study.name,
            asked=_asked(plan),
            axes=[_axis_part(axis, found) for axis, found in figures.items()],
            curves=_curves(plan, out),
            failures=list(_failures(plan.cells, out)),
            provenance=_provenance(plan, out),
            commands=_commands(plan, out),
        )
    )
    write_text_atomically(file, page)
    return file


def _asked(plan: Plan) -> list[tuple[str, str]]:
    study: Study = plan.study
    rows = [("base model", study.policy.model), ("seeds", ", ".join(map(str, study.seeds)))]
    rows += [
        (f"{axis}: trained on", ", ".join(f"{name} ({plan.n_train[axis][name]})" for name in names))
        for axis, names in plan.rows.items()
    ]
    rows += [("methods", ", ".join(study.methods)), ("test questions", str(plan.n_test))]
    return [*rows, ("clusters of the intervals", study.evaluation.cluster)]


def _axis_part(axis: str, found: Mapping[str, Any]) -> dict[str, Any]:
    parts = [_question_part(axis, "all questions", found, found)]
    if "methods" in found["blind_unsolvable"]:
        parts.append(_question_part(axis, "blind-unsolvable questions", found["blind_unsolvable"], found))
    blind = matrix_plots.heat_map(
        list(found["blind"]),
        found["domains"],
        list(found["blind"].values()),
        *([ends[key] for ends in found["blind_intervals"].values()] for key in ("low", "high")),
        label=f"Accuracy of rules that see no image, by {axis}",
    )
    name = axis.replace("_", " ")
    return {
        "name": name,
        "answer": answer(found),
        "parts": parts,
        "blind": blind,
        "found": found,
        "titles": TITLES,
        "width": matrix_plots.heat_width([*found["domains"], "mean"]),
    }


def _question_part(axis: str, questions: str, part: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    marked = [
        (i, j) for i, row in enumerate(found["trained_on"]) for j, name in enumerate(found["domains"]) if row == name
    ]
    maps = [(name, _map(name, part, found, questions, marked)) for name in part["methods"]]
    gains = [
        (
            f"{gain['a']} minus {gain['b']}",
            matrix_plots.heat_map(
                found["trained_on"], found["domains"], gain["difference"], gain["low"], gain["high"],
                label=f"{gain['a']} minus {gain['b']}, {questions}", signed=True, marked=marked,
            ),
        )
        for gain in part["gains"]
    ]  # fmt: skip
    series = [(name, _color(index, name)) for index, name in enumerate(part["means"])]
    scopes = [scope for scope in TITLES if next(iter(part["means"].values()))[scope]["value"] is not None]
    groups = [
        (TITLES[scope], [(css, _interval(part["means"][name][scope])) for name, css in series]) for scope in scopes
    ]
    claims = [claim for claim in part["claims"] if claim["low"] is not None]
    colors = dict(series)
    rows = [
        (f"{c['a']} − {c['b']}", colors[c["a"]], c["difference"], c["low"], c["high"])
        for c in claims
        if c["scope"] == (scopes[1] if len(scopes) > 1 else scopes[0] if scopes else "")
    ]
    return {
        "questions": questions,
        "n": sum(part["n"]),
        "maps": maps,
        "gains": gains,
        "series": series,
        "means": part["means"],
        "scopes": scopes,
        "dots": plots.dot_chart(groups, f"Mean accuracies by {axis}, {questions}"),
        "forest": matrix_plots.forest(rows, label=f"Differences outside the trained domain by {axis}, {questions}"),
        "claims": part["claims"],
        "main": questions == "all questions",
    }


def _map(
    name: str, part: Mapping[str, Any], found: Mapping[str, Any], questions: str, marked: Sequence[tuple[int, int]]
) -> str:
    """A method's accuracies; where there are several, the macro means of its rows and columns beside them."""
    matrix, means, columns = part["methods"][name], part["means"][name], found["domains"]
    rows = matrix["trained_on"] or ["not trained"]
    ends = {"accuracy": "value", "low": "low", "high": "high"}
    cells = {key: [list(row) for row in matrix[key]] for key in ends}
    apart = (len(rows), len(columns))
    if apart[1] > 1:
        columns = [*columns, "mean"]
        for key, lines in cells.items():
            for line, mean in zip(lines, means["rows"], strict=False):  # what was not trained has one row
                line.append(mean[ends[key]])
            if apart[0] > 1:
                lines.append([mean[ends[key]] for mean in [*means["columns"], means["overall"]]])
        rows = [*rows, "mean"] if apart[0] > 1 else rows
    frames = marked if matrix["trained_on"] else []
    label = f"Accuracy of {name}, {questions}"
    return matrix_plots.heat_map(rows, columns, *cells.values(), label=label, marked=frames, apart=apart)


def _color(index: int, name: str) -> str:
    return "blind" if name.startswith("blind: ") else f"s{index % plots.N_COLORS}"


def _interval(mean: Mapping[str, Any]) -> Interval:
    return Interval(mean["value"], mean["low"], mean["high"], 30)


def _curves(plan: Plan, out: Path) -> list[tuple[str, list[tuple[str, str]], list[tuple[str, str, str]]]]:
    """(method, its specialists with their colors, its curves): one line per specialist of the first seed."""
    parts = []
    for name in plan.study.methods:
        cells = [c for c in plan.cells if (c.kind, c.method, c.seed) == ("train", name, plan.study.seeds[0])]
        cells = [cell for cell in cells if is_run(cell.result(out))]
        runs = [Run.open(cell.result(out)).metrics() for cell in cells]
        names = plots.curve_names(runs)
        if cells and cells[0].recipe.method == "sft":
            names = [key for key in names if key in ONLY_SFT]
        series = [(cell.domain or "", f"s{plots.run_color(index)}") for index, cell in enumerate(cells)]
        drawn = [(*plots.curve_title(key), plots.learning_curve(key, runs)) for key in names]
        parts.append((name, series, [curve for curve in drawn if curve[2]]))
    return [part for part in parts if part[2]]


def _provenance(plan: Plan, out: Path) -> list[tuple[str, str]]:
    """On which data, with which versions; versions of the first run, and how many runs had others."""
    rows = []
    for side, path in (("training", plan.stores.train), ("test", plan.stores.test)):
        info = store.read_info(path)
        rows.append((f"{side} store", f"{path}, fingerprint {info.fingerprint}"))
        rows.append((f"{side} data", f"{info.source}; license: {info.license}"))
    runs = [Run.open(c.result(out)) for c in plan.cells if c.kind == "train" and is_run(c.result(out))]
    facts = [run.provenance for run in runs]
    if facts:
        rows += [(package, str(version)) for package, version in facts[0].get("versions", {}).items()]
        rows += [(what, str(value)) for what, value in facts[0].get("machine", {}).items()]
        others = sum(fact.get("versions") != facts[0].get("versions") for fact in facts)
        rows.append(("runs with other versions", f"{others} of {len(facts)}"))
        seconds = sum(fact.get("seconds") or 0.0 for fact in facts)
        rows.append(("all trainings together", text.duration(seconds)))
    return rows


def _failures(cells: Sequence[Cell], out: Path) -> Iterable[tuple[str, str]]:
    import json

    for cell in cells:
        file = cell.folder(out) / CELL_FAILED
        if file.exists():
            yield cell.id, json.loads(file.read_text())["reason"]


def _commands(plan: Plan, out: Path) -> list[tuple[str, str]]:
    return [(cell.id, shlex.join(command(plan, cell, out))) for cell in plan.cells]
