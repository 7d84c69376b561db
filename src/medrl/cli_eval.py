"""The commands that ask models, look on, and hand over: eval, watch, export-records, export-task."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from medrl import terminal
from medrl.errors import SettingsError
from medrl.types import Mode

if TYPE_CHECKING:
    from medrl.evaluation.evaluate import Evaluation

MANY_CUT_OFF = 0.5
WATCH_EVERY_S = 5.0


def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="A model folder, hub id, run folder (its newest checkpoint), checkpoint, or demo-base."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for records.jsonl and summary.json.")],
    test: Annotated[Path | None, typer.Argument(metavar="STORE", help="What to ask.")] = None,
    mode: Annotated[Mode | None, typer.Option(help="Form of completion; default: the template's or run's.")] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help="Prompt wording; default: the run's, else the mode's. Given more than once: OUT/<template>."),
    ] = None,
    train: Annotated[
        Path | None, typer.Option(help="Store that blind baselines are fit on; default: the run's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first N questions.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest completion; default: the run's, else 256.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Prompts decoded together; with --endpoint, requests under way at once.")
    ] = 32,
    samples: Annotated[
        int, typer.Option(min=1, help="Completions per question: pass@k, and the majority's answer counts.")
    ] = 1,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Default: 0 (greedy) for one completion, 1 for several.")
    ] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that reach this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from this many likeliest tokens; 0: from all.")] = 0,
    seed: Annotated[int, typer.Option(help="Sampling seed.")] = 0,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Ask only the I-th of N parts, from 1; torchrun sets it by itself."),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Ask an OpenAI-compatible server. Questions and images are sent there."),
    ] = None,
    served: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Its name on the server; default: MODEL.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Longest wait for one reply of the server, in s.")] = 300.0,
    option_probs: Annotated[
        bool, typer.Option(help="Record the probability of each option's letter; the image is not encoded again.")
    ] = True,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"] | None,
        typer.Option(help="Precision; default: the run's, else bfloat16 on a GPU and float32 on a CPU."),
    ] = None,
    min_pixels: Annotated[int | None, typer.Option(min=1, help="Smallest image area; default: the run's.")] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Largest image area; default: the run's.")] = None,
    compile_layers: Annotated[
        Literal["auto", "on", "off"],
        typer.Option(help="Compile the layers; auto: on a GPU, for 10,000 questions or more."),
    ] = "auto",
    data_workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Prepare images with so many processes on a GPU, else threads; default: cores, up to 8."
        ),
    ] = None,
    as_json: terminal.Json = False,
) -> None:
    """Ask a model every question of a store.

    Answers are greedy or sampled, and graded. If stopped, the same command continues. Parts (--shard) may
    run at once; the last to finish puts them together.

    \b
    Example:
      medrl eval runs/ct data/by-modality/ct/test --out runs/ct/eval/after
      medrl eval demo-base data/split/all/test --template plain --train data/split/all/train --out runs/tiny/eval/before
      medrl eval runs/ct data/by-modality/ct/test --samples 8 --out runs/ct/eval/after-8
      medrl eval --endpoint http://localhost:8000/v1 --model Qwen/Qwen2-VL-2B-Instruct STORE --out runs/served
    """
    from medrl.evaluation.shards import launched_shard, parse_shard
    from medrl.evaluation.subject import evaluate_templates
    from medrl.rollout.endpoint import Endpoint

    model, test = _model_and_store(model, test, endpoint, served)
    server = Endpoint(endpoint, served or model, timeout_s=timeout) if endpoint is not None else None
    templates: list[str | None] = [*dict.fromkeys(template or ())] or [None]
    outs = {name: out / name if len(templates) > 1 and name else out for name in templates}
    terminal.quiet_libraries()
    evaluations = evaluate_templates(
        model,
        test,
        outs,
        mode=mode,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        option_probs=option_probs,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        data_workers=data_workers,
        dtype=dtype,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        compile_layers="auto" if compile_layers == "auto" else compile_layers == "on",
        train=train,
        limit=limit,
        endpoint=server,
        shard=parse_shard(shard) if shard is not None else launched_shard(),
        quiet=as_json,
    )
    unanswered = sum(evaluation.unanswered for evaluation in evaluations.values())
    if unanswered:
        typer.echo(f"this part is answered; {unanswered} questions are left to other shards", err=True)
    elif len(evaluations) > 1:
        _finish_wordings(out, {str(name): found for name, found in evaluations.items()}, as_json)
    else:
        _show(out, next(iter(evaluations.values())).summary, as_json)


def _model_and_store(model: str, test: Path | None, endpoint: str | None, served: str | None) -> tuple[str, Path]:
    """MODEL STORE; behind an endpoint with --model, STORE alone will do."""
    if served is not None and endpoint is None:
        raise SettingsError("--model is a name on a server: give --endpoint URL too, or the model as MODEL")
    if test is not None:
        return model, test
    if served is None:
        raise SettingsError(f"{model!r} is given but one is missing: name a model and a store, as in --help's example")
    return served, Path(model)


def _show(out: Path, summary: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        terminal.print_json(summary)
        return
    blind = [terminal.accuracy_row(f"blind: {entry['name']}", entry["accuracy"]) for entry in summary["blind"]]
    domains = [terminal.accuracy_row(name, accuracy) for name, accuracy in summary["by_modality"].items()]
    passes = [terminal.accuracy_row(f"pass@{k}", found) for k, found in summary.get("pass@k", {}).items()]
    name = f"{summary['name']}, majority of {summary['samples']}" if passes else summary["name"]
    rows = [terminal.accuracy_row(name, summary["accuracy"]), *passes, *blind, *domains]
    terminal.print_table("Accuracy", ["", "accuracy", "95 % interval", "questions"], rows)
    typer.echo(
        f"unreadable {terminal.percent(summary['parse_fail_rate'])}, cut off "
        f"{terminal.percent(summary['truncated_rate'])}, well-formed {terminal.percent(summary['well_formed'])}"
    )
    if summary["truncated_rate"] > MANY_CUT_OFF:
        typer.echo(
            "most answers were cut off: raise --max-new-tokens, or ask in the words that the model was trained with "
            "(--template)"
        )
    if len(blind) < 2:
        typer.echo("the other blind baselines are fit on training questions: give --train STORE")
    typer.echo(f"{out / 'records.jsonl'}\n{out / 'summary.json'}")


def _finish_wordings(out: Path, evaluations: "Mapping[str, Evaluation]", as_json: bool) -> None:
    from medrl.evaluation.wordings import TEMPLATES_FILE, summarize_wordings
    from medrl.files import write_json_atomically

    found = summarize_wordings({name: evaluation.records for name, evaluation in evaluations.items()})
    write_json_atomically(out / TEMPLATES_FILE, found)
    if as_json:
        terminal.print_json(found)
        return
    shares = {"in every wording": "right_in_all", "in one at least": "right_in_any", "same answer": "same_answer"}
    rows = [
        *(terminal.accuracy_row(name, accuracy) for name, accuracy in found["templates"].items()),
        *(terminal.accuracy_row(title, found[key]) for title, key in shares.items()),
    ]
    terminal.print_table("Accuracy by wording", ["", "accuracy", "95 % interval", "questions"], rows)
    typer.echo(f"spread {100 * found['spread']:.1f} points\n{out / TEMPLATES_FILE}")


def watch(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run, an evaluation, a study, or a folder of them.")],
    once: Annotated[bool, typer.Option("--once", help="Look once instead of until all is finished.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = WATCH_EVERY_S,
    as_json: Annotated[bool, typer.Option("--json", help="Look once and print JSON for programs.")] = False,
) -> None:
    """Show the progress of runs, evaluations and studies.

    Reads files only, so it works from another terminal or machine. Ends when everything is finished.

    \b
    Example:
      medrl watch runs/ct
      medrl watch runs --once
    """
    import dataclasses

    from medrl.report.watch import watch as look

    if as_json:
        terminal.print_json([dataclasses.asdict(status) for status in look(folder)])
        return
    shown: list[str] = []
    while True:
        found = look(folder)
        lines = [status.line() for status in found]
        for line in lines:
            if line not in shown:
                typer.echo(line)
        shown = lines
        if once or all(status.finished for status in found):
            return
        time.sleep(every)


def export_records(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished evaluation.")],
    to: Annotated[
        Literal["inspect", "lmms-eval", "model-index", "eval-results"],
        typer.Option(help="Whose format: Inspect's log, lmms-eval's samples, a card's model-index, .eval_results."),
    ],
    out: Annotated[Path, typer.Option(help="The file: .eval or .json, .jsonl, .md, .yaml.")],
    dataset: Annotated[
        str | None, typer.Option(metavar="ID", help="The test set's id on the hub; eval-results need it.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Name of the task there; default: the store's.")] = None,
) -> None:
    """Export an evaluation in another program's format.

    \b
    Example:
      medrl export-records runs/ct/eval/after --to inspect --out logs/ct.eval
      medrl export-records runs/ct/eval/after --to lmms-eval --out logs/ct_samples_omnimedvqa.jsonl
      medrl export-records runs/ct/eval/after --to model-index --out README.md
    """
    from medrl.report.interchange import export_records as export

    for file in export(folder, to, out, dataset=dataset, task=task):
        typer.echo(file)


def export_task(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The questions.")],
    out: Annotated[Path, typer.Option(help="Folder for lmms-eval's --include_path.")],
    name: Annotated[str | None, typer.Option(help="The task's name; default: the store's.")] = None,
    mode: Annotated[Mode | None, typer.Option(help="Form of completion; default: the template's, else think.")] = None,
    template: Annotated[str | None, typer.Option(help="Prompt wording; default: the mode's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 256,
) -> None:
    """Turn a store into an lmms-eval task.

    Questions keep our wording and our parser grades the answers, whatever model lmms-eval runs; medrl must be installed
    beside it.

    \b
    Example:
      medrl export-task data/pmc-vqa --template plain --out tasks/pmc-vqa
      lmms-eval --include_path tasks/pmc-vqa --tasks pmc-vqa --model qwen2_vl --model_args pretrained=...
    """
    from medrl.data.prompts import TEMPLATES
    from medrl.evaluation.lmms_task import write_task

    own = TEMPLATES[template].mode if template in TEMPLATES else "think"
    files = write_task(store, out, name=name, mode=mode or own, template=template, max_new_tokens=max_new_tokens)
    for file in files:
        typer.echo(file)
