"""Progress of runs, evaluations and studies, read from the files they write, here or on a shared disk."""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from medrl.errors import RunError
from medrl.report.text import duration
from medrl.runs import (
    ASKED,
    CELL_DONE,
    CELL_FAILED,
    CELLS,
    METRICS,
    PLAN,
    PROGRESS,
    RECIPE,
    RECORDS,
    SHARDS,
    SUMMARY,
    Run,
    is_run,
)

SILENT_S, SILENT_PACES = 120.0, 20.0
"""Work counts as silent when nothing was written for this long, and for this many times what one piece takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One run, evaluation or study at one moment."""

    name: str
    kind: str
    """``train``, ``eval`` or ``study``."""
    done: int
    """Steps, questions or cells."""
    total: int | None
    finished: bool
    eta_s: float | None
    """Seconds left at the present pace; None when finished, silent, or too new to tell."""
    silent_s: float | None
    """Seconds since it last wrote, where that is so long that it has probably stopped."""
    numbers: dict[str, float]
    """What the newest rows say, e.g. ``{"reward": 1.2}``."""

    def line(self) -> str:
        """For people."""
        whole = f"{self.done}/{self.total}" if self.total is not None else str(self.done)
        unit = {"train": "steps", "eval": "questions", "study": "cells"}[self.kind]
        figures = "  ".join(f"{name} {value:.3g}" for name, value in self.numbers.items())
        return f"{self.name}: {whole} {unit}  {figures}  {self._state()}".replace("    ", "  ")

    def _state(self) -> str:
        if self.finished:
            return "finished"
        if self.silent_s is not None:
            return f"nothing written for {duration(self.silent_s)}: stopped, or stuck"
        return "starting" if self.eta_s is None else f"{duration(self.eta_s)} left"


def watch(folder: Path, now: float | None = None) -> list[Status]:
    """Every study, run and evaluation in ``folder`` or below it, by name; of a study's cells those that are under way.

    ``now`` is the time (s since 1970), for tests. Raises ``RunError`` when there is none.
    """
    now = time.time() if now is None else now
    found = [_of_study(file.parent, _name(file.parent, folder), now) for file in sorted(folder.rglob(PLAN))]
    found += [
        _of_run(path, name, now) if is_run(path) else _of_evaluation(path, name, now)
        for path, name in _work_in(folder)
        if not (path.parent / CELL_DONE).exists() and not (path.parent / CELL_FAILED).exists()
    ]
    if not found:
        raise RunError(f"{folder} holds no run and no evaluation; 'medrl train' and 'medrl eval' write them")
    return found


def _work_in(folder: Path) -> Iterator[tuple[Path, str]]:
    """Folders of runs and evaluations with their names; shards belong to their evaluation."""
    marks = (RECIPE, ASKED, SUMMARY)
    paths = sorted({file.parent for mark in marks for file in folder.rglob(mark) if SHARDS not in file.parts})
    for path in paths:
        if is_run(path) or (path / ASKED).is_file() or (path / RECORDS).is_file():
            yield path, _name(path, folder)


def _name(path: Path, folder: Path) -> str:
    relative = path.relative_to(folder)
    return str(relative) if relative.parts else path.resolve().name


def _of_study(path: Path, name: str, now: float) -> Status:
    """Time left is that of the workers who hold cells now, at the mean pace of the cells that are done."""
    cells = _read(path / PLAN)["cells"]
    done = {c["id"]: _read(path / CELLS / c["id"] / CELL_DONE) for c in cells}
    done = {id: float(facts["seconds"]) for id, facts in done.items() if facts}
    failed = {c["id"] for c in cells if (path / CELLS / c["id"] / CELL_FAILED).exists()} - done.keys()
    left = [c for c in cells if c["id"] not in failed and c["id"] not in done and c["needs"] not in failed]
    signs = {c["id"]: [*(path / CELLS / c["id"] / "claims").glob("*.json")] for c in cells}
    silent_s = _silent_s([file for files in signs.values() for file in files], None, now) if left else None
    workers = sum(now - max(file.stat().st_mtime for file in signs[c["id"]]) < SILENT_S for c in left if signs[c["id"]])
    eta_s = None
    if left and done and silent_s is None:
        kinds = {c["id"]: (c["kind"], c["method"]) for c in cells}
        paces = {kind: [s for id, s in done.items() if kinds[id] == kind] for kind in kinds.values()}
        usual = sum(done.values()) / len(done)
        expected = [sum(known) / len(known) if (known := paces[kinds[c["id"]]]) else usual for c in left]
        eta_s = sum(expected) / max(1, workers)
    return Status(
        name=name, kind="study", done=len(done), total=len(cells), finished=not left, eta_s=eta_s, silent_s=silent_s,
        numbers={"failed": float(len(failed))} if failed else {},
    )  # fmt: skip


def _of_run(path: Path, name: str, now: float) -> Status:
    run = Run.open(path)
    rows = run.metrics()
    training = run.recipe.get("training", run.recipe)
    total = training.get("steps") if isinstance(training, dict) else None
    last = rows[-1] if rows else {}
    done = int(last.get("step", -1)) + 1
    finished = total is not None and done >= int(total)
    pace = last.get("time/step_s")
    silent_s = None if finished else _silent_s([path / METRICS, path / RECIPE], pace, now)
    eta_s = last.get("eta_s") if not finished and silent_s is None else None
    numbers = {key: float(last[key]) for key in ("reward", "loss", "kl") if isinstance(last.get(key), int | float)}
    return Status(
        name=name, kind="train", done=done, total=None if total is None else int(total), finished=finished,
        eta_s=eta_s, silent_s=silent_s, numbers=numbers,
    )  # fmt: skip


def _of_evaluation(path: Path, name: str, now: float) -> Status:
    asked = _read(path / ASKED)
    folders = [path, *sorted((path / SHARDS).glob("*"))]
    right: dict[str, bool] = {}
    for folder in folders:
        right.update((str(row["id"]), bool(row["correct"])) for row in _rows(folder / RECORDS))
    total = asked.get("questions")
    finished = (path / SUMMARY).is_file() and (total is None or len(right) >= total)
    paces = [pace for folder in folders if (pace := _pace(folder)) is not None]
    pace = max((seconds / count for seconds, count, _ in paces if count), default=None)
    written = [folder / file for folder in folders for file in (RECORDS, PROGRESS)]
    silent_s = None if finished else _silent_s(written, pace, now)
    # Each process has questions of its own: the evaluation is done when the last of them is.
    etas = [seconds / count * left for seconds, count, left in paces if count]
    return Status(
        name=name,
        kind="eval",
        done=len(right),
        total=total,
        finished=finished,
        eta_s=max(etas) if etas and not finished and silent_s is None else None,
        silent_s=silent_s,
        numbers={"accuracy": sum(right.values()) / len(right)} if right else {},
    )


def _pace(folder: Path) -> tuple[float, int, int] | None:
    """Seconds its newest process has answered for, how many it answered, how many it has left; None: it has none."""
    progress = _read(folder / PROGRESS)
    if not progress:
        return None
    records = folder / RECORDS
    answered = sum(1 for _ in _rows(records)) - int(progress["answered_before"])
    since = datetime.fromisoformat(progress["since"]).timestamp()
    last = records.stat().st_mtime if records.is_file() else since
    return max(0.0, last - since), max(0, answered), max(0, int(progress["to_answer"]) - answered)


def _silent_s(files: Iterable[Path], pace_s: float | None, now: float) -> float | None:
    newest = max((file.stat().st_mtime for file in files if file.is_file()), default=now)
    silent = now - newest
    return silent if silent > max(SILENT_S, SILENT_PACES * (pace_s or 0.0)) else None


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Whole rows of a log that may be in the middle of being written."""
    if not file.is_file():
        return
    with file.open("rb") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                yield json.loads(line)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
