"""What a report begins and ends with: what was asked, the answer in three sentences, how to make every figure again.

The sentences claim no more than a paired interval and an exact test allow, and every figure in them has its interval.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medrl.evaluation.compare import Comparison
from medrl.evaluation.intervals import Interval
from medrl.report.tables import Evaluation, best_blind_name, blind_of, compare_evaluations, compare_to_best_blind
from medrl.report.text import UNKNOWN, duration, p_equals, percent, percent_range, points, points_range
from medrl.runs import ASKED, Run

_FIGURES = {
    "n", "accuracy", "chance", "by_modality", "by_question_type", "by_source", "parse_fail_rate", "truncated_rate",
    "well_formed", "mean_tokens", "answer_letters", "target_letters", "blind", "comparison_to_blind", "samples",
    "pass@k", "agreement",
}  # fmt: skip
"""What a summary holds besides provenance."""


def asked(runs: Sequence[tuple[str, Run, int]], test_sets: Sequence[Sequence[Evaluation]]) -> list[tuple[str, str]]:
    """(what, in words): who was trained on what, and who was asked what. ``runs``: name, run, steps taken."""
    rows = [(f"trained: {name}", _training(run, steps)) for name, run, steps in runs]
    for evaluations in test_sets:
        first = evaluations[0]
        images = len({image for record in first.records for image in record.images})
        modalities = sorted({record.modality for record in first.records})
        more = f" and {len(modalities) - 8} more" if len(modalities) > 8 else ""
        store = first.summary.get("store")
        rows.append(
            (
                f"test set {Path(store).name if store else first.name}",
                f"{len(first.records)} questions about {images} images: {', '.join(modalities[:8])}{more}",
            )
        )
        rows += [(f"asked: {evaluation.name}", _asking(evaluation)) for evaluation in evaluations]
    return rows


def answer(evaluations: Sequence[Evaluation]) -> list[str]:
    """Three sentences over evaluations of the same examples: the most accurate of the later ones against the first,
    against the next, and against the best rule that saw no image. Fewer where there is less to compare."""
    first, *later = evaluations
    best, *others = sorted(later, key=lambda evaluation: -(evaluation.accuracy.value or 0.0)) or [first]
    baselines = blind_of(evaluations)
    against_blind = compare_to_best_blind(best, baselines)
    if best is first:
        sentences = [f"{first.name} has {_share(first.accuracy)} of {len(first.records)} questions right."]
    else:
        sentences = [_sentence(compare_evaluations(first, best))]
    if others:
        sentences.append(_sentence(compare_evaluations(others[0], best)))
    if against_blind is not None:
        rule = f"the best rule that sees no image ({best_blind_name(baselines)})"
        sentences.append(_sentence(against_blind, rule))
    return sentences


def commands(runs: Sequence[tuple[str, Run]], test_sets: Sequence[Sequence[Evaluation]]) -> list[tuple[str, str]]:
    """(which figures, the command that makes them again, in folders of their own)."""
    rows = []
    for name, run in runs:
        words = ["medrl", "train", str(run.path / "recipe.yaml"), "--out", f"again/{name}"]
        if "policy" in run.recipe:  # a run from Python has no recipe that the command could read
            rows.append((f"learning curves and monitors of {name}", shlex.join(words)))
    for first, *others in test_sets:
        rows += [(f"all figures of {one.name}", shlex.join(_asking_again(one))) for one in (first, *others)]
        rows += [
            (f"{other.name} minus {first.name}", shlex.join(["medrl", "compare", str(first.path), str(other.path)]))
            for other in others
        ]
    folders = [run.path for _, run in runs] + [evaluation.path for group in test_sets for evaluation in group]
    return [*rows, ("this page", shlex.join(["medrl", "report", *map(str, folders), "--out", "report.html"]))]


def provenance(evaluation: Evaluation) -> dict[str, Any]:
    """What a summary says about where its figures came from."""
    return {key: value for key, value in evaluation.summary.items() if key not in _FIGURES}


def flatten(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as (dotted name, text) in their order."""
    rows: list[tuple[str, str]] = []
    for key, value in facts.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows += flatten(value, f"{name}.")
        elif key == "seconds" and isinstance(value, int | float):
            rows.append((f"{prefix}wall-clock", duration(value)))
        elif isinstance(value, list):
            rows.append((name, ", ".join(map(str, value)) or UNKNOWN))
        else:
            rows.append((name, UNKNOWN if value in (None, "", {}) else str(value)))
    return rows


def _training(run: Run, steps: int) -> str:
    recipe, rows = run.recipe, run.provenance.get("train_rows")
    method = str(recipe.get("method") or recipe.get("objective") or "trained")
    model = recipe["policy"].get("model") if isinstance(recipe.get("policy"), Mapping) else None
    on = f" on {rows} questions" if rows else ""
    return f"{method}, {steps} steps{on}" + (f", from {model}" if model else "")


def _asking(evaluation: Evaluation) -> str:
    summary = evaluation.summary
    samples = summary.get("samples") or 1
    drawn = f"{samples} samples each, the majority counts" if samples > 1 else "greedily"
    scorer = f", graded by {summary['scorer']}" if summary.get("scorer") else ""
    wording = f", template {summary['template']}" if summary.get("template") else ""
    return f"{summary.get('model') or 'a model'}, {drawn}, mode {summary.get('mode')}{wording}{scorer}"


def _asking_again(evaluation: Evaluation) -> list[str]:
    summary, file = evaluation.summary, evaluation.path / ASKED
    out = ["--out", f"again/{evaluation.name}"]
    if summary.get("scorer"):
        return ["medrl", "rescore", str(summary["rescored_from"]), "--scorer", str(summary["scorer"]), *out]
    how: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    words = ["medrl", "eval", str(summary.get("model")), str(summary.get("store")), *out]
    given = {
        "--endpoint": how.get("endpoint"),
        "--model": how.get("served_model"),
        "--mode": summary.get("mode"),
        "--template": summary.get("template"),
        "--train": summary.get("train_store"),
        "--max-new-tokens": how.get("max_new_tokens"),
        "--dtype": str(how["dtype"]).removeprefix("torch.") if how.get("dtype") else None,
    }
    given |= {f"--{key.replace('_', '-')}": value for key, value in (how.get("sampling") or {}).items()}
    return [*words, *(word for name, value in given.items() if value is not None for word in (name, str(value)))]


def _sentence(found: Comparison, a_name: str | None = None) -> str:
    """B against A, with both accuracies, the difference, its interval and its test."""
    a, b = a_name or found.a_name, found.b_name
    shares = f"{b} has {_share(found.b_accuracy)} right and {a} {_share(found.a_accuracy)}"
    evidence = f"{points(found.difference.value)} points"
    if found.difference.low is not None:
        evidence += f" (95\u202f% interval {points_range(found.difference)}; exact McNemar {p_equals(found.mcnemar_p)})"
    if found.better or found.worse:
        return f"{shares}: {evidence}."
    return f"{shares}: no difference is shown, {evidence}."


def _share(accuracy: Interval) -> str:
    return f"{percent(accuracy.value)} ({percent_range(accuracy)})"
