"""What an evaluation folder holds of an earlier start, and whether this start may continue it."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medrl.errors import RunError
from medrl.evaluation.shards import record_files
from medrl.runs import ASKED, PROGRESS, read_records, write_json_atomically
from medrl.types import EvalRecord, Example, Prompt

EARLIER: dict[str, Any] = {"option_probs": True, "sampling": None}
"""What a folder means that was written before these were asked about."""


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
        return datetime.now(UTC).isoformat(timespec="seconds")
    before = {**EARLIER, **json.loads((out / ASKED).read_text())}
    now = {**dict.fromkeys(before.keys() - {"started", "questions"}), **asked}
    differing = sorted(key for key in now if now[key] != before.get(key))
    if differing:
        raise RunError(
            f"{out} holds answers given with other {', '.join(differing)}: choose another --out, or delete that folder"
        )
    return before["started"]


def begin(out: Path, folder: Path, asked: Mapping[str, Any], started: str, *, questions: int, mine: int) -> None:
    """Write down who is asked, before the first record, and what this process is about to do.

    Args:
        out: the evaluation folder; ``folder`` is where this process writes its records, the same or a shard's.
        questions: of the whole evaluation. ``mine``: those that this process is about to ask.
    """
    if not (out / ASKED).exists():
        write_json_atomically(out / ASKED, {**asked, "started": started, "questions": questions})
    written = len(read_records(folder)) if record_files(folder) else 0
    since = datetime.now(UTC).isoformat(timespec="seconds")
    write_json_atomically(folder / PROGRESS, {"since": since, "answered_before": written, "to_answer": mine})
