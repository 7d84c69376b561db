"""The CPU tables of README.md: ``make bench`` prints them as they stand there, for the machine it runs on.

Seconds are what to read on a quiet machine; where others compute at the same time, processor time (all threads of the
process) is, which ``medrl bench --json`` has for steps, too.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from tables import TRAINER, Case, Outcome, machine, markdown, run

STEPS = (
    f"step --model 25m --image-px 224 --prompts 4 --group 8 --completion-tokens 64 --baseline {TRAINER}",
    "step --model tiny --image-px 1008 --prompts 1 --group 8 --prompt-tokens 40 --completion-tokens 32 "
    "--baseline naive",
)
EVALUATIONS = ("eval --model 25m --items 64 --completion-tokens 96",)
STEP_HEADINGS = ("call", "medrl, s per step", "baseline, s per step", "ratio", "share of the physical limit")
EVAL_HEADINGS = (
    "call", "medrl, questions/s", "transformers generate, questions/s", "ratio", "processor time, s", "same tokens",
)  # fmt: skip


def main() -> None:
    steps = run_all(STEPS)
    print(f"{machine(steps)}\n\n{step_table(steps)}\n", flush=True)
    print(eval_table(run_all(EVALUATIONS)))


def run_all(calls: Sequence[str]) -> list[Outcome]:
    cases = [Case(f"`medrl bench {call}`", tuple(call.split())) for call in calls]
    with tempfile.TemporaryDirectory(prefix="medrl-bench-") as folder:
        return [run(case, case.limit_s, Path(folder) / "case") for case in cases]


def step_table(outcomes: Sequence[Outcome]) -> str:
    return markdown(STEP_HEADINGS, [[outcome.case.name, *_step_cells(outcome)] for outcome in outcomes])


def _step_cells(outcome: Outcome) -> list[str]:
    found = outcome.found
    if found is None:
        return [outcome.problem]
    base = found["baseline"]
    seconds, share = f"{found['seconds_per_step']:.2f}", f"{100 * found['fraction_of_limit']:.0f} %"
    if base is None:
        return [seconds, outcome.problem, "", share]
    return [seconds, f"{base['name']} {base['seconds_per_step']:.1f}", f"{found['speedup']:.1f}", share]


def eval_table(outcomes: Sequence[Outcome]) -> str:
    return markdown(EVAL_HEADINGS, [[outcome.case.name, *_eval_cells(outcome)] for outcome in outcomes])


def _eval_cells(outcome: Outcome) -> list[str]:
    found = outcome.found
    if found is None:
        return [outcome.problem]
    base = found["baseline"]
    if base is None:
        return [f"{found['items_per_s']:.1f}", outcome.problem]
    return [
        f"{found['items_per_s']:.1f}",
        f"{base['items_per_s']:.1f}",
        f"{found['speedup']:.1f}",
        f"{found['cpu_seconds']:.1f} against {base['cpu_seconds']:.1f}",
        f"{100 * found['same_tokens']:.0f} %",
    ]


if __name__ == "__main__":
    main()
