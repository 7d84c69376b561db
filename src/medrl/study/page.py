"""A study as one HTML file: what was asked, the answer in three sentences, matrices, claims, how to do it again."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medrl.evaluation.intervals import Interval
from medrl.files import write_text_atomically
from medrl.report import matrix_plots, plots, text
from medrl.report.environment import filter_script, page_environment
from medrl.report.gallery import RULE, by_heading, choose_items, filters
from medrl.report.tables import failure_rows
from medrl.runs import Run, is_run
from medrl.study.figures import by_name
from medrl.study.plan import Cell, Plan
from medrl.study.runner import FAILED
from medrl.study.settings import Study
from medrl.study.tables import TITLES
from medrl.study.work import command
from medrl.study.written import in_domain

CURVES = ("reward", "rewards/choice_correct/mean", "completions/mean_length", "kl", "entropy")
"""Curves of every method's specialists."""


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
            commands=_commands(plan, out),
        )
    )
    write_text_atomically(file, page)
    return file


def answer(found: Mapping[str, Any]) -> list[str]:
    """Three sentences: the best off the diagonal against zero-shot, against supervised training, and against rules that
    see no image. They claim no more than interval and corrected test allow."""
    scope = "off_diagonal" if found["trained_on"] != ["all"] else "overall"
    trained = {name: matrix for name, matrix in found["methods"].items() if matrix["seeds"]}
    means = {name: found["means"][name][scope]["value"] for name in trained}
    known = {name: value for name, value in means.items() if value is not None}
    if not known:
        return ["No method has all its specialists yet, so nothing is compared."]
    best = max(known, key=known.__getitem__)
    reinforced = {name: value for name, value in known.items() if trained[name]["objective"] != "sft"}
    supervised = next((name for name in known if trained[name]["objective"] == "sft"), None)
    hero = max(reinforced, key=reinforced.__getitem__) if reinforced else best
    zero_shot = next(name for name, matrix in found["methods"].items() if not matrix["seeds"])
    sentences = [_sentence(found, hero, zero_shot, scope)]
    if supervised and supervised != hero:
        sentences.append(_sentence(found, hero, supervised, scope))
    sentences.append(_sentence(found, hero, f"blind: {found['best_blind']}", "overall"))
    return sentences


def _sentence(found: Mapping[str, Any], a: str, b: str, scope: str) -> str:
    claim = by_name(found["claims"], a, b, scope) or _turned(by_name(found["claims"], b, a, scope))
    if claim is None or claim["difference"] is None:
        return f"{a} and {b} cannot be compared: an evaluation is missing."
    difference, low, high = claim["difference"], claim["low"], claim["high"]
    where = {"off_diagonal": "outside the trained domain", "diagonal": "in the trained domain", "overall": "overall"}[
        scope
    ]
    ends = "no interval" if low is None else f"95 % interval {text.points(low)} to {text.points(high)}"
    evidence = f"{ends}, p {text.p_value(claim['p_holm'])} after Holm"
    if claim["shown"]:
        side = "above" if difference > 0 else "below"
        return f"{where.capitalize()}, {a} is {100 * abs(difference):.1f} points {side} {b} ({evidence})."
    shown = f"{text.points(difference)} points ({evidence})"
    return f"{where.capitalize()}, no difference is shown between {a} and {b}: {shown}."


def _turned(claim: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The same claim with its sides exchanged."""
    if claim is None or claim["difference"] is None or claim["low"] is None:
        return claim
    return {**claim, "difference": -claim["difference"], "low": -claim["high"], "high": -claim["low"]}


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
        "width": matrix_plots.heat_width(found["domains"]),
    }


def _question_part(axis: str, questions: str, part: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    marked = [
        (i, j) for i, row in enumerate(found["trained_on"]) for j, name in enumerate(found["domains"]) if row == name
    ]
    maps = []
    for name, matrix in part["methods"].items():
        rows = matrix["trained_on"] or ["not trained"]
        frames = marked if matrix["trained_on"] else []
        drawn = matrix_plots.heat_map(
            rows, found["domains"], matrix["accuracy"], matrix["low"], matrix["high"],
            label=f"Accuracy of {name}, {questions}", marked=frames,
        )  # fmt: skip
        maps.append((name, drawn))
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


def _color(index: int, name: str) -> str:
    return "blind" if name.startswith("blind: ") else f"s{index % plots.N_COLORS}"


def _interval(mean: Mapping[str, Any]) -> Interval:
    return Interval(mean["value"], mean["low"], mean["high"], 30)


def _curves(plan: Plan, out: Path) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Method -> its curves, one line per specialist of the first seed."""
    parts = []
    for name in plan.study.methods:
        cells = [c for c in plan.cells if (c.kind, c.method, c.seed) == ("train", name, plan.study.seeds[0])]
        runs = [Run.open(c.result(out)).metrics() for c in cells if is_run(c.result(out))]
        present = {key for rows in runs for row in rows[:1] for key in row}
        drawn = [(*plots.curve_title(key), plots.learning_curve(key, runs)) for key in CURVES if key in present]
        parts.append((name, [curve for curve in drawn if curve[2]]))
    return [part for part in parts if part[1]]


def _failures(cells: Sequence[Cell], out: Path) -> Iterable[tuple[str, str]]:
    import json

    for cell in cells:
        file = cell.folder(out) / FAILED
        if file.exists():
            yield cell.id, json.loads(file.read_text())["reason"]


def _commands(plan: Plan, out: Path) -> list[tuple[str, str]]:
    return [(cell.id, shlex.join(command(plan, cell, out))) for cell in plan.cells]
