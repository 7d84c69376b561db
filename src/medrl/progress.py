"""What a person sees during long work: one live line with the numbers that matter and when it will be done."""

import sys
import time
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SHOWN = (
    ("reward", "reward", "{:.2f}"),
    ("rewards/choice_correct/mean", "right", "{:.0%}"),
    ("rewards/answer_correct/mean", "right", "{:.0%}"),
    ("rewards/well_formed/mean", "form", "{:.0%}"),
    ("completions/mean_length", "len", "{:.0f}"),
    ("loss", "loss", "{:.3f}"),
    ("tokens_per_s", "tok/s", "{:.0f}"),
    ("accuracy", "right so far", "{:.1%}"),
    ("describe", "describe", "{:.3f}"),
    ("letter", "letter", "{:.3f}"),
)
"""Numbers worth showing, where a step has them: name, label, format."""
PLAIN_LINES = 20
"""Lines that the whole work prints where there is no terminal."""


class Progress:
    """A progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, steps: int, first_step: int = 0, *, noun: str = "step", quiet: bool = False) -> None:
        self.steps, self.first_step, self.done = steps, first_step, first_step
        self.noun, self.quiet = noun, quiet
        self.started = time.monotonic()
        console = Console(file=sys.stderr)
        self.bar = Bar(
            TextColumn(noun),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self.task = self.bar.add_task(noun, total=steps, completed=first_step, numbers="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, row: Mapping[str, Any], steps: int = 1) -> float:
        """Show the step's numbers. Returns the seconds left, by the mean pace of this process."""
        before, self.done = self.done, self.done + steps
        pace = (time.monotonic() - self.started) / (self.done - self.first_step)
        eta_s = pace * (self.steps - self.done)
        numbers = "  ".join(f"{label} {form.format(row[name])}" for name, label, form in SHOWN if name in row)
        self.bar.update(self.task, completed=self.done, numbers=numbers)
        every = max(1, self.steps // PLAIN_LINES)
        if self.bar.disable and not self.quiet and (self.done // every > before // every or self.done == self.steps):
            print(f"{self.noun} {self.done}/{self.steps}  {numbers}  {eta_s:.0f} s left", file=sys.stderr, flush=True)  # noqa: T201
        return eta_s
