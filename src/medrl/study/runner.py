"""Takes up cells until all are done: any number of workers may do so in one folder, and die anywhere."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medrl import stopping
from medrl.errors import MedrlError
from medrl.files import write_json_atomically
from medrl.runs import CELL_DONE, CELL_FAILED, CELLS
from medrl.study.claims import EXPIRY_S, Claims
from medrl.study.plan import Cell

POLL_S = 1.0
FAILURES = (MedrlError, OSError, RuntimeError)
"""What marks a cell as failed; RuntimeError is torch's, e.g. when memory runs out."""

State = Literal["done", "failed", "blocked", "waiting"]
Work = Callable[[Cell], None]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a study stands when a worker finds nothing left to do."""

    done: list[Cell]
    failed: list[Cell]
    blocked: list[Cell]
    """Cells whose training failed."""


def state_of(cell: Cell, out: Path) -> State:
    """From the cell's files alone; ``waiting`` is also a cell that somebody works on."""
    if (cell.folder(out) / CELL_DONE).exists():
        return "done"
    if (cell.folder(out) / CELL_FAILED).exists():
        return "failed"
    if cell.needs is not None and (out / CELLS / cell.needs / CELL_FAILED).exists():
        return "blocked"
    return "waiting"


def forget_failures(cells: Sequence[Cell], out: Path) -> list[Cell]:
    """Let failed cells be tried again; what they had done is kept. Returns them."""
    failed = [cell for cell in cells if state_of(cell, out) == "failed"]
    for cell in failed:
        (cell.folder(out) / CELL_FAILED).unlink(missing_ok=True)
    return failed


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    work: Work,
    *,
    say: Say,
    time_left: Callable[[], str] = lambda: "",
    expiry_s: float = EXPIRY_S,
    poll_s: float = POLL_S,
) -> Outcome:
    """Do every cell that nobody has done and nobody living is doing; wait for those that somebody is doing.

    ``say`` is told each cell that is taken up, with what ``time_left`` says then.
    A cell that fails is marked, with its reason, and the others go on. After a mistake, a failure of no known kind, the
    cell is marked too, but the error is raised. ``Stopped`` and ``KeyboardInterrupt`` are raised as the work raises
    them. Whatever happens, the claim is given back.
    """
    claims = {cell.id: Claims(cell.folder(out) / "claims", expiry_s) for cell in cells}
    while True:
        stopping.check()
        states = {cell.id: state_of(cell, out) for cell in cells}
        waiting = [cell for cell in cells if states[cell.id] == "waiting"]
        if not waiting:
            chosen = {name: [c for c in cells if states[c.id] == name] for name in ("done", "failed", "blocked")}
            return Outcome(**chosen)
        ready = [cell for cell in waiting if cell.needs is None or states.get(cell.needs) == "done"]
        if not any(_take_up(cell, claims[cell.id], cells, out, work, say, time_left) for cell in ready):
            time.sleep(poll_s)


def _take_up(
    cell: Cell, claims: Claims, cells: Sequence[Cell], out: Path, work: Work, say: Say, time_left: Callable[[], str]
) -> bool:
    """Whether this worker did the cell; not when another holds it."""
    claim = claims.take()
    if claim is None:
        return False
    try:
        if state_of(cell, out) != "waiting":  # done by another between the look and the claim
            return True
        number = sum(state_of(other, out) != "waiting" for other in cells) + 1
        say(f"[{number}/{len(cells)}] {cell.id}{time_left()}")
        with _Marking(cell, out, say):
            work(cell)
    finally:
        claim.release()
    return True


class _Marking:
    """Writes down how the work within ended, so that no worker takes up again what has failed.

    What is none of ``FAILURES`` marks the cell too, but also ends this worker, loudly: it is a mistake in the program,
    and the cells that are left are done at the next start. A stop is no failure.
    """

    def __init__(self, cell: Cell, out: Path, say: Say) -> None:
        self.cell, self.folder, self.say = cell, cell.folder(out), say

    def __enter__(self) -> None:
        self.started = time.monotonic()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None:
            facts = {"cell": self.cell.id, "seconds": time.monotonic() - self.started}
            write_json_atomically(self.folder / CELL_DONE, facts)
        elif isinstance(error, Exception):
            reason = f"{type(error).__name__}: {error}"
            write_json_atomically(self.folder / CELL_FAILED, {"cell": self.cell.id, "reason": reason})
            self.say(f"    failed: {reason}")
        return isinstance(error, FAILURES)
