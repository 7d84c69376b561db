"""Runs ``medrl bench`` for a list of cases, each in a process of its own, and writes Markdown tables."""

import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TRAINER = "trl" if importlib.util.find_spec("trl") else "naive"  # trl comes with pip install 'medrl[interop]'
MEASURED = "measured: "
"""What ``medrl bench --json`` puts before what it has measured, among its messages, when a baseline is to come."""
PHASES = ("data", "vision", "prefill", "decode", "reference", "policy", "optimizer")


@dataclass(frozen=True)
class Case:
    """One call of ``medrl bench``."""

    name: str
    words: tuple[str, ...]
    """``step ...`` or ``eval ...``."""
    limit_s: float = 1800.0
    """It is ended after so long."""


@dataclass(frozen=True)
class Outcome:
    """What a call printed, or why it printed nothing."""

    case: Case
    found: dict[str, Any] | None
    problem: str = ""


def run(case: Case, limit_s: float, log: Path) -> Outcome:
    """Run a case; one that fails or takes too long says so in the table, and the others go on."""
    problem = call(["-m", "medrl", "bench", *case.words, "--json"], min(limit_s, case.limit_s), log)
    found = found_in(log.with_suffix(".out").read_text(errors="replace"))
    if found is None:  # what was measured before the baseline began
        said = re.findall(rf"^{MEASURED}(.*)$", log.with_suffix(".err").read_text(errors="replace"), re.M)
        found = found_in(said[-1]) if said else None
    return Outcome(case, found, problem or ("" if found else "printed no result"))


def found_in(printed: str) -> dict[str, Any] | None:
    """The last JSON object that begins a line, whatever stands around it."""
    found = None
    for start in re.finditer(r"^\{", printed, re.M):
        with suppress(ValueError):
            found, _ = json.JSONDecoder().raw_decode(printed, start.start())
    return found


def call(words: Sequence[str], limit_s: float, log: Path, fine: Sequence[int] = (0,)) -> str:
    """Run Python with these words, on this repository's medrl. Returns what went wrong, "" for nothing.

    What it prints goes to ``log``.out and ``log``.err as it comes. It ends with all its children: workers of a compiler
    would go on otherwise, and hold what they print to. Models are made here, so no hub is asked or waited for.
    """
    print(f"{time.strftime('%H:%M:%S')} python {' '.join(words)}", file=sys.stderr, flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
        child = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=out, stderr=err, start_new_session=True,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            status = child.wait(timeout=max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            return f"not finished in {limit_s:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if status in fine:
        return ""
    lines = log.with_suffix(".err").read_text(errors="replace").strip().splitlines() or ["no message"]
    print("\n".join(lines[-30:]), file=sys.stderr)
    return f"failed with exit code {status}: {lines[-1][:120]}"


def missing_packages() -> list[str]:
    """What medrl and its exactness tests need and this Python has not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [re.split(r"[^\w.-]", line)[0] for line in project["dependencies"]]
    return [name for name in (*needed, "hypothesis", "packaging", "pytest", "pytest-timeout") if not is_installed(name)]


def is_installed(name: str) -> bool:
    """A distribution, by its name on the package index."""
    return any(importlib.metadata.distributions(name=name))


STEP_HEADINGS = (
    "step", "seconds", " / ".join(PHASES), "limit", "of the limit", "decode, ms per token", "tokens/s", "peak GB",
    "baseline, s", "ratio", "ratio, processor time", "attention", "layers", "fused",
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
    missing = outcome.problem and f"baseline: {outcome.problem}"
    return [
        f"{found['seconds_per_step']:.2f}",
        " / ".join(f"{found['phases'][name]:.3f}" for name in PHASES),
        f"{found['limit_seconds']:.2f}",
        f"{found['fraction_of_limit']:.0%}",
        f"{1000 * found['phases']['decode'] / found['completion_tokens']:.1f}",
        f"{found['tokens_per_s']:.0f}",
        f"{found['peak_gb']:.1f}",
        f"{base['name']} {base['seconds_per_step']:.2f}" if base else missing,
        f"{found['speedup']:.1f}" if base else "",
        f"{found['cpu_speedup']:.1f}" if base else "",
        found["attention"],
        "compiled" if found["compiled"] else "as they are",
        " and ".join(found["kernels"]) or "none",
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
        *(
            [
                f"{found['baseline']['items_per_s']:.1f}",
                f"{found['speedup']:.1f}",
                f"{found['cpu_speedup']:.1f}",
                f"{found['same_tokens']:.0%}",
            ]
            if found["baseline"]
            else [outcome.problem]
        ),
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
