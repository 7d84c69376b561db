"""One call on a machine with a CUDA GPU and no network: exactness first, then the GPU tables of README.md.

    python benchmarks/gpu.py [--out DIR] [--seconds 500]
    python benchmarks/gpu.py --tiny --out DIR          the same calls on the smallest model, on any device: a rehearsal

Needs this repository and medrl's dependencies with its ``test`` extra (and ``interop`` for TRL); medrl itself need not
be installed. Sections run in order of importance, each under a limit of its own, until the time is used up; those that
fail or are left over are named, and leave the others alone. Five files in DIR (or $OUT) hold all that is found, at
once: exactness.txt, results.json, tables.md, profile.txt and log.txt, with what every call printed.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tables import ROOT, TRAINER, Case, Outcome, call, eval_table, machine, missing_packages, run, step_table

START = time.monotonic()
README = ROOT / "benchmarks" / "README.md"
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
EXACTNESS_S, FILE_S, TEST_S, PROFILE_S = 140.0, 80.0, 60, 80.0
"""For all exactness tests, for those of a file, for any one of them, for the profile. A test that waits for a GPU for
ever cannot be ended by pytest, so its file is. The first three sections leave the fourth a minute at least."""
LEAST_S, RESERVE_S = 20.0, 10.0
"""Less time than this is not worth a start; so much is left for the end of what runs, and for writing."""
MARKED = re.compile(r"^\s*@?pytest\.mark\.gpu", re.M)
SHAPE = ("--model", "2b", "--prompts", "8", "--group", "8", "--prompt-tokens", "80", "--completion-tokens", "160")
SMALL = ("--image-px", "448")
NONE_CHOSEN = 5
"""What pytest ends with where a file has no test to run."""
PROFILED_AFTER = 2
PROFILED = ("benchmarks/profile_step.py", *SHAPE, *SMALL)
CASES = [
    # What it measured of medrl is kept where the trainer is too slow, or too large, to end.
    Case(f"2b, 448 px, 8 x 8 x 160, KL, beside {TRAINER}", ("step", *SHAPE, *SMALL, "--baseline", TRAINER), 190),
    Case("2b, 1008 px, 8 x 8 x 160, KL", ("step", *SHAPE, "--image-px", "1008"), 100),
    Case("2b, 392 px, 96 tokens", ("eval", "--model", "2b", "--image-px", "392", "--items", "512",
                                   "--batch-size", "256", "--repeats", "1"), 150),
    Case("2b, 448 px, no kernels of our own", ("step", *SHAPE, *SMALL, "--kernels", "off"), 120),
    Case("2b, 448 px, recomputed", ("step", *SHAPE, *SMALL, "--checkpoint-activations"), 120),
    Case("2b, 448 px, layers not compiled", ("step", *SHAPE, *SMALL, "--compile-layers", "off"), 90),
    Case("2b, 448 px, no KL", ("step", *SHAPE, *SMALL, "--kl", "0"), 90),
    Case("2b, 448 px, flex", ("step", *SHAPE, *SMALL, "--attention", "flex"), 120),
]  # fmt: skip
REHEARSED = {
    "2b": "tiny", "8": "2", "80": "30", "160": "4", "448": "56", "1008": "84", "392": "56", "96": "4", "256": "2",
    "512": "4",
}  # fmt: skip
"""What ``--tiny`` says in place of a word."""
COMPILED = ("--compile-layers", "on")
"""What ``--tiny`` adds to the second call: ``auto`` compiles nothing where there is no GPU."""


def main() -> int:
    words = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    out = Path(os.environ.get("OUT") or ROOT / "runs" / "bench-gpu")
    words.add_argument("--out", type=Path, default=out, help="where raw results go; default: $OUT, or runs/bench-gpu")
    words.add_argument("--seconds", type=float, default=500.0, help="time for everything")
    words.add_argument("--tiny", action="store_true", help="a rehearsal, on any device; README.md is left alone")
    given = words.parse_args()
    missing = missing_packages()
    if missing:
        print(f"missing here: {', '.join(missing)}; put them into a folder and name it in PYTHONPATH", file=sys.stderr)
        return 2
    if not given.tiny and not has_gpu():
        print("there is no CUDA GPU here; benchmarks/cpu.py has the CPU tables", file=sys.stderr)
        return 1
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "log.txt").write_text("")
    with tempfile.TemporaryDirectory(prefix="medrl-bench-") as scratch:
        status = measure(given.out, Path(scratch), START + given.seconds - RESERVE_S, tiny=given.tiny)
    print(f"results: {given.out}, after {time.monotonic() - START:.0f} s", file=sys.stderr)
    return status


def has_gpu() -> bool:
    import torch  # a machine without it is told what is missing

    return torch.cuda.is_available()


def measure(out: Path, scratch: Path, end: float, *, tiny: bool) -> int:
    """All sections, until the monotonic time ``end``. Returns the exit code."""
    exact = exactness(out, scratch / "exactness", min(EXACTNESS_S, end - time.monotonic()))
    outcomes: list[Outcome] = []
    for number, case in enumerate(CASES):
        left, log = end - time.monotonic(), scratch / f"case-{number}"
        if left > LEAST_S:
            outcomes.append(run(rehearsed(case, COMPILED if number == 1 else ()) if tiny else case, left, log))
            keep(out, case.name, log)
        else:
            outcomes.append(Outcome(case, None, "not run: no time left"))
        # After each case: whatever ends this program, what was measured is there.
        raw = [{"case": o.case.name, "problem": o.problem, "found": o.found} for o in outcomes]
        (out / "results.json").write_text(json.dumps(raw, indent=1))
        write_tables(tables(exact, outcomes), out / "tables.md", into_readme=not tiny)
        if number == PROFILED_AFTER and end - time.monotonic() > LEAST_S:
            # What the first row's seconds are made of.
            log = scratch / "profile"
            problem = call(shrunk(PROFILED) if tiny else PROFILED, min(PROFILE_S, end - time.monotonic()), log)
            keep(out, f"profile {problem}", log, also=out / "profile.txt")
    return 0 if (tiny or exact.startswith("passed")) and not any(outcome.problem for outcome in outcomes) else 1


def keep(out: Path, name: str, log: Path, also: Path | None = None) -> None:
    """Put what a call printed behind the rest, and its output by itself where that is asked."""
    printed, said = (log.with_suffix(suffix).read_text(errors="replace") for suffix in (".out", ".err"))
    with (out / "log.txt").open("a") as file:
        file.write(f"=== {name}\n{printed}\n--- messages\n{said}\n")
    if also is not None:
        also.write_text(printed)


def rehearsed(case: Case, more: Sequence[str]) -> Case:
    """The same call, as small as it can be."""
    return Case(f"rehearsal of {case.name}", (*shrunk(case.words), *more), case.limit_s)


def shrunk(words: Sequence[str]) -> tuple[str, ...]:
    unable = {} if has_gpu() else {"flex": "auto"}  # it has no backward pass on a CPU
    return tuple({**REHEARSED, **unable}.get(word, word) for word in words)


def exactness(out: Path, log: Path, limit_s: float) -> str:
    """Run the tests that need a GPU. Returns how that ended.

    Each file by a process of its own: after an illegal access no process can use the GPU any more.
    """
    end = time.monotonic() + limit_s
    files = sorted(f for f in (ROOT / "tests").rglob("test_*.py") if MARKED.search(f.read_text("utf-8")))
    text, problems = "", []
    for file in files:
        words = ["-m", "pytest", "-m", "gpu", "-vv", f"--timeout={TEST_S}", "-p", "no:cacheprovider", str(file)]
        left = min(FILE_S, end - time.monotonic())
        problem = call(words, left, log, fine=(0, NONE_CHOSEN)) if left > 1 else "not run: no time left"
        if problem:
            problems.append(f"{file.name} {problem}")
        if left > 1:
            keep(out, f"exactness, {file.name}", log)
            text += log.with_suffix(".out").read_text(errors="replace")
        (out / "exactness.txt").write_text(text)
    counts = {
        word: len(re.findall(rf"^\S+::.* {word}", text, re.M)) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")
    }
    said = ", ".join(f"{count} {word.lower()}" for word, count in counts.items() if count) or "none ended"
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M)
    if failed or problems:
        return f"FAILED ({said}): {'; '.join([*failed, *problems])}"
    return f"passed ({said})" if counts["PASSED"] else f"none ran ({said})"


def tables(exact: str, outcomes: Sequence[Outcome]) -> str:
    """What README.md shows."""
    parts = [
        f"{time.strftime('%Y-%m-%d')}, {machine(outcomes)}. Made by `python benchmarks/gpu.py`.",
        f"Exactness tests on this GPU: {exact}.",
        step_table([outcome for outcome in outcomes if outcome.case.words[0] == "step"]),
        eval_table([outcome for outcome in outcomes if outcome.case.words[0] == "eval"]),
    ]
    return "\n\n".join(parts) + "\n"


def write_tables(text: str, also: Path, *, into_readme: bool) -> None:
    """Beside the raw results, and into README.md between its marks where it has them and can be written to."""
    also.write_text(text)
    if not into_readme:
        return
    try:
        before, begin, rest = README.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if begin and end:
            new = README.with_suffix(".new")
            new.write_text(f"{before}{BEGIN}\n{text}{END}{after}")
            new.replace(README)  # whole or not at all, also where the disk is full
            return
        why = f"it has no {BEGIN} ... {END}"
    except OSError as error:
        why = str(error)
    print(f"{README} is left as it is: {why}; the tables are in {also}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
