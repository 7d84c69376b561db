"""What an evaluation folder holds of an earlier start, and whether this start may continue it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medrl.errors import RunError
from medrl.evaluation.shards import record_files
from medrl.files import write_json_atomically
from medrl.runs import ASKED, PROGRESS, RECORDS, read_records
from medrl.types import EvalRecord, Example, Prompt

EARLIER: dict[str, Any] = {"option_probs": True, "sampling": None}
"""What a folder means that was written before these were asked about."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_answered(out: Path, questions: Mapping[str, tuple[Example, Prompt]]) -> dict[str, EvalRecord]:
    """Records of earlier starts and of all shards, by example.

    Raises ``RunError`` when they answer other prompts or have other targets than ``questions``.
    """
    records = {record.id: record for file in record_files(out) for record in read_records(file)}
    strange = [id for id, record in records.items() if id not in questions or not _answers(record, *questions[id])]
    if strange:
        raise RunError(
            f"{out} holds {len(strange)} records of other prompts (for one: {strange[0]}): it belongs to another data "
            "set, mode or template. Choose another --out, or delete that folder"
        )
    return records


def _answers(record: EvalRecord, example: Example, prompt: Prompt) -> bool:
    return record.prompt_hash == prompt.hash and record.target == example.target


def check_asked(out: Path, asked: Mapping[str, Any]) -> str:
    """When the first question was asked.

    Raises ``RunError`` when the folder's answers are another model's, or were given under other settings or data.
    """
    if not (out / ASKED).exists():
        return _now()
    before = {**EARLIER, **json.loads((out / ASKED).read_text())}
    now = {**dict.fromkeys(before.keys() - {"started", "questions"}), **asked}
    differing = sorted(key for key in now if now[key] != before.get(key))
    if differing:
        raise RunError(
            f"{out} holds answers given with other {', '.join(differing)}: choose another --out, or delete that folder"
        )
    return before["started"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a process is about to do; written down with the first answer, so that a start that fails leaves nothing."""

    out: Path
    """The evaluation folder."""
    folder: Path
    """Where this process writes its records: the same, or a shard's."""
    asked: Mapping[str, Any]
    started: str
    """When the first question of the evaluation was asked."""
    questions: int
    """Of the whole evaluation."""
    since: str = field(default_factory=_now)
    """When this process began."""

    def write(self, to_answer: int) -> None:
        """Say who is asked, once, and what this process adds to what is there: ``to_answer`` questions."""
        if not (self.out / ASKED).exists():
            asked = {**self.asked, "started": self.started, "questions": self.questions}
            write_json_atomically(self.out / ASKED, asked)
        before = len(read_records(self.folder)) if (self.folder / RECORDS).is_file() else 0
        progress = {"since": self.since, "answered_before": before, "to_answer": to_answer}
        write_json_atomically(self.folder / PROGRESS, progress)
