"""Runs ``medrl bench`` for a list of cases, each in a process of its own, and writes Markdown tables."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PHASES = ("data", "vision", "prefill", "decode", "reference", "policy", "optimizer")


@dataclass(frozen=True)
class Case:
    """One call of ``medrl bench``."""

    name: str
    words: tuple[str, ...]
    """``step ...`` or ``eval ...``."""


@dataclass(frozen=True)
class Outcome:
    """What a call printed, or why it printed nothing."""

    case: Case
    found: dict[str, Any] | None
    problem: str = ""


def run(case: Case, limit_s: float) -> Outcome:
    """Run a case; one that fails or takes too long says so in the table, and the others go on."""
    command = [sys.executable, "-m", "medrl", "bench", *case.words, "--json"]
    print(f"{time.strftime('%H:%M:%S')} {' '.join(command[2:])}", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, limit_s))
    except subprocess.TimeoutExpired:
        return Outcome(case, None, f"not finished in {limit_s:.0f} s")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(done.stderr, file=sys.stderr)
        return Outcome(case, None, f"failed: {last[:120]}")
    return Outcome(case, json.loads(done.stdout))


STEP_HEADINGS = (
    "step", "seconds", " / ".join(PHASES), "limit", "of the limit", "decode, ms per token", "tokens/s", "peak GB",
    "baseline, s", "ratio", "ratio, processor time", "attention",
)  # fmt: skip
EVAL_HEADINGS = ("evaluation", "items/s", "transformers generate, items/s", "ratio", "ratio, processor time", "same")


def step_table(outcomes: Sequence[Outcome]) -> str:
    """Rows of ``medrl bench step``."""
    return markdown(STEP_HEADINGS, [[outcome.case.name, *_step_cells(outcome)] for outcome in outcomes])


def _step_cells(outcome: Outcome) -> list[str]:
    found = outcome.found
    if found is None:
        return [outcome.problem]
    base = found.get("baseline")
    return [
        f"{found['seconds_per_step']:.2f}",
        " / ".join(f"{found['phases'][name]:.2f}" for name in PHASES),
        f"{found['limit_seconds']:.2f}",
        f"{found['fraction_of_limit']:.0%}",
        f"{1000 * found['phases']['decode'] / found['completion_tokens']:.1f}",
        f"{found['tokens_per_s']:.0f}",
        f"{found['peak_gb']:.1f}",
        f"{base['name']} {base['seconds_per_step']:.2f}" if base else "",
        f"{found['speedup']:.1f}" if base else "",
        f"{found['cpu_speedup']:.1f}" if base else "",
        found["attention"],
    ]


def eval_table(outcomes: Sequence[Outcome]) -> str:
    """Rows of ``medrl bench eval``."""
    return markdown(EVAL_HEADINGS, [[outcome.case.name, *_eval_cells(outcome)] for outcome in outcomes])


def _eval_cells(outcome: Outcome) -> list[str]:
    found = outcome.found
    if found is None:
        return [outcome.problem]
    return [
        f"{found['items_per_s']:.1f}",
        f"{found['baseline']['items_per_s']:.1f}",
        f"{found['speedup']:.1f}",
        f"{found['cpu_speedup']:.1f}",
        f"{found['same_tokens']:.0%}",
    ]


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; short rows are filled up."""
    full = [[*row, *[""] * (len(headings) - len(row))] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [headings, ["---"] * len(headings), *full])


def machine(outcomes: Sequence[Outcome]) -> str:
    """Where and with what the first finished case ran."""
    found = next((outcome.found for outcome in outcomes if outcome.found), None)
    if found is None:
        return "nothing finished"
    rates = f"; copies {found['copy_gb_per_s']:.0f} GB/s, multiplies {found['matrix_tflops']:.2f} TFLOP/s"
    return found["device"] + (rates if "matrix_tflops" in found else "")
