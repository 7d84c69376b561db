"""The command line: each command calls one function. What is slow to import is imported inside the commands."""

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from medrl import cli_data, cli_eval, cli_import, cli_scale, cli_study, terminal

app = typer.Typer(
    cls=terminal.Commands,
    name="medrl",
    help="Train and evaluate medical vision-language models with reinforcement learning. Research use only.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_import.imports, name="import")
app.command("export-data")(cli_import.export_data)

benches = typer.Typer(help="Time a step or an evaluation on this machine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(benches, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def main() -> None:
    """Entry point of ``medrl``."""
    app(prog_name="medrl")


@app.callback()
def _medrl(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=lambda v: _version(v)),
    ] = False,
) -> None:
    pass


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"medrl {importlib.metadata.version('medrl')}")
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Random seed for data order and sampling.")] = 0,
    rebuild_base: Annotated[
        bool, typer.Option("--rebuild-base", help="Train the base model from nothing instead of using the shipped one.")
    ] = False,
) -> None:
    """Run everything once, on a CPU.

    Real images from installed packages, a tiny base model, GRPO and supervised training, evaluation, report: minutes,
    and nothing is downloaded.

    \b
    Example:
      medrl demo --out runs/demo
    """
    from medrl.demo.run import run_demo

    terminal.quiet_libraries()
    run_demo(out, seed=seed, rebuild_base=rebuild_base, quiet=False)


app.command()(cli_data.split)
app.command()(cli_data.audit)
app.command()(cli_study.study)
app.command()(cli_scale.plan)
app.add_typer(cli_scale.launches, name="launch")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to train, on what, how.")],
    out: Annotated[Path, typer.Option(help="The run folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings to change, e.g. grpo.group_size=8.")
    ] = None,
    resume: Annotated[
        Literal["auto", "never", "must"],
        typer.Option(help="never: refuse a folder that holds a run; auto: continue one; must: demand one."),
    ] = "never",
    max_hours: Annotated[
        float | None, typer.Option(help="Save and exit with code 143 before this many hours have passed.")
    ] = None,
    tracker: Annotated[
        list[str] | None,
        typer.Option(help="Also log to tensorboard, wandb, mlflow or trackio, offline; give it again for several."),
    ] = None,
) -> None:
    """Train a policy as a recipe says.

    GRPO and its relatives (grpo.algorithm=dapo), or imitation: of right answers with method=sft, of the policy's own
    best samples with method=rft.

    \b
    Example:
      medrl train recipes/omnimed-mini-tiny.yaml data.train=data/split/all/train --out runs/tiny
      medrl train recipes/med-r1-ct-think.yaml training.seed=7 --out runs/ct-7 --resume auto --max-hours 11.5
    """
    from medrl.training.recipe import run_recipe

    terminal.quiet_libraries()
    given = [*(overrides or ()), *([f"trackers=[{', '.join(tracker)}]"] if tracker else [])]
    run = run_recipe(recipe, given, out=out, resume=resume, max_hours=max_hours)
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes, the first one speaks
    if run.recipe["method"] != "sft":  # which imitates right answers and asks no reward about its own
        typer.echo(f"reward: {run.recipe['reward']}")
    typer.echo(f"run:  {run.path}\nnext: medrl eval {run.path} TEST_STORE --out {run.path / 'eval' / 'after'}")


app.command("eval")(cli_eval.evaluate)
app.command()(cli_eval.watch)
app.command("export-records")(cli_eval.export_records)
app.command("export-task")(cli_eval.export_task)


@app.command()
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
    as_json: Json = False,
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
    from medrl.rewards.judge import choose_scorer
    from medrl.runs import write_text_atomically

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


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="An evaluation folder: what B is compared with.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="An evaluation folder over the same examples.")],
    cluster: Annotated[
        Literal["image", "patient"], typer.Option(help="What belongs together in the interval.")
    ] = "image",
    as_json: Json = False,
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
    from medrl.evaluation.compare import compare as compare_records
    from medrl.runs import read_records

    same = a.resolve().name == b.resolve().name
    a_name, b_name = (str(path) if same else path.resolve().name for path in (a, b))
    comparison = compare_records(read_records(a), read_records(b), cluster=cluster, a_name=a_name, b_name=b_name)
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
        typer.echo(comparison.verdict)
    raise typer.Exit(0 if comparison.better else terminal.EXIT_NO)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders and evaluation folders.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
) -> None:
    """Write a report on runs as one HTML file.

    Covers runs and evaluations; self-contained, readable offline.

    \b
    Example:
      medrl report runs/ct --out runs/ct/report.html
    """
    from medrl.report.page import write_report

    typer.echo(write_report(folders, out))


ModelSize = Annotated[str, typer.Option("--model", help="tiny, 25m, 2b or 7b; also qwen2-vl-2b, qwen2-vl-7b.")]
Init = Annotated[Literal["random"], typer.Option(help="Where weights come from: the architecture is built from code.")]


@benches.command("step")
def bench_step(
    model: ModelSize = "25m",
    init: Init = "random",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per step.")] = 4,
    group: Annotated[int, typer.Option(min=2, help="Completions per prompt.")] = 8,
    image_px: Annotated[int, typer.Option(min=28, help="Side of the one image of each prompt.")] = 224,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Text tokens of a prompt.")] = 80,
    completion_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every completion.")] = 64,
    kl: Annotated[float, typer.Option(min=0, help="KL weight; at 0 no reference is loaded.")] = 0.04,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps, after the warm-up.")] = 5,
    baseline: Annotated[
        Literal["naive", "trl"] | None, typer.Option(help="Time this too, on the same shapes; trl: its GRPOTrainer.")
    ] = None,
    attention: Annotated[
        Literal["auto", "dense", "flex", "varlen"], typer.Option(help="Back end of packed attention.")
    ] = "auto",
    tokens_per_micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Default: found on a GPU, 4096 on a CPU.")
    ] = None,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Recompute layers in the backward pass.")
    ] = False,
    compile_layers: Annotated[
        Literal["auto", "on", "off"], typer.Option(help="Compile the layers; auto: on a GPU.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Time a GRPO step and its phases, against the limits of the machine.

    \b
    Example:
      medrl bench step --model 25m --prompts 4 --group 8 --image-px 224 --completion-tokens 64 --baseline naive
      medrl bench step --model qwen2-vl-2b --prompts 8 --image-px 448 --completion-tokens 160 --json
    """
    from medrl.bench import step
    from medrl.bench.limits import Work

    terminal.quiet_libraries()
    result = step.bench_step(
        step.StepBench(
            model=model,
            work=Work(
                prompts=prompts,
                group=group,
                image_px=image_px,
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
            ),
            kl_coef=kl,
            steps=steps,
            baseline=baseline,
            attention=attention,
            tokens_per_micro_batch=tokens_per_micro_batch,
            checkpoint_activations=checkpoint_activations,
            compile_layers="auto" if compile_layers == "auto" else compile_layers == "on",
        )
    )
    if as_json:
        terminal.print_json(result)
        return
    limits = result["limit_phases"]
    rows = [
        (name, f"{spent:.3f}", f"{limits[name]:.3f}" if name in limits else "")
        for name, spent in result["phases"].items()
    ]
    total = ("step", f"{result['seconds_per_step']:.3f}", f"{result['limit_seconds']:.3f}")
    terminal.print_table(f"{model}, {result['device']}", ["phase", "seconds", "limit"], [*rows, total])
    typer.echo(
        f"{result['tokens_per_s']:.0f} tokens/s, {result['fraction_of_limit']:.0%} of the limit, "
        f"MFU {result['mfu']:.0%}, peak {result['peak_gb']:.1f} GB, attention {result['attention']}"
        + (", layers compiled" if result["compiled"] else "")
    )
    if baseline is not None:
        typer.echo(
            f"{baseline}: {result['baseline']['seconds_per_step']:.3f} s per step, {result['speedup']:.1f} times ours"
        )


@benches.command("eval")
def bench_eval(
    model: ModelSize = "25m",
    init: Init = "random",
    items: Annotated[int, typer.Option(min=1, help="Questions, each with an image of its own.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 64,
    image_px: Annotated[int, typer.Option(min=28, help="Side of the images.")] = 224,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Text tokens of a prompt.")] = 80,
    completion_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every answer.")] = 96,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds, after the warm-up.")] = 3,
    baseline: Annotated[bool, typer.Option(help="Also time transformers' generate in batches of 64.")] = True,
    as_json: Json = False,
) -> None:
    """Time greedy evaluation.

    \b
    Example:
      medrl bench eval --model 25m --items 64 --image-px 224
      medrl bench eval --model qwen2-vl-2b --items 256 --image-px 392 --json
    """
    from medrl.bench import evaluation

    terminal.quiet_libraries()
    result = evaluation.bench_eval(
        evaluation.EvalBench(
            model=model,
            items=items,
            batch_size=batch_size,
            image_px=image_px,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            repeats=repeats,
            baseline=baseline,
        )
    )
    if as_json:
        terminal.print_json(result)
        return
    rows = [("medrl", f"{result['items_per_s']:.1f}")]
    if result["baseline"] is not None:
        rows.append((result["baseline"]["name"], f"{result['baseline']['items_per_s']:.1f}"))
    terminal.print_table(f"{model}, {result['device']}", ["", "items per second"], rows)
    if result["speedup"] is not None:
        typer.echo(f"{result['speedup']:.1f} times as fast; {result['same_tokens']:.0%} of the answers are the same")
