"""The commands that train: demo, train."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer
import yaml

from medrl import terminal


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
        shown = yaml.safe_dump({"reward": run.recipe["reward"]}, default_flow_style=None, sort_keys=False)
        typer.echo(shown.strip())
    typer.echo(f"run:  {run.path}\nnext: medrl eval {run.path} TEST_STORE --out {run.path / 'eval' / 'after'}")
