"""Base, SFT, RFT and GRPO in three modes from one base with equal compute, inside and outside the trained domain.

    python benchmarks/compare_methods.py recipes/compare-methods-demo.yaml --demo data/demo --domain MRI \\
        --out runs/compare
    python benchmarks/compare_methods.py recipes/compare-methods-demo.yaml --omnimed DIR --domain CT \\
        --out runs/compare-ct

With ``--omnimed`` it makes, below ``--out``, what ``recipes/study-omnimed-mini.yaml`` makes by hand: image-disjoint
stores with options drawn anew, and a base that can describe and match; then it asks about modality and anatomy only.

Compute is counted in tokens through the model: 1 for a token read or sampled, 3 for one that is trained on (forward and
backward). GRPO in think mode runs the recipe's steps; every other method gets the steps that cost as much, by a pilot
of a few steps, and the table states what each really cost. Everything is a run or an evaluation folder, so a stopped
comparison continues. Research use only; model-generated reasoning is not an explanation of the model.
"""

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from describe_and_match import KNOWN, build
from rich.console import Console
from rich.table import Table

from medrl.data import store
from medrl.data.demo import TEST_IMAGES, TRAIN_IMAGES, build_demo
from medrl.data.prompts import make_prompt
from medrl.evaluation.compare import compare
from medrl.evaluation.evaluate import EvalSettings, evaluate_store
from medrl.evaluation.intervals import Interval, clustered_bootstrap
from medrl.files import write_json_atomically
from medrl.policy.policy import Policy, load_policy
from medrl.runs import Run
from medrl.settings import dump_settings, load_settings
from medrl.training.checkpoint import latest_checkpoint
from medrl.training.recipe import Recipe, run_settings
from medrl.types import EvalRecord, Mode, image_cluster

MODES: dict[str, Mode] = {"think": "think", "no-think": "no_think", "think-after": "think_after"}
METHODS: dict[str, tuple[str, Mode]] = {
    **{f"grpo-{name}": ("grpo", mode) for name, mode in MODES.items()},
    "rft-think": ("rft", "think"),
    "sft-no-think": ("sft", "no_think"),
    "sft-think": ("sft", "think"),
}
FIRST = "grpo-think"
"""Its cost is the budget of all others."""
TEMPLATES: dict[Mode, str] = {"think": "plain", "no_think": "plain-no-think", "think_after": "plain-think-after"}
PILOT_STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--demo", type=Path, help="folder of the demo's stores; they are built when missing")
    parser.add_argument("--omnimed", type=Path, help="folder in OmniMedVQA's layout: stores and base are made of it")
    parser.add_argument("--base-steps", type=int, nargs=2, default=(1600, 600), help="of the base that --omnimed makes")
    parser.add_argument("--train", type=Path, help="store to train on, where it is not the demo's")
    parser.add_argument("--test", type=Path, help="store to test on, where it is not the demo's")
    parser.add_argument("--domain", required=True, help="the modality to train on; all others are out of domain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, help="test questions, for a quick look")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_intermixed_args()  # overrides may stand before and behind the options
    train, test, overrides = args.train, args.test, args.overrides
    if args.demo:
        build_demo(args.demo, train_images=TRAIN_IMAGES, test_images=TEST_IMAGES)
        train, test = args.demo / "train", args.demo / "test"
    if args.omnimed:
        train, test, base = make_from_omnimed(args.omnimed, args.out, tuple(args.base_steps))
        overrides = [f"policy.model={base}", f"data.question_type=[{', '.join(KNOWN)}]", *overrides]
    if train is None or test is None:
        parser.error("give --demo DIR, --omnimed DIR, or --train STORE and --test STORE")
    recipe = load_settings(Recipe, args.recipe, [*overrides, f"data.train={train}"])
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"modality": (args.domain,)})})
    rows = run_all(recipe, test, args.out, args.seeds, args.limit)
    summary = summarize(rows, args.domain)
    write_json_atomically(args.out / "comparison.json", {"domain": args.domain, "seeds": args.seeds, **summary})
    show(summary, args.domain)


def make_from_omnimed(folder: Path, out: Path, base_steps: tuple[int, int]) -> tuple[Path, Path, Path]:
    """Train store, test store and base; what is there already is kept."""
    data, split, base = out / "data", out / "split", out / "base-model"
    if not data.exists():
        medrl("import", "omnimedvqa", folder, "--out", data)
    if not split.exists():
        medrl("split", data, "--by", "none", "--resample-distractors", "--out", split)
    if not (base / "config.json").exists():
        build(split / "all" / "train", base, steps=base_steps, seed=0)
    return split / "all" / "train", split / "all" / "test", base


def medrl(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "medrl", *map(str, words)], check=True)


def run_all(recipe: Recipe, test: Path, out: Path, seeds: Sequence[int], limit: int | None) -> list[dict[str, Any]]:
    """Train and evaluate every method with every seed: ``method, seed, cost, steps, records``."""
    policy = load_policy(recipe.policy)
    examples = store.load(recipe.data.train)[:200]
    prompt_tokens = {
        mode: fmean(len(e.token_ids) for e in policy.encode([make_prompt(x, mode, TEMPLATES[mode]) for x in examples]))
        for mode in MODES.values()
    }
    rows = []
    for mode_name, mode in MODES.items():
        folder = out / "base" / mode_name
        records = ask(recipe.policy.model, recipe, test, folder, mode, limit)
        rows += [
            {"method": f"base-{mode_name}", "seed": seed, "cost": 0, "steps": 0, "records": records} for seed in seeds
        ]
    budget = None
    for seed in seeds:
        for name, (method, mode) in METHODS.items():
            settings = with_method(recipe, method, mode, seed, recipe.training.steps)
            if name != FIRST:
                pilot = with_method(recipe, method, mode, seed, PILOT_STEPS)
                trial = run_settings(pilot, out=out / "pilots" / f"seed-{seed}" / name, resume="auto", quiet=True)
                assert budget is not None, f"{FIRST} comes first in METHODS"
                steps = max(1, round(budget / (cost(trial, pilot, prompt_tokens[mode]) / PILOT_STEPS)))
                settings = with_method(recipe, method, mode, seed, steps)
            folder = out / f"seed-{seed}" / name
            run = run_settings(settings, out=folder, resume="auto")
            spent = cost(run, settings, prompt_tokens[mode])
            budget = budget or spent
            checkpoint = latest_checkpoint(run.checkpoints)
            assert checkpoint is not None, "a finished run has a checkpoint"
            records = ask(str(checkpoint), recipe, test, folder / "eval" / "after", mode, limit)
            steps = settings.training.steps
            rows.append({"method": name, "seed": seed, "cost": spent, "steps": steps, "records": records})
    return rows


def with_method(recipe: Recipe, method: str, mode: Mode, seed: int, steps: int) -> Recipe:
    """The recipe with nothing changed but method, mode and its wording, seed and steps."""
    values = dump_settings(recipe)
    values["method"] = method
    values["training"] |= {"mode": mode, "template": TEMPLATES[mode], "seed": seed, "steps": steps}
    return Recipe(**values)


def cost(run: Run, recipe: Recipe, prompt_tokens: float) -> float:
    """Tokens through the model: 3 for each that was trained on, 1 for each that was read or sampled for a rollout."""
    updates = recipe.grpo.updates_per_rollout if recipe.method == "grpo" else 1
    size = {"grpo": recipe.grpo.group_size, "rft": recipe.rft.group_size, "sft": 0}[recipe.method]
    prompts = recipe.training.prompts_per_step
    return sum(
        3 * updates * row["training_tokens"]
        + prompts * size * row["completions/mean_length"]
        + (prompts * prompt_tokens if size else 0)
        for row in run.metrics()
    )


def ask(model: str, recipe: Recipe, test: Path, out: Path, mode: Mode, limit: int | None) -> list[EvalRecord]:
    """Greedy answers of a model to the whole test store."""
    settings = EvalSettings(
        mode=mode, template=TEMPLATES[mode], max_new_tokens=recipe.training.sampling.max_new_tokens, batch_size=64
    )
    policy = Policy.load(
        model, dtype=recipe.policy.dtype, min_pixels=recipe.policy.min_pixels, max_pixels=recipe.policy.max_pixels
    )
    train, types = recipe.data.train, recipe.data.question_type
    records = evaluate_store(policy, test, out=out, model=model, train=train, limit=limit, settings=settings).records
    return [record for record in records if not types or record.question_type in types]


def summarize(rows: list[dict[str, Any]], domain: str) -> dict[str, Any]:
    """Per method: mean over seeds and each seed, in and out of the domain, and the difference to GRPO in think mode.

    Intervals resample whole images and hold the questions of all seeds about one image together.
    """
    methods: dict[str, Any] = {}
    pooled = {name: _pool(rows, name) for name in dict.fromkeys(row["method"] for row in rows)}
    for name, records in pooled.items():
        mine = [row for row in rows if row["method"] == name]
        entry: dict[str, Any] = {"steps": [r["steps"] for r in mine], "cost_tokens": [r["cost"] for r in mine]}
        for side in ("in", "out"):
            inside = side == "in"
            kept = [record for record in records if (record.modality == domain) == inside]
            first = [record for record in pooled[FIRST] if (record.modality == domain) == inside]
            clusters = [image_cluster(record.images) for record in kept]
            entry[side] = {
                "accuracy": dataclasses.asdict(clustered_bootstrap([r.correct for r in kept], clusters)),
                "seeds": [fmean(r.correct for r in row["records"] if (r.modality == domain) == inside) for row in mine],
                "minus_first": None
                if name == FIRST
                else dataclasses.asdict(compare(first, kept, a_name=FIRST, b_name=name).difference),
            }
        methods[name] = entry
    return {"methods": methods}


def _pool(rows: list[dict[str, Any]], method: str) -> list[EvalRecord]:
    """The records of all seeds, told apart by their ids."""
    return [
        dataclasses.replace(record, id=f"{row['seed']}/{record.id}")
        for row in rows
        if row["method"] == method
        for record in row["records"]
    ]


def show(summary: dict[str, Any], domain: str) -> None:
    table = Table(
        title=f"Trained on {domain}; accuracy in %, 95 % interval, each seed in brackets", title_justify="left"
    )
    for heading in ("method", f"{domain} (in)", "others (out)", f"out, minus {FIRST}", "cost, M tokens"):
        table.add_column(heading)
    for name, entry in summary["methods"].items():
        sides = [
            f"{_text(Interval(**entry[s]['accuracy']))} {[round(100 * v, 1) for v in entry[s]['seeds']]}"
            for s in ("in", "out")
        ]
        difference = entry["out"]["minus_first"]
        costs = ", ".join(f"{value / 1e6:.2f}" for value in entry["cost_tokens"])
        table.add_row(name, *sides, _text(Interval(**difference)) if difference else "", costs)
    Console(highlight=False, width=170).print(table, markup=False)


def _text(interval: Interval) -> str:
    ends = [interval.value, interval.low, interval.high]
    value, low, high = (float("nan") if end is None else 100 * end for end in ends)
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
