"""What a cell does: it is a ``medrl train`` or a ``medrl eval``, here or as a command of its own."""

import gc
import subprocess
from collections.abc import Sequence
from pathlib import Path

import yaml

from medrl.errors import RunError
from medrl.files import write_text_atomically
from medrl.settings import dump_settings
from medrl.study.plan import Cell, Plan

RECIPE = "recipe.yaml"


def run_cell(plan: Plan, cell: Cell, out: Path, *, quiet: bool = True) -> None:
    """Do the work of one cell, or what is left of it. Raises what training and evaluation raise."""
    if cell.kind == "train":
        text = yaml.safe_dump(dump_settings(cell.recipe), sort_keys=False, allow_unicode=True)
        write_text_atomically(cell.folder(out) / RECIPE, text)
    if plan.study.launcher:
        _launch([*plan.study.launcher, *command(plan, cell, out)[1:]], cell.folder(out))
    elif cell.kind == "train":
        _train(cell, out, quiet)
    else:
        _evaluate(plan, cell, out, quiet)
    gc.collect()  # models refer to themselves in circles, and the next cell needs their memory


def command(plan: Plan, cell: Cell, out: Path) -> list[str]:
    """The words that do the same by hand; what the page gives as the way to reproduce a figure."""
    if cell.kind == "train":
        recipe = str(cell.folder(out) / RECIPE)
        return ["medrl", "train", recipe, "--out", str(cell.result(out)), "--resume", "auto"]
    words = ["medrl", "eval", _model(plan, cell, out), str(plan.stores.test), "--out", str(cell.result(out))]
    words += ["--mode", cell.ask.mode, "--train", str(plan.stores.train)]
    words += ["--max-new-tokens", str(cell.recipe.training.sampling.max_new_tokens)]
    words += ["--batch-size", str(plan.study.evaluation.batch_size), "--dtype", cell.recipe.policy.dtype]
    words += ["--template", cell.ask.template] if cell.ask.template else []
    words += ["--option-probs" if plan.study.evaluation.option_probs else "--no-option-probs"]
    for name in ("min_pixels", "max_pixels"):
        value = getattr(cell.recipe.policy, name)
        words += [f"--{name.replace('_', '-')}", str(value)] if value else []
    return words


def _model(plan: Plan, cell: Cell, out: Path) -> str:
    trained = next((other for other in plan.cells if other.id == cell.needs), None)
    return str(trained.result(out)) if trained else cell.recipe.policy.model


def _train(cell: Cell, out: Path, quiet: bool) -> None:
    from medrl.training.recipe import run_settings

    folders = (Path(), cell.folder(out))
    run_settings(cell.recipe, out=cell.result(out), resume="auto", quiet=quiet, folders=folders)


def _evaluate(plan: Plan, cell: Cell, out: Path, quiet: bool) -> None:
    from medrl.evaluation.subject import evaluate_model

    policy = cell.recipe.policy
    evaluate_model(
        _model(plan, cell, out),
        plan.stores.test,
        out=cell.result(out),
        mode=cell.ask.mode,
        template=cell.ask.template,
        max_new_tokens=cell.recipe.training.sampling.max_new_tokens,
        batch_size=plan.study.evaluation.batch_size,
        option_probs=plan.study.evaluation.option_probs,
        dtype=policy.dtype,
        min_pixels=policy.min_pixels,
        max_pixels=policy.max_pixels,
        train=plan.stores.train,
        quiet=quiet,
    )


def _launch(words: Sequence[str], folder: Path) -> None:
    """The cell as a command of its own; what it prints goes to log.txt."""
    log = folder / "log.txt"
    with log.open("ab") as stream:
        done = subprocess.run(words, stdout=stream, stderr=stream, check=False)
    if done.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it said nothing"
        raise RunError(f"'{' '.join(words[:4])} …' ended with exit code {done.returncode}: {last} (all of it: {log})")
