"""The commands for runs that outgrow a machine: what a run takes, and how to launch it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from medrl import terminal

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What is to be trained.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings to change, e.g. grpo.group_size=8.")
]


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Plan for this many GPUs; without it, a few steps are measured here.")
    ] = None,
    gpu_gb: Annotated[
        float, typer.Option(min=1, help="Memory of each, as it is sold: 80 for an H100 (86e9 bytes).")
    ] = 80.0,
    measured: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="What 'medrl bench step --json' printed on such a GPU.")
    ] = None,
    image_px: Annotated[
        int | None, typer.Option(min=28, help="Side of a usual image; default: the largest allowed.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Text tokens of a usual prompt.")] = 120,
    completion_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a usual completion; default: the most allowed.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Without --gpus: steps to run, the first to warm up.")] = 6,
    as_json: terminal.Json = False,
) -> None:
    """Estimate the memory and time of a recipe.

    With --gpus: memory by part, whether it fits and which setting would make it fit, tokens per second, hours. Nothing
    is loaded. Without: the recipe's first steps are run on this machine, and the whole run is predicted from them.

    Exit code 0: it fits, or was measured; 3: it does not fit.

    \b
    Example:
      medrl plan recipes/med-r1-ct-think.yaml --gpus 8 --gpu-gb 80
      medrl plan recipes/omnimed-mini-tiny.yaml data.train=data/split/all/train
    """
    from medrl.bench import plan as planning

    if gpus is None:
        terminal.quiet_libraries()
        found = planning.measure(recipe, overrides or (), steps=steps, quiet=as_json)
        terminal.print_json(found) if as_json else _show_measured(found)
        return
    cluster = planning.Cluster(
        gpus=gpus,
        gpu_gb=gpu_gb,
        measured=measured,
        image_px=image_px,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
    )
    found = planning.plan(recipe, overrides or (), cluster)
    terminal.print_json(found) if as_json else _show_plan(found)
    raise typer.Exit(0 if found["fits"] else terminal.EXIT_NO)


launches = typer.Typer(
    help="""Launch a run on a cluster.

\b
Example:
  medrl launch slurm recipes/med-r1-ct-think.yaml --nodes 2 --gpus 8 --out runs/ct --dry-run
""",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@launches.callback()
def _launches() -> None:
    pass


@launches.command()
def slurm(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What is to be trained, or a study.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The run's or study's folder, on a disk that all nodes see.")] = Path(
        "runs/slurm"
    ),
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of each; as many tasks.")] = 8,
    hours: Annotated[float, typer.Option(help="Time asked for; a run that needs more is requeued.")] = 24.0,
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm account.")] = None,
    cpus: Annotated[int, typer.Option(min=1, help="CPU cores of each task.")] = 8,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OPTION[=VALUE]", help="Another option of sbatch, e.g. qos=long; give it again for several."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script and stop.")] = False,
) -> None:
    """Submit a run or a study to Slurm.

    One task per GPU on every node: the ranks of a run, or workers that share the cells of a study. Before its time is
    up, or when it is preempted, it saves and goes back into the queue, and continues where it was. Needs pip install
    'medrl[cluster]'.

    \b
    Example:
      medrl launch slurm recipes/med-r1-ct-think.yaml --nodes 2 --gpus 8 --out runs/ct --dry-run
      medrl launch slurm recipes/study-med-r1.yaml --nodes 2 --gpus 8 --out runs/study --sbatch qos=long --dry-run
    """
    from medrl import launch

    job = launch.describe(recipe, overrides or (), out)
    parameters = launch.slurm_parameters(
        nodes=nodes,
        gpus=gpus,
        hours=hours,
        partition=partition,
        account=account,
        name=f"medrl-{out.name}",
        work=job.work,
        cpus=cpus,
        more=sbatch or (),
    )
    folder = out.with_name(f"{out.name}.slurm")
    if dry_run:
        typer.echo(launch.slurm_script(folder, parameters))
        return
    typer.echo(f"job {launch.submit(job, folder, parameters).job_id}\nlogs: {folder}\nrun:  {out}")


def _show_measured(found: dict[str, Any]) -> None:
    rows = [(name, f"{seconds:.3f}") for name, seconds in found["phases"].items()]
    terminal.print_table(
        f"{found['model']}, {found['measured_steps']} steps measured here", ["phase", "seconds per step"], rows
    )
    typer.echo(
        f"{found['seconds_per_step_now']:.2f} s per step; a checkpoint takes {found['seconds_per_checkpoint']:.1f} s "
        f"and {found['checkpoint_gb']:.2f} GB"
    )
    between = (
        f", between {_duration(found['hours_low'])} and {_duration(found['hours_high'])}: groups whose completions "
    )
    skipped = between + "all earn the same cost no update, and how soon most do is not known"
    several = found["hours_high"] > found["hours_low"]
    typer.echo(f"{found['steps']} steps: about {_duration(found['hours'])}{skipped if several else ''}")


def _show_plan(found: dict[str, Any]) -> None:
    rows = [(name, f"{amount:.1f}") for name, amount in found["memory_gb"].items()]
    total = ("at the worst moment", f"{found['peak_gb']:.1f}")
    terminal.print_table(
        f"{found['model']} on {found['gpus']} x {found['gpu_gb']:g} GB", ["part", "GB on each"], [*rows, total]
    )
    if found["fits"]:
        typer.echo(f"it fits: {found['room_gb']:.1f} GB of each are planned with")
    elif found["set"]:
        typer.echo(
            f"it does not fit into {found['room_gb']:.1f} GB. It would with {' '.join(found['set'])}: "
            f"{found['peak_with_that_gb']:.1f} GB"
        )
    else:
        typer.echo(f"it does not fit into {found['room_gb']:.1f} GB, and no setting makes it: take larger or more GPUs")
        return
    typer.echo(f"training.tokens_per_micro_batch={found['tokens_per_micro_batch']} would fill that")
    if found["idle_gpus"]:
        typer.echo(f"{found['idle_gpus']} GPUs have no prompt of a step: raise training.prompts_per_step")
    basis, so_set = found["basis"], "so set, " if found["set"] else ""
    typer.echo(
        f"{so_set}{found['seconds_per_step']:.2f} s per step, {found['tokens_per_s']:.0f} tokens/s, "
        f"{found['steps']} steps: about {_duration(found['hours'])}, "
        f"with completions of {basis['completion_tokens']} tokens, images of {basis['image_px']} px, "
        f"and {basis['share_of_limit']:.0%} of what the card could do ({basis['rates']})"
    )


def _duration(hours: float) -> str:
    from medrl.report.text import duration

    return duration(3600 * hours)
