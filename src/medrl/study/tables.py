"""Figures of a study as CSV, Markdown and LaTeX: the tables people put into papers."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medrl.files import write_json_atomically, write_text_atomically
from medrl.study.figures import SCOPES

MATRICES = "matrices.json"
TITLES = {"diagonal": "diagonal (in domain)", "off_diagonal": "off-diagonal (generalization)", "overall": "overall"}
NOTE = "Research use only; model-generated reasoning is not an explanation of the model."


def write_tables(figures: Mapping[str, Any], out: Path) -> list[Path]:
    """``matrices.json``, and under ``tables/`` one CSV per kind of figure, Markdown and LaTeX. Returns the files."""
    write_json_atomically(out / MATRICES, figures)
    texts = {
        "cells.csv": _csv(("axis", "questions", "method", "trained_on", "tested_on", *_ENDS, "n"), _cells(figures)),
        "means.csv": _csv(("axis", "questions", "method", "mean", "average", *_ENDS), _means(figures)),
        "gains.csv": _csv(("axis", "questions", "a", "b", "trained_on", "tested_on", *_ENDS), _gains(figures)),
        "claims.csv": _csv(("axis", "questions", *_CLAIM), _claims(figures)),
        "tables.md": markdown(figures),
        "tables.tex": latex(figures),
    }
    for name, text in texts.items():
        write_text_atomically(out / "tables" / name, text)
    return [out / MATRICES, *(out / "tables" / name for name in texts)]


_ENDS = ("value", "low", "high")
_CLAIM = ("a", "b", "scope", "difference", "low", "high", "p", "p_holm", "detectable", "shown")


def _parts(figures: Mapping[str, Any]) -> Iterable[tuple[str, str, Mapping[str, Any], Mapping[str, Any]]]:
    """(axis, which questions, figures, the axis's figures that hold for all questions)."""
    for axis, found in figures.items():
        yield axis, "all", found, found
        if "methods" in found["blind_unsolvable"]:
            yield axis, "blind-unsolvable", found["blind_unsolvable"], found


def _cells(figures: Mapping[str, Any]) -> Iterable[Sequence[Any]]:
    for axis, questions, part, found in _parts(figures):
        named = [(name, matrix, matrix["trained_on"] or ["(none)"]) for name, matrix in part["methods"].items()]
        if questions == "all":
            named += [(f"blind: {n}", m, found["trained_on"]) for n, m in found["blind_specialists"].items()]
            for name, shares in found["blind"].items():
                ends = found["blind_intervals"][name]
                whole = {"accuracy": [shares], **{key: [ends[key]] for key in ("low", "high", "n")}}
                named.append((f"blind: {name}", whole, ["(all)"]))
        for name, matrix, rows in named:
            for i, row in enumerate(rows):
                for j, column in enumerate(found["domains"]):
                    cell = [matrix[key][i][j] for key in ("accuracy", "low", "high", "n")]
                    yield [axis, questions, name, row, column, *cell]


def _means(figures: Mapping[str, Any]) -> Iterable[Sequence[Any]]:
    for axis, questions, part, found in _parts(figures):
        for name, means in part["means"].items():
            named = [(scope, means[scope]) for scope in SCOPES]
            named += [(f"trained on {row}", m) for row, m in zip(found["trained_on"], means["rows"], strict=True)]
            named += [(f"tested on {c}", m) for c, m in zip(found["domains"], means["columns"], strict=True)]
            for what, mean in named:
                yield [axis, questions, name, what, "macro", *(mean[key] for key in _ENDS)]
                yield [axis, questions, name, what, "micro", *(mean["micro"][key] for key in _ENDS)]


def _gains(figures: Mapping[str, Any]) -> Iterable[Sequence[Any]]:
    for axis, questions, part, found in _parts(figures):
        for gain in part["gains"]:
            for i, row in enumerate(found["trained_on"]):
                for j, column in enumerate(found["domains"]):
                    cell = [gain[key][i][j] for key in ("difference", "low", "high")]
                    yield [axis, questions, gain["a"], gain["b"], row, column, *cell]


def _claims(figures: Mapping[str, Any]) -> Iterable[Sequence[Any]]:
    for axis, questions, part, _ in _parts(figures):
        for claim in part["claims"]:
            yield [axis, questions, *(claim[key] for key in _CLAIM)]


def _csv(heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(heading)
    writer.writerows([_neutral(cell) for cell in row] for row in rows)
    return stream.getvalue()


def _neutral(cell: Any) -> Any:
    """A name from a data set must not become a formula when a spreadsheet opens the file."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


def markdown(figures: Mapping[str, Any]) -> str:
    """Every matrix, its means and claims as Markdown tables; percent, 95 % intervals in brackets."""
    lines = ["# Study", "", f"Accuracies in percent, 95 % intervals in brackets. {NOTE}", ""]
    for axis, questions, part, found in _parts(figures):
        lines += [f"## {_escape_markdown(axis)}, {questions} questions", ""]
        for name, heading, rows in _matrices(part, found):
            lines += [f"### {_escape_markdown(name)}", ""]
            lines += [*_markdown_table([_escape_markdown(cell) for cell in heading], rows), ""]
        lines += ["### Means", "", *_markdown_table(_MEAN_HEADING, _mean_rows(part)), ""]
        lines += ["### Claims", "", *_markdown_table(_CLAIM_HEADING, _claim_rows(part)), ""]
    return "\n".join(lines)


def latex(figures: Mapping[str, Any]) -> str:
    """The same as LaTeX tables (booktabs)."""
    lines = [f"% {NOTE}", "% Needs \\usepackage{booktabs}. Accuracies in percent, 95 % intervals in brackets.", ""]
    for axis, questions, part, found in _parts(figures):
        for name, heading, rows in _matrices(part, found):
            caption = f"{name}: trained on (rows), tested on (columns), {axis}, {questions} questions"
            lines += _latex_table(caption, heading, rows)
        caption = f"Mean accuracies, {axis}, {questions} questions"
        lines += _latex_table(caption, _MEAN_HEADING, _mean_rows(part))
        lines += _latex_table(f"Claims, {axis}, {questions} questions", _CLAIM_HEADING, _claim_rows(part))
    return "\n".join(lines)


_CLAIM_HEADING = ["claim", "scope", "difference (points)", "p (Holm)", "can see (points)", "shown"]


def _matrices(part: Mapping[str, Any], found: Mapping[str, Any]) -> Iterable[tuple[str, list[str], list[list[str]]]]:
    for name, matrix in part["methods"].items():
        rows, means = [], part["means"][name]
        for i, row in enumerate(matrix["trained_on"] or ["(none)"]):
            cells = zip(*(matrix[key][i] for key in ("accuracy", "low", "high")), strict=True)
            rows.append([row, *(percent(*cell) for cell in cells), _mean(means["rows"][i])])
        if len(rows) > 1:
            rows.append(["mean", *map(_mean, [*means["columns"], means["overall"]])])
        yield name, ["trained on", *found["domains"], "mean"], rows
    for gain in part["gains"]:
        rows = []
        for i, row in enumerate(found["trained_on"]):
            cells = zip(*(gain[key][i] for key in ("difference", "low", "high")), strict=True)
            rows.append([row, *(points(*cell) for cell in cells)])
        yield f"{gain['a']} minus {gain['b']} (points)", ["trained on", *found["domains"]], rows
    if part is found:
        rows = []
        for name, shares in found["blind"].items():
            ends = found["blind_intervals"][name]
            rows.append([name, *(percent(*cell) for cell in zip(shares, ends["low"], ends["high"], strict=True))])
        yield "Rules that see no image", ["rule", *found["domains"]], rows


def _mean_rows(part: Mapping[str, Any]) -> list[list[str]]:
    return [
        [name, *(_mean(mean) for scope in SCOPES for mean in (means[scope], means[scope]["micro"]))]
        for name, means in part["means"].items()
    ]


_MEAN_HEADING = ["method", *(word for title in TITLES.values() for word in (title, "micro"))]


def _mean(mean: Mapping[str, Any]) -> str:
    return percent(*(mean[key] for key in _ENDS))


def _claim_rows(part: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            f"{claim['a']} - {claim['b']}",
            claim["scope"].replace("_", "-"),
            points(claim["difference"], claim["low"], claim["high"]),
            "-" if claim["p_holm"] is None else f"{claim['p_holm']:.2g}",
            "-" if claim["detectable"] is None else f"{100 * claim['detectable']:.1f}",
            "yes" if claim["shown"] else "no",
        ]
        for claim in part["claims"]
    ]


def percent(value: float | None, low: float | None, high: float | None) -> str:
    """``71.3 [66.1, 75.9]``; a dash for what is not known."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + ("" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]")


def points(value: float | None, low: float | None, high: float | None) -> str:
    """``+8.3 [+2.0, +14.1]``; a dash for what is not known."""
    if value is None:
        return "-"
    return f"{100 * value:+.1f}" + ("" if low is None or high is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]")


def _markdown_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("--:" for _ in heading[1:])]
    body = [[_escape_markdown(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [list(heading), rule, *body]]


def _latex_table(caption: str, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return " & ".join(_escape_latex(cell) for cell in cells) + r" \\"

    return [
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{_escape_latex(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(heading) - 1)}}}",
        r"\toprule",
        line(heading),
        r"\midrule",
        *map(line, rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
        "",
    ]


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " ",
}  # fmt: skip


def _escape_latex(text: str) -> str:
    # A bracket after a line end would be read as the option of \\.
    escaped = "".join(_LATEX.get(character, character) for character in text)
    return f"{{}}{escaped}" if escaped.startswith("[") else escaped


def _escape_markdown(text: str) -> str:
    for character in "\\`*_|<>":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")
