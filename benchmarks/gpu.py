"""One call on a machine with a CUDA GPU and no network: exactness first, then the GPU tables of README.md.

    python benchmarks/gpu.py [--out DIR] [--seconds 520]

Needs this repository, and medrl with its ``test`` extra (and ``interop`` for TRL) installed. Cases run in order of
importance until the time is used up; those left over are named. Raw results go to DIR as JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from tables import Case, Outcome, eval_table, machine, run, step_table

ROOT = Path(__file__).parent.parent
README = ROOT / "benchmarks" / "README.md"
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
SHAPE = ("--model", "2b", "--prompts", "8", "--group", "8", "--prompt-tokens", "80", "--completion-tokens", "160")
CASES = [
    Case("2b, 448 px, 8 x 8 x 160, KL", ("step", *SHAPE, "--image-px", "448")),
    Case("2b, 1008 px, 8 x 8 x 160, KL", ("step", *SHAPE, "--image-px", "1008")),
    Case("2b, 392 px, 96 tokens", ("eval", "--model", "2b", "--image-px", "392", "--items", "256",
                                   "--batch-size", "256", "--repeats", "1")),
    Case("2b, 448 px, beside TRL", ("step", *SHAPE, "--image-px", "448", "--baseline", "trl")),
    Case("2b, 448 px, layers compiled", ("step", *SHAPE, "--image-px", "448", "--compile-layers")),
    Case("2b, 448 px, flex", ("step", *SHAPE, "--image-px", "448", "--attention", "flex")),
    Case("2b, 448 px, recomputed", ("step", *SHAPE, "--image-px", "448", "--checkpoint-activations")),
    Case("2b, 448 px, no KL", ("step", *SHAPE, "--image-px", "448", "--kl", "0")),
]  # fmt: skip


def main() -> int:
    words = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    words.add_argument("--out", type=Path, default=ROOT / "runs" / "bench-gpu", help="where raw results go")
    words.add_argument("--seconds", type=float, default=520.0, help="time for everything")
    given = words.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA GPU here; benchmarks/cpu.py has the CPU tables", file=sys.stderr)
        return 1
    end = time.monotonic() + given.seconds
    given.out.mkdir(parents=True, exist_ok=True)
    exact = exactness(given.out / "exactness.txt", end - time.monotonic())
    outcomes: list[Outcome] = []
    for case in CASES:
        left = end - time.monotonic()
        outcomes.append(run(case, left) if left > 20 else Outcome(case, None, "not run: no time left"))
        # After each case: whatever ends this program, what was measured is there.
        raw = [{"case": o.case.name, "problem": o.problem, "found": o.found} for o in outcomes]
        (given.out / "results.json").write_text(json.dumps(raw, indent=1))
        write_tables(tables(exact, outcomes), given.out / "tables.md")
    return 0 if exact.startswith("passed") and all(outcome.found for outcome in outcomes) else 1


def exactness(log: Path, limit_s: float) -> str:
    """Run the tests that need a GPU. Returns how that ended."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests/policy", "tests/rollout", "tests/training"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=min(150.0, limit_s))
    except subprocess.TimeoutExpired:
        return "not finished in time"
    log.write_text(done.stdout + done.stderr)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    return f"{'passed' if done.returncode == 0 else 'FAILED'}: {last}"


def tables(exact: str, outcomes: list[Outcome]) -> str:
    """What README.md shows."""
    parts = [
        f"{time.strftime('%Y-%m-%d')}, {machine(outcomes)}. Made by `python benchmarks/gpu.py`.",
        f"Exactness tests on this GPU: {exact}.",
        step_table([outcome for outcome in outcomes if outcome.case.words[0] == "step"]),
        eval_table([outcome for outcome in outcomes if outcome.case.words[0] == "eval"]),
    ]
    return "\n\n".join(parts) + "\n"


def write_tables(text: str, also: Path) -> None:
    """Into README.md, between its marks, and beside the raw results."""
    also.write_text(text)
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
