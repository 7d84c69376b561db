"""The command line: each command calls one function. What is slow to import is imported inside the commands."""

import importlib.metadata
import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from medrl import terminal
from medrl.types import Mode

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
imports = typer.Typer(help="Read a data set into a store.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(imports, name="import")

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
    seed: Annotated[int, typer.Option(help="Names the order of the data and every draw.")] = 0,
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


@imports.command("omnimedvqa")
def import_omnimedvqa(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Holds QA_information/ and Images/.")],
    out: Annotated[Path, typer.Option(help="The store to write.")],
    max_bad: Annotated[float, typer.Option(min=0, max=1, help="Share of bad rows that is put up with.")] = 0.001,
    as_json: Json = False,
) -> None:
    """Read OmniMedVQA into a store.

    Or any folder in its layout. Prints counts by modality and question type; bad rows are listed with file, position
    and reason, and above --max-bad nothing is written.

    \b
    Example:
      medrl import omnimedvqa OmniMedVQA --out data/omnimedvqa
    """
    from medrl.data import omnimedvqa, store

    result = omnimedvqa.read_omnimedvqa(folder)
    omnimedvqa.check_bad(result, max_bad)
    info = store.write_store(
        out,
        result.examples,
        source=omnimedvqa.SOURCE,
        license=omnimedvqa.LICENSE,
        citation=omnimedvqa.CITATION,
        extra={"bad_rows": len(result.bad), "skipped_files": [str(file.file) for file in result.skipped]},
    )
    if as_json:
        bad = [{"file": str(row.file), "position": row.position, "reason": row.reason} for row in result.bad]
        skipped = [{"file": str(file.file), "questions": file.questions} for file in result.skipped]
        counts = {"by_modality": info.modalities, "by_question_type": info.question_types}
        _print_json({"rows": info.rows, "bad": bad, **counts, "images": info.images, "skipped": skipped})
        return
    terminal.print_table("By modality", ["modality", "questions"], list(info.modalities.items()))
    terminal.print_table("By question type", ["question type", "questions"], list(info.question_types.items()))
    for row in result.bad:
        typer.echo(f"bad: {row}")
    for file in result.skipped:
        typer.echo(f"skipped: {file.file} ({file.questions} questions): none of its images are here")
    typer.echo(f"{info.rows} questions on {info.images} images in {out}; {len(result.bad)} bad rows left out")
    typer.echo(f"license: {info.license}")


@app.command()
def split(
    source: Annotated[Path, typer.Argument(metavar="STORE", help="What to divide.")],
    out: Annotated[Path, typer.Option(help="Folder for OUT/<domain>/train and OUT/<domain>/test.")],
    by: Annotated[
        Literal["modality", "question_type", "none"],
        typer.Option(help="One domain for each of these; none: one in all."),
    ] = "none",
    keep_together: Annotated[
        Literal["image", "patient", "none"], typer.Option(help="What must not lie on both sides.")
    ] = "image",
    test: Annotated[float, typer.Option(help="Share of each domain that goes to test, about.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Names the division.")] = 0,
) -> None:
    """Divide a store into train and test.

    No image (or patient) lies on both sides, and none in the training set of one domain and the test set of another.

    \b
    Example:
      medrl split data/omnimedvqa --by modality --out data/by-modality
      medrl split data/omnimedvqa --by none --out data/all
    """
    from medrl.data.split_store import split_store

    parts = split_store(
        source,
        out,
        by=None if by == "none" else by,
        keep_together=keep_together,
        test_fraction=test,
        seed=seed,
    )
    rows = [(part.domain, part.train_rows, part.test_rows) for part in parts]
    terminal.print_table("Questions", ["domain", "train", "test"], rows)
    for part in parts:
        typer.echo(f"{part.folder}/")


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
) -> None:
    """Train what a recipe says.

    GRPO, or supervised fine-tuning with method=sft.

    \b
    Example:
      medrl train recipes/omnimed-mini-tiny.yaml data.train=data/all/train --out runs/tiny
      medrl train recipes/med-r1-ct-think.yaml training.seed=7 --out runs/ct-7 --resume auto
    """
    from medrl.training.recipe import run_recipe

    terminal.quiet_libraries()
    run = run_recipe(recipe, overrides or (), out=out, resume=resume)
    typer.echo(f"run:  {run.path}\nnext: medrl eval {run.path} TEST_STORE --out {run.path / 'eval' / 'after'}")


@app.command(name="eval")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="A model folder, hub id, run folder (its newest checkpoint), checkpoint, or demo-base."),
    ],
    test: Annotated[Path, typer.Argument(metavar="STORE", help="What to ask.")],
    out: Annotated[Path, typer.Option(help="Folder for records.jsonl and summary.json.")],
    mode: Annotated[Mode | None, typer.Option(help="Form of completion; default: the run's, else think.")] = None,
    template: Annotated[str | None, typer.Option(help="Prompt wording; default: the run's, else the mode's.")] = None,
    train: Annotated[
        Path | None, typer.Option(help="Store that blind baselines are fit on; default: the run's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first this many.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest completion; default: the run's, else 256.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 32,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"] | None,
        typer.Option(help="Precision; default: the run's, else bfloat16 on a GPU and float32 on a CPU."),
    ] = None,
    min_pixels: Annotated[int | None, typer.Option(min=1, help="Smallest image area; default: the run's.")] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Largest image area; default: the run's.")] = None,
    as_json: Json = False,
) -> None:
    """Ask a model every question of a store.

    Greedily, and grade its answers. Stopped, the same command continues.

    \b
    Example:
      medrl eval runs/ct data/by-modality/CT/test --out runs/ct/eval/after
      medrl eval demo-base data/all/test --template plain --train data/all/train --out runs/tiny/eval/before
    """
    from medrl.evaluation.subject import evaluate_model

    terminal.quiet_libraries()
    summary = evaluate_model(
        model,
        test,
        out=out,
        mode=mode,
        template=template,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        dtype=dtype,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        train=train,
        limit=limit,
        quiet=as_json,
    ).summary
    if as_json:
        _print_json(summary)
        return
    blind = [terminal.accuracy_row(f"blind: {entry['name']}", entry["accuracy"]) for entry in summary["blind"]]
    domains = [terminal.accuracy_row(name, accuracy) for name, accuracy in summary["by_modality"].items()]
    rows = [terminal.accuracy_row(summary["name"], summary["accuracy"]), *blind, *domains]
    terminal.print_table("Accuracy", ["", "accuracy", "95 % interval", "questions"], rows)
    typer.echo(
        f"unreadable {terminal.percent(summary['parse_fail_rate'])}, cut off "
        f"{terminal.percent(summary['truncated_rate'])}, well-formed {terminal.percent(summary['well_formed'])}"
    )
    typer.echo(f"{out / 'records.jsonl'}\n{out / 'summary.json'}")


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
        _print_json(comparison.as_dict())
        return
    rows = [
        terminal.accuracy_row(a_name, comparison.a_accuracy.as_dict()),
        terminal.accuracy_row(b_name, comparison.b_accuracy.as_dict()),
        terminal.difference_row("difference", comparison.difference.as_dict()),
    ]
    terminal.print_table("Accuracy", ["", "accuracy", "95 % interval", "questions"], rows)
    typer.echo(f"only {a_name} right: {comparison.only_a}; only {b_name} right: {comparison.only_b}")
    typer.echo(comparison.verdict)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders and evaluation folders.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
) -> None:
    """Write one HTML file on runs.

    It shows runs and evaluations, is self-contained, and needs no network to read.

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
    kl: Annotated[float, typer.Option(min=0, help="Weight of the KL; 0 has no reference.")] = 0.04,
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
    compile_layers: Annotated[bool, typer.Option("--compile-layers", help="Compile the decoder layers.")] = False,
    as_json: Json = False,
) -> None:
    """Time a GRPO step, its phases, and how far it is from what the machine could do.

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
            compile_layers=compile_layers,
        )
    )
    if as_json:
        _print_json(result)
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
        _print_json(result)
        return
    rows = [("medrl", f"{result['items_per_s']:.1f}")]
    if result["baseline"] is not None:
        rows.append((result["baseline"]["name"], f"{result['baseline']['items_per_s']:.1f}"))
    terminal.print_table(f"{model}, {result['device']}", ["", "items per second"], rows)
    if result["speedup"] is not None:
        typer.echo(f"{result['speedup']:.1f} times as fast; {result['same_tokens']:.0%} of the answers are the same")


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))
