"""The run folder and the evaluation folder: their only reader and writer.

A run folder                                    An evaluation folder
    recipe.yaml      settings as resolved           records.jsonl   one EvalRecord per line
    provenance.json  where it came from             summary.json    figures computed from the records
    metrics.jsonl    one row per step               asked.json      who was asked, how, how many questions
    rollouts.jsonl   one row per completion         shards/<i>-of-<n>/  what one of several processes answered
    pass_rates.jsonl one row per example, where a curriculum asked
    quarantine.jsonl one row per step that was left out, and why
    .lock            held by the process that trains into the folder
    checkpoints/     eval/<name>/

Logs are JSON lines; files that are replaced (recipe, provenance, summary) are replaced whole or not at all: ``files``.
"""

import dataclasses
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from medrl.errors import RunError
from medrl.files import (
    append_lines,
    is_torn,
    make_folder,
    read_json,
    read_lines,
    remove_torn,
    sync,
    synced_size,
    to_json,
    write_json_atomically,
    write_text_atomically,
)
from medrl.types import EvalRecord, Sample

RECIPE = "recipe.yaml"
PROVENANCE = "provenance.json"
METRICS = "metrics.jsonl"
ROLLOUTS = "rollouts.jsonl"
PASS_RATES = "pass_rates.jsonl"
LOCK = ".lock"
"""Held by the process that trains into a run folder; says which one that is."""
RECORDS = "records.jsonl"
SUMMARY = "summary.json"
ASKED = "asked.json"
"""Who was asked, how and since when; written before the first record."""
PROGRESS = "progress.json"
"""Since when the newest process answers, and what it found answered."""
SHARDS = "shards"
PLAN, CELLS, CELL_DONE, CELL_FAILED = "plan.json", "cells", "done.json", "failed.json"
"""Of a study: its cells, their folders, and how one ended."""
QUARANTINE = "quarantine.jsonl"
LOGS = (METRICS, ROLLOUTS, QUARANTINE)
log = logging.getLogger(__name__)


class Run:
    """One training run on disk. Make one with :meth:`create` or :meth:`open`."""

    def __init__(self, path: Path, recipe: dict[str, Any], provenance: dict[str, Any]) -> None:
        self.path = path
        self.recipe = recipe
        self.provenance = provenance

    @classmethod
    def create(cls, path: str | Path, recipe: Mapping[str, Any], provenance: Mapping[str, Any]) -> "Run":
        """Start a run in a folder that is new or empty, or holds one that ended before it wrote anything.

        Raises RunError when the folder already holds a run, or anything else.
        """
        path = Path(path)
        check_vacant(path)
        make_folder(path)
        remove_torn(path)
        write_json_atomically(path / PROVENANCE, provenance)
        plain_recipe = json.loads(to_json(recipe, path / RECIPE))
        text = yaml.safe_dump(plain_recipe, sort_keys=False, allow_unicode=True)
        write_text_atomically(path / RECIPE, text)  # last: its presence is what makes the folder a run
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open an existing run.

        Raises RunError when the folder is not a run or its recipe or provenance cannot be read.
        """
        path = Path(path)
        if not is_run(path):
            raise RunError(f"not a run folder: {path} has no {RECIPE}")
        try:
            recipe = yaml.safe_load((path / RECIPE).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RunError(f"{path / RECIPE} is not valid YAML: {error}") from error
        if not isinstance(recipe, dict):
            raise RunError(f"{path / RECIPE} holds no settings; expected lines of the form 'name: value'")
        provenance = read_json(path / PROVENANCE) if (path / PROVENANCE).exists() else {}
        return cls(path, recipe, provenance)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints; it exists once there is one."""
        return self.path / "checkpoints"

    def update_provenance(self, **facts: Any) -> None:
        """Add or replace facts, e.g. ``seconds=412.0``."""
        self.provenance = {**self.provenance, **facts}
        write_json_atomically(self.path / PROVENANCE, self.provenance)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add the row of one step. A metric that does not exist in this step is left out, or None; never NaN."""
        append_lines(self.path / METRICS, [row])

    def append_rollouts(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add one row per completion."""
        append_lines(self.path / ROLLOUTS, rows)

    def append_quarantine(self, row: Mapping[str, Any]) -> None:
        """Add a step that was left out: ``step``, ``reason``."""
        append_lines(self.path / QUARANTINE, [row])

    def quarantine(self) -> list[dict[str, Any]]:
        """All rows, oldest first; empty where every step was taken."""
        return list(read_lines(self.path / QUARANTINE))

    def metrics(self) -> list[dict[str, Any]]:
        """All rows, oldest first."""
        return list(read_lines(self.path / METRICS))

    def rollouts(self) -> Iterator[dict[str, Any]]:
        """All rows, oldest first, read one by one: the file can be large."""
        return read_lines(self.path / ROLLOUTS)

    def append_pass_rates(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add one row per example: ``id``, ``right``, ``rollouts``."""
        append_lines(self.path / PASS_RATES, rows)

    def pass_rates(self) -> list[dict[str, Any]]:
        """All rows, oldest first; empty where no curriculum asked."""
        return list(read_lines(self.path / PASS_RATES))

    def offsets(self) -> dict[str, int]:
        """Bytes of each log, once they are on the disk: what a checkpoint keeps for :meth:`truncate`."""
        logs = [name for name in LOGS if name != QUARANTINE or (self.path / name).exists()]  # there is rarely one
        sizes = {name: synced_size(self.path / name) for name in logs}
        sync(self.path)  # a log that is new has a name, too, that a power cut could take
        return sizes

    def truncate(self, offsets: Mapping[str, int]) -> None:
        """Cut the logs back to where they were at a checkpoint, so that a resumed run writes no line twice.

        A log that the checkpoint does not know is emptied: there was none yet. Raises RunError, before
        anything is cut, when a log is shorter than it was then.
        """
        before = dict.fromkeys(LOGS, 0) | dict(offsets)
        for name in LOGS:
            file = self.path / name
            size = file.stat().st_size if file.exists() else 0
            if size < before[name]:
                raise RunError(
                    f"{file} has {size} bytes but had {before[name]} when the checkpoint was saved: part of the log "
                    "was lost; restore it, or start anew with another --out"
                )
        for name in LOGS:
            if (self.path / name).exists():
                with (self.path / name).open("r+b") as stream:
                    stream.truncate(before[name])
                    os.fsync(stream.fileno())

    def evals(self) -> dict[str, Path]:
        """Folder of each finished evaluation under ``eval/``, by name."""
        return {file.parent.name: file.parent for file in sorted((self.path / "eval").glob(f"*/{SUMMARY}"))}


def check_vacant(path: Path) -> None:
    """Raise RunError when a run cannot start in this folder: it holds a run already, or anything else."""
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; a run needs a folder: choose another --out")
    if (path / RECIPE).exists() and not is_blank(path):
        raise RunError(f"{path} already holds a run: continue it with --resume auto, or choose another --out")
    other = _beside_the_start(path)
    if other:
        shown = ", ".join(other[:3]) + (", …" if len(other) > 3 else "")
        raise RunError(f"{path} is not empty (it holds {shown}): choose another --out")


def is_blank(path: Path) -> bool:
    """Whether a run has written nothing but how it was to be: it was refused, or ended, before its first step."""
    return not _beside_the_start(path)


def _beside_the_start(path: Path) -> list[str]:
    """What lies in a folder besides what is written before the first step: nothing would be lost with that."""
    entries = [entry for entry in path.iterdir() if not is_torn(entry)] if path.exists() else []
    return sorted(entry.name for entry in entries if entry.name not in (RECIPE, PROVENANCE, LOCK))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within, no other process trains into this folder, on any machine that sees it; it is made if it is not there.

    The lock is the operating system's (flock), which lets go of it when the process dies, however it dies. Raises
    RunError naming the process that has it.
    """
    make_folder(path)
    with (path / LOCK).open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            raise RunError(
                f"{path} is being trained into by {stream.read().strip() or 'another process'}: wait until that has "
                "ended, or end it; or choose another --out"
            ) from None
        except OSError as error:  # some network file systems
            log.warning("%s cannot be locked (%s): see to it that no other process trains into it", path, error)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        yield


def check_unlocked(path: Path) -> None:
    """Raise RunError naming the process that trains into this folder, if one does."""
    if (path / LOCK).exists():
        with locked(path):
            pass


def is_run(path: Path) -> bool:
    """Whether the folder holds a run."""
    return (path / RECIPE).is_file()


def is_evaluation(path: Path) -> bool:
    """Whether the folder holds a finished evaluation."""
    return (path / RECORDS).is_file() and (path / SUMMARY).is_file()


def append_records(path: Path, records: Iterable[EvalRecord]) -> None:
    """Add records to ``records.jsonl`` (the file, or the evaluation folder that holds it)."""
    append_lines(_records_file(path), (dataclasses.asdict(record) for record in records))


def read_records(path: Path) -> list[EvalRecord]:
    """Read the records of an evaluation folder (or of its ``records.jsonl``), in the order written.

    Raises RunError when there is no such file, or naming file and line when a line is broken.
    """
    file = _records_file(path)
    if not file.is_file():
        raise RunError(f"not an evaluation folder: {file} does not exist; 'medrl eval' writes it")
    return [_to_record(row, file, line) for line, row in enumerate(read_lines(file), start=1)]


def read_summary(path: Path) -> dict[str, Any]:
    """Read ``summary.json`` of an evaluation folder. Raises RunError when it is missing or broken."""
    file = Path(path) / SUMMARY
    if not file.is_file():
        raise RunError(f"not a finished evaluation: {path} has no {SUMMARY}; run 'medrl eval' again to finish it")
    return read_json(file)


def write_records_atomically(path: Path, records: Iterable[EvalRecord]) -> None:
    """Replace ``records.jsonl`` of an evaluation folder whole or not at all."""
    file = _records_file(path)
    write_text_atomically(file, "".join(to_json(dataclasses.asdict(record), file) + "\n" for record in records))


def _records_file(path: Path) -> Path:
    return path if path.suffix == ".jsonl" else path / RECORDS


def _to_record(row: dict[str, Any], file: Path, line: int) -> EvalRecord:
    fields = dataclasses.fields(EvalRecord)
    names = {field.name for field in fields}
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    if not required <= row.keys() <= names:
        missing, unknown = sorted(required - row.keys()), sorted(row.keys() - names)
        raise RunError(f"{file} line {line} is not an evaluation record: missing {missing}, unknown {unknown}")
    probs = row.get("option_probs")
    return EvalRecord(
        **{
            **row,
            "images": tuple(row["images"]),
            "options": tuple(row["options"]),
            "option_probs": None if probs is None else tuple(probs),
            "references": tuple(row.get("references", ())),
            "samples": tuple(_to_sample(sample, file, line) for sample in row.get("samples", ())),
        }
    )


def _to_sample(row: Any, file: Path, line: int) -> Sample:
    names = {field.name for field in dataclasses.fields(Sample)}
    if not isinstance(row, dict) or row.keys() != names:
        raise RunError(f"{file} line {line} holds a sample that is none: a sample has {', '.join(sorted(names))}")
    return Sample(**row)
