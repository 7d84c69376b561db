"""The CPU tables: ``make bench``. Prints them; README.md keeps dated ones.

The ratio in seconds is what to read on a quiet machine; the ratio in processor time (all threads of the process) is
what to read where others compute at the same time.
"""

import tempfile
from pathlib import Path

from tables import TRAINER, Case, Outcome, eval_table, machine, run, step_table

STEPS = [
    Case(f"25m, 224 px, 4 x 8 x 64 tokens, KL, against {TRAINER}", ("step", "--model", "25m", "--baseline", TRAINER)),
    Case(
        "tiny, 1008 px (1,296 image tokens), 1 x 8 x 32 tokens, KL",
        ("step", "--model", "tiny", "--image-px", "1008", "--prompts", "1", "--prompt-tokens", "40",
         "--completion-tokens", "32", "--baseline", "naive"),
    ),
]  # fmt: skip
EVALUATIONS = [Case("25m, 224 px, 96 tokens", ("eval", "--model", "25m"))]


def main() -> None:
    outcomes = run_all(STEPS)
    print(f"{machine(outcomes)}\n\n{step_table(outcomes)}\n", flush=True)
    print(eval_table(run_all(EVALUATIONS)))


def run_all(cases: list[Case]) -> list[Outcome]:
    with tempfile.TemporaryDirectory(prefix="medrl-bench-") as folder:
        return [run(case, case.limit_s, Path(folder) / "case") for case in cases]


if __name__ == "__main__":
    main()
