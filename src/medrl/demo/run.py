"""``medrl demo``: data -> base -> GRPO, and supervised training of equal length -> evaluation -> report.

Every part is the part a real study uses; only the model is tiny. Killed anywhere, the same command continues.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from medrl import terminal
from medrl.data import store
from medrl.data.demo import TEST_IMAGES, TRAIN_IMAGES, build_demo
from medrl.demo.base import NO_THINK, THINK, build_base
from medrl.errors import SettingsError
from medrl.evaluation.compare import compare
from medrl.evaluation.evaluate import EvalSettings, Evaluation, evaluate_store
from medrl.files import write_json_atomically
from medrl.grpo import GRPO
from medrl.policy.loading import DEMO_BASE, PolicySettings
from medrl.policy.policy import Policy
from medrl.report.page import write_report
from medrl.rollout.sampling import Sampling
from medrl.runs import Run, read_summary
from medrl.sft import SFT
from medrl.training.checkpoint import latest_checkpoint
from medrl.training.optim import Optim
from medrl.training.recipe import Data, Recipe, run_settings
from medrl.training.settings import Training

STEPS = 150
GROUP_SIZE = 8
GRPO_PROMPTS = 16
SFT_PROMPTS = 40
"""Prompts per step of the supervised run, so that a step takes about as long as one of GRPO's 16 x 8 completions."""
MAX_NEW_TOKENS = 40

Say = Callable[[str], None]


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    images: tuple[int, int] = (TRAIN_IMAGES, TEST_IMAGES),
    rebuild_base: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run the demo into ``out`` and return what ``out/summary.json`` holds.

    Args:
        seed: of the training runs; the data and the base are always the same.
        steps: of both training runs.
        images: how many train and test images to draw.
        rebuild_base: train the base from nothing instead of taking the shipped one.
    """
    started = time.monotonic()
    say: Say = (lambda _: None) if quiet else _print
    _check_seed(out, seed)
    train, test = build_stores(out / "data", images, say)
    base = choose_base(out, rebuild_base, say, quiet)

    say(f"GRPO: {steps} steps of {GRPO_PROMPTS} prompts x {GROUP_SIZE} completions, no reference rationales")
    grpo_run = run_settings(grpo_recipe(base, train, seed, steps), out=out / "grpo", resume="auto", quiet=quiet)
    say(f"Supervised fine-tuning of the same base: {steps} steps of {SFT_PROMPTS} prompts")
    sft_run = run_settings(sft_recipe(base, train, seed, steps), out=out / "sft", resume="auto", quiet=quiet)

    think = EvalSettings(mode="think", template=THINK, max_new_tokens=MAX_NEW_TOKENS, batch_size=64)
    no_think = EvalSettings(mode="no_think", template=NO_THINK, max_new_tokens=MAX_NEW_TOKENS, batch_size=64)
    say("Evaluation on held-out images")
    before = _evaluate(base, test, train, out / "eval" / "base", think, quiet)
    sft = _evaluate(_newest(sft_run), test, train, out / "eval" / "sft", no_think, quiet)
    grpo = _evaluate(_newest(grpo_run), test, train, out / "eval" / "grpo", think, quiet)

    page = write_report(
        [out / "eval" / "base", out / "eval" / "sft", out / "eval" / "grpo", out / "sft", out / "grpo"],
        out / "report.html",
        title="The demo: reinforcement against supervised training",
    )
    summary = summarize(before, sft, grpo)
    parts = [grpo_run.provenance, sft_run.provenance, before.summary, sft.summary, grpo.summary]
    summary |= {
        # Of all the processes it took: what the parts wrote down, or this process where it did them all.
        "seconds": max(time.monotonic() - started, sum(part["seconds"] for part in parts)),
        "seed": seed,
        "training_seconds": {"grpo": grpo_run.provenance["seconds"], "sft": sft_run.provenance["seconds"]},
        "report": str(page),
    }
    write_json_atomically(out / "summary.json", summary)
    if not quiet:
        show(summary, out)
    return summary


def build_stores(out: Path, images: tuple[int, int], say: Say) -> tuple[Path, Path]:
    """The train and the test store, made when they are not there yet."""
    say("Demo data, drawn from images that installed packages ship (nothing is downloaded)")
    build_demo(out, train_images=images[0], test_images=images[1])
    for split in ("train", "test"):
        info = store.read_info(out / split)
        counts = ", ".join(f"{name} {n}" for name, n in info.modalities.items())
        say(f"  {split}: {info.rows} questions on {info.images} images ({counts})")
    for name, package, license in store.read_info(out / "train").extra["sources"]:
        say(f"    {name}, from {package}: {license}")
    return out / "train", out / "test"


def choose_base(out: Path, rebuild: bool, say: Say, quiet: bool) -> str:
    """The shipped base, or one trained from nothing."""
    if not rebuild:
        return DEMO_BASE
    if not (out / "base" / "README.md").exists():
        say("Training the base from nothing: describing and matching, apart")
        build_base(out / "base", quiet=quiet)
    return str(out / "base")


def grpo_recipe(base: str, train: Path, seed: int, steps: int = STEPS) -> Recipe:
    """Reinforcement on the letter and the form, in think mode."""
    return Recipe(
        method="grpo",
        policy=PolicySettings(model=base, dtype="float32"),
        data=Data(train=train),
        grpo=GRPO(group_size=GROUP_SIZE, kl_coef=0.0),
        training=Training(
            steps=steps,
            prompts_per_step=GRPO_PROMPTS,
            mode="think",
            template=THINK,
            sampling=Sampling(max_new_tokens=MAX_NEW_TOKENS),
            optim=Optim(lr=3e-4, schedule="linear", warmup_steps=5, betas=(0.9, 0.98)),
            save_every=50,
            seed=seed,
        ),
    )


def sft_recipe(base: str, train: Path, seed: int, steps: int = STEPS) -> Recipe:
    """Imitation of the right letter, without reasoning: the papers' baseline, on the same base and data."""
    recipe = grpo_recipe(base, train, seed, steps)
    training = recipe.training.model_copy(
        update={"prompts_per_step": SFT_PROMPTS, "mode": "no_think", "template": NO_THINK}
    )
    return recipe.model_copy(update={"method": "sft", "sft": SFT(), "training": training})


def summarize(before: Evaluation, sft: Evaluation, grpo: Evaluation) -> dict[str, Any]:
    """The figures of ``summary.json``; shares of 1, not percent."""
    over_base = compare(before.records, grpo.records, a_name="base", b_name="grpo").as_dict()
    over_sft = compare(sft.records, grpo.records, a_name="sft", b_name="grpo").as_dict()
    over_blind = grpo.summary["comparison_to_blind"]
    return {
        "base": _figures(before),
        "sft": _figures(sft),
        "grpo": _figures(grpo),
        "blind": {"name": over_blind["a"], "accuracy": over_blind["a_accuracy"]["value"]},
        "chance": grpo.summary["chance"],
        "gain_over_base": _gain(over_base),
        "gain_over_blind": _gain(over_blind),
        "gain_over_sft": _gain(over_sft),
        "verdicts": [comparison["verdict"] for comparison in (over_base, over_blind, over_sft)],
    }


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    return {**evaluation.summary["accuracy"], "well_formed": evaluation.summary["well_formed"]} | {
        "accuracy": evaluation.summary["accuracy"]["value"]
    }


def _gain(comparison: Mapping[str, Any]) -> dict[str, Any]:
    return {key: comparison["difference"][key] for key in ("value", "low", "high")}


def _evaluate(model: str, test: Path, train: Path, out: Path, settings: EvalSettings, quiet: bool) -> Evaluation:
    policy = Policy.load(model, dtype="float32")
    return evaluate_store(policy, test, out=out, model=model, train=train, settings=settings, quiet=quiet)


def _newest(run: Run) -> str:
    checkpoint = latest_checkpoint(run.checkpoints)
    assert checkpoint is not None, "a finished run has a checkpoint"
    return str(checkpoint)


def _check_seed(out: Path, seed: int) -> None:
    if (out / "summary.json").exists() and read_summary(out).get("seed") != seed:
        raise SettingsError(f"{out} holds a demo of another seed: choose another --out, or delete that folder")


def show(summary: dict[str, Any], out: Path) -> None:
    """The closing table: what came out, where it lies, what to type next."""
    names = {
        "base": "base (think)",
        "sft": f"+ SFT, {summary['training_seconds']['sft']:.0f} s (letter only)",
        "grpo": f"+ GRPO, {summary['training_seconds']['grpo']:.0f} s (think)",
    }
    blind = summary["blind"]
    rows = [
        ("an option drawn at random", terminal.percent(summary["chance"]), "", ""),
        (f"best blind baseline: {blind['name']}", terminal.percent(blind["accuracy"]), "", ""),
    ]
    for key, name in names.items():
        figures = summary[key]
        accuracy = terminal.accuracy_row(name, {**figures, "value": figures["accuracy"]})[:3]
        rows.append((*accuracy, terminal.percent(figures["well_formed"])))
    headings = ["", "accuracy", "95 % interval", "well-formed"]
    terminal.print_table("Held-out questions answered rightly", headings, rows)
    lines = [
        *(f"- {verdict}" for verdict in summary["verdicts"]),
        "",
        f"{summary['base']['n']} questions, {summary['seconds']:.0f} s in all. Overlapping crops of a few source "
        "images: these intervals speak of this data set, not of new patients.",
        "",
        f"Look:   {out / 'report.html'}",
        f"Data:   {out / 'data'}   Runs: {out / 'grpo'}, {out / 'sft'}   Evaluations: {out / 'eval'}",
        "Next:   the real thing, Qwen2-VL-2B on OmniMedVQA (DIR), on a GPU:",
        "  medrl import omnimedvqa DIR --out data/omnimedvqa",
        "  medrl split data/omnimedvqa --by modality --out data/by-modality",
        "  medrl train recipes/med-r1-ct-think.yaml --out runs/ct",
        "Research use only; model-generated reasoning is not an explanation of the model.",
    ]
    typer.echo("\n".join(lines))


def _print(text: str) -> None:
    Console(stderr=True, highlight=False).print(text)
