"""The commands that read what was written down: rescore, compare, report. None of them needs a model."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from medrl import terminal


def rescore(
    folder: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="An evaluation folder.")] = None,
    scorer: Annotated[
        str, typer.Option(help="strict, lenient, med-r1, med-r1-eval, medvlm-r1, medvlm-r1-eval, raw, judge.")
    ] = "strict",
    completions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Instead of DIR: rows of completion, options, target, kind, mode; prints one JSON row each.",
        ),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="For judge: an OpenAI-compatible address. Questions and answers are sent there.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="For judge: the model's name there.")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="For judge: file of verdicts; default: judge.jsonl in DIR, or beside FILE.jsonl."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder for an evaluation with these verdicts; with --completions: file for the rows."),
    ] = None,
    as_json: terminal.Json = False,
) -> None:
    """Grade saved completions again.

    By another scorer, without the model: our rules (strict), forgiving ones (lenient), the papers' released code, or a
    language model as judge.

    \b
    Example:
      medrl rescore runs/ct/eval/after --scorer med-r1 --json
      medrl rescore runs/ct/eval/after --scorer lenient --out runs/ct/eval/after-lenient
      medrl rescore --completions answers.jsonl
    """
    from medrl.errors import DataError, SettingsError
    from medrl.evaluation.rescore import rescore_file, rescore_folder
    from medrl.files import write_text_atomically
    from medrl.rewards.judge import choose_scorer

    if (folder is None) == (completions is None):
        raise SettingsError("give an evaluation folder or --completions FILE.jsonl, one of the two")
    place = folder or (completions.parent if completions is not None and str(completions) != "-" else None)
    cache = cache or (place / "judge.jsonl" if place is not None else None)
    grade = choose_scorer(scorer, endpoint, judge_model, cache)
    if completions is not None:
        verdicts = []
        for verdict in rescore_file(completions, grade):
            verdicts.append(verdict)
            if out is None:
                typer.echo(json.dumps(verdict))
        if out is not None:
            write_text_atomically(out, "".join(f"{json.dumps(verdict)}\n" for verdict in verdicts))
        errors = [verdict["error"] for verdict in verdicts if "error" in verdict]
        if errors:
            raise DataError(
                f"{len(errors)} of {len(verdicts)} rows could not be graded and have an error; the first: {errors[0]}"
            )
        return
    assert folder is not None  # one of the two is given
    found = rescore_folder(folder, scorer, grade, out)
    if as_json:
        terminal.print_json(found)
        return
    rows = [
        terminal.accuracy_row("as recorded", found["recorded_accuracy"]),
        terminal.accuracy_row(scorer, found["accuracy"]),
        *(terminal.accuracy_row(name, share) for name, share in found["by_modality"].items()),
    ]
    terminal.print_table("Accuracy", ["", "accuracy", "95 % interval", "questions"], rows)
    typer.echo(
        f"unreadable {terminal.percent(found['parse_fail_rate'])}, well-formed "
        f"{terminal.percent(found['well_formed'])}, mean score {terminal.percent(found['mean_score'])}, "
        f"verdict changed on {found['changed']} of {found['n']}"
    )
    if out is not None:
        typer.echo(str(out))


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="An evaluation folder: what B is compared with.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="An evaluation folder over the same examples.")],
    cluster: Annotated[
        Literal["image", "patient"], typer.Option(help="What belongs together in the interval.")
    ] = "image",
    as_json: terminal.Json = False,
) -> None:
    """Compare two evaluations.

    B minus A, example by example: difference in accuracy, its interval, exact McNemar test. Refuses evaluations over
    different examples.

    It answers whether B is better. Exit code 0: yes, the interval lies above 0 and McNemar's p is below 0.05;
    3: no, that is not shown, or B is worse.

    \b
    Example:
      medrl compare runs/ct/eval/before runs/ct/eval/after
    """
    from medrl.evaluation.asked import read_how
    from medrl.evaluation.compare import compare as compare_records
    from medrl.runs import read_records

    same = a.resolve().name == b.resolve().name
    a_name, b_name = (str(path) if same else path.resolve().name for path in (a, b))
    comparison = compare_records(
        read_records(a), read_records(b), cluster=cluster, a_name=a_name, b_name=b_name, a_how=read_how(a),
        b_how=read_how(b),
    )  # fmt: skip
    if as_json:
        terminal.print_json(comparison.as_dict())
    else:
        rows = [
            terminal.accuracy_row(a_name, comparison.a_accuracy.as_dict()),
            terminal.accuracy_row(b_name, comparison.b_accuracy.as_dict()),
            terminal.difference_row("difference", comparison.difference.as_dict()),
        ]
        terminal.print_table("Accuracy", ["", "accuracy", "95 % interval", "questions"], rows)
        typer.echo(f"only {a_name} right: {comparison.only_a}; only {b_name} right: {comparison.only_b}")
        typer.echo("\n".join(filter(None, (comparison.verdict, comparison.note))))
    raise typer.Exit(0 if comparison.better else terminal.EXIT_NO)


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders and evaluation folders.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Title of the page; default: the names of the runs.")] = None,
) -> None:
    """Write a report on runs as one HTML file.

    Covers runs and evaluations; self-contained, readable offline.

    \b
    Example:
      medrl report runs/ct --out runs/ct/report.html
      medrl report runs/ct runs/ct-sft --title "CT: GRPO and SFT"
    """
    from medrl.report.page import write_report

    typer.echo(write_report(folders, out, title=title))
