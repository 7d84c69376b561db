"""The CPU tables: ``make bench``. Prints them; README.md keeps dated ones.

The ratio in seconds is what to read on a quiet machine; the ratio in processor time (all threads of the process) is
what to read where others compute at the same time.
"""

import importlib.util

from tables import Case, eval_table, machine, run, step_table

LIMIT_S = 1800
TRAINER = "trl" if importlib.util.find_spec("trl") else "naive"  # trl comes with pip install 'medrl[interop]'
STEPS = [
    Case(f"25m, 224 px, 4 x 8 x 64 tokens, KL, against {TRAINER}", ("step", "--model", "25m", "--baseline", TRAINER)),
    Case(
        "tiny, 1008 px (1,296 image tokens), 1 x 8 x 32 tokens, KL",
        ("step", "--model", "tiny", "--image-px", "1008", "--prompts", "1", "--completion-tokens", "32",
         "--baseline", "naive"),
    ),
]  # fmt: skip
EVALUATIONS = [Case("25m, 224 px, 32 tokens", ("eval", "--model", "25m", "--completion-tokens", "32"))]


def main() -> None:
    outcomes = [run(case, LIMIT_S) for case in STEPS]
    print(f"{machine(outcomes)}\n\n{step_table(outcomes)}\n", flush=True)
    print(eval_table([run(case, LIMIT_S) for case in EVALUATIONS]))


if __name__ == "__main__":
    main()
