"""How long a study takes and how much disk: a few steps and answers of each method, scaled up."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medrl.data import store
from medrl.files import write_json_atomically
from medrl.report.text import duration
from medrl.runs import CELL_DONE
from medrl.settings import dump_settings
from medrl.study.claims import exclusive
from medrl.study.plan import Cell, Plan
from medrl.study.runner import FAILURES, state_of
from medrl.training.recipe import Recipe

STEPS, ANSWERS = 3, 32
"""How many steps of each method are tried, and how many answers of the base."""
CALIBRATION = "calibration.json"


def calibrate(plan: Plan, out: Path) -> dict[str, Any]:
    """Seconds and bytes of a few steps of each method and of a few answers; each measured once and kept.

    ``methods``: name -> ``start_s`` (loading and the first step), ``step_s``, ``save_s``, ``checkpoint_bytes``,
    ``step_bytes`` (logs of a step). ``answers``: zero-shot row -> ``start_s``, ``answer_s``, ``answer_bytes``.
    ``untried``: method -> why it could not be tried; it is tried again the next time. Its cells will say the same and
    be marked, and those of other methods go on.
    """
    file = out / CALIBRATION
    with exclusive(out / "claims" / "calibration"):
        before = json.loads(file.read_text()) if file.exists() else {}
        methods, answers = dict(before.get("methods", {})), dict(before.get("answers", {}))
        first = {cell.method: cell for cell in reversed(plan.cells) if cell.kind == "train"}
        to_try = [name for name in plan.study.methods if name not in methods]
        to_ask = [c for c in plan.cells if c.kind == "eval" and c.needs is None and c.method not in answers]
        if not to_try and not to_ask:
            return before
        scratch = out / "calibration"
        shutil.rmtree(scratch, ignore_errors=True)
        answers |= {cell.method: _try_answers(plan, cell, scratch / cell.id) for cell in to_ask}
        untried: dict[str, str] = {}
        for name in to_try:
            try:
                methods[name] = _try_training(first[name].recipe, scratch / name)
            except FAILURES as error:
                untried[name] = f"{type(error).__name__}: {error}"
        shutil.rmtree(scratch)
        measured = {"methods": methods, "answers": answers, "untried": untried}
        write_json_atomically(file, measured)
        return measured


def _try_training(recipe: Recipe, scratch: Path) -> dict[str, float]:
    from medrl.training.recipe import run_settings

    values = dump_settings(recipe)
    values["training"] |= {"steps": STEPS, "save_every": STEPS}
    started = time.monotonic()
    run = run_settings(Recipe(**values), out=scratch, quiet=True)
    whole = time.monotonic() - started
    steps = [row["time/step_s"] for row in run.metrics()]
    step_s = sum(steps[1:]) / len(steps[1:])  # the first step warms up
    logs = sum(size for size in run.offsets().values())
    return {
        "start_s": max(0.0, whole - step_s * len(steps)),
        "step_s": step_s,
        "checkpoint_bytes": _bytes(run.checkpoints),
        "step_bytes": logs / len(steps),
    }


def _try_answers(plan: Plan, cell: Cell, scratch: Path) -> dict[str, float]:
    from medrl.evaluation.subject import evaluate_model

    started = time.monotonic()
    limit = min(ANSWERS, len(store.load(plan.stores.test)))
    policy = cell.recipe.policy
    found = evaluate_model(
        policy.model, plan.stores.test, out=scratch, mode=cell.ask.mode, template=cell.ask.template,
        max_new_tokens=cell.recipe.training.sampling.max_new_tokens, batch_size=plan.study.evaluation.batch_size,
        option_probs=plan.study.evaluation.option_probs, dtype=policy.dtype, min_pixels=policy.min_pixels,
        max_pixels=policy.max_pixels, train=plan.stores.train, limit=limit, quiet=True,
    )  # fmt: skip
    whole = time.monotonic() - started
    answers_s = found.summary["seconds"]
    return {
        "start_s": max(0.0, whole - answers_s),
        "answer_s": answers_s / limit,
        "answer_bytes": _bytes(scratch) / limit,
    }


def estimate(plan: Plan, out: Path, measured: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is left to do: cells, seconds of one worker, bytes; None where nothing was measured.

    Cells of a kind that were done already speak for the others of that kind; else the calibration does.
    """
    left = [cell for cell in plan.cells if state_of(cell, out) == "waiting"]
    seconds, bytes_ = 0.0, 0.0
    if measured is not None:
        done = _measured_cells(plan, out)
        for cell in left:
            expected_s, expected_bytes = _expect(cell, plan, measured)
            seconds += done.get((cell.kind, cell.method), expected_s)
            bytes_ += expected_bytes
    known = measured is not None
    untried = measured.get("untried", {}) if measured is not None else {}
    return {
        "cells": len(plan.cells),
        "left": len(left),
        "seconds": seconds if known else None,
        "bytes": round(bytes_) if known else None,
        "free_bytes": shutil.disk_usage(out).free,
        "untried": untried,
    }


def _expect(cell: Cell, plan: Plan, measured: Mapping[str, Any]) -> tuple[float, float]:
    if cell.kind == "train":
        tried, training = measured["methods"].get(cell.method), cell.recipe.training
        if tried is None:  # it could not be tried, and will end as soon
            return 0.0, 0.0
        kept = min(training.keep_checkpoints, -(-training.steps // training.save_every))
        disk = kept * tried["checkpoint_bytes"] + training.steps * tried["step_bytes"]
        return tried["start_s"] + training.steps * tried["step_s"], disk
    answers = measured["answers"]
    asked = [name for name, ask in plan.study.zero_shot.items() if ask.mode == cell.ask.mode] or list(answers)
    tried = answers.get(cell.method) or answers[asked[0]]
    return tried["start_s"] + plan.n_test * tried["answer_s"], plan.n_test * tried["answer_bytes"]


def _measured_cells(plan: Plan, out: Path) -> dict[tuple[str, str], float]:
    """(kind, method) -> mean seconds of the cells that are done."""
    times: dict[tuple[str, str], list[float]] = {}
    for cell in plan.cells:
        file = cell.folder(out) / CELL_DONE
        if file.exists():
            times.setdefault((cell.kind, cell.method), []).append(json.loads(file.read_text())["seconds"])
    return {key: sum(values) / len(values) for key, values in times.items()}


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def plan_lines(plan: Plan, found: Mapping[str, Any], states: Sequence[str]) -> list[str]:
    """The plan in words, printed before anything runs."""
    lines = []
    for axis, rows in plan.rows.items():
        columns = len(plan.columns[axis])
        lines.append(f"{axis}: {len(rows)} trained on x {columns} tested on ({', '.join(rows)})")
    study = plan.study
    lines.append(f"methods: {', '.join(study.methods)}; zero-shot: {', '.join(study.zero_shot)}")
    lines.append(f"seeds: {', '.join(map(str, study.seeds))}; {plan.n_test} test questions, asked once of each model")
    trained = sum(cell.kind == "train" for cell in plan.cells)
    counted = ", ".join(f"{states.count(state)} {state}" for state in ("done", "failed", "blocked", "waiting"))
    lines.append(f"cells: {trained} trainings and {len(plan.cells) - trained} evaluations ({counted})")
    if found["seconds"] is None:
        lines.append("time and disk: not measured yet; a run measures them first, or give --calibrate")
    else:
        lines.append(
            f"left to do: about {duration(found['seconds'])} for one worker, {found['bytes'] / 1e9:.2f} GB of disk "
            f"({found['free_bytes'] / 1e9:.0f} GB free)"
        )
    lines += [f"{name} could not be tried and its cells will fail: {why}" for name, why in found["untried"].items()]
    return lines


def time_left(plan: Plan, out: Path, measured: Mapping[str, Any] | None) -> str:
    """What follows a cell's name while a study runs; nothing where nothing was measured."""
    seconds = estimate(plan, out, measured)["seconds"]
    return "" if seconds is None else f", about {duration(seconds)} left for one worker"
