"""Saved completions, graded again by another scorer: no model, no image, no torch."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from medrl.errors import DataError, RunError
from medrl.evaluation.metrics import accuracy, summarize
from medrl.evaluation.samples import majority
from medrl.rewards.scorers import CORRECT, FORM, Scorer
from medrl.runs import is_evaluation, is_run, read_records
from medrl.types import KINDS, LETTERS, MODES, Completion, EvalRecord, Example, Kind, Mode, Sample

_KIND_NAMES: dict[str, Kind] = {
    "mcq": "choice", "multiple_choice": "choice", "multi": "multi_select", "multiselect": "multi_select",
    "yesno": "yes_no", "closed": "yes_no", "number": "numeric", "open": "short", "open_ended": "short",
    "short_answer": "short", "short_open": "short", "box_iou": "box", "bbox": "box", "grounding": "box",
}  # fmt: skip
"""How other programs call our kinds; a row of completions may use either."""


def rescore(records: Sequence[EvalRecord], scorer: Scorer) -> list[EvalRecord]:
    """The records with answer, verdict and parts by ``scorer``; an answer counts as correct at full marks.

    Of records with several samples each is graded again, and they vote again.
    """
    rescored = []
    for record in records:
        example = _example_of(record)
        if record.samples:
            samples = tuple(replace(one, **_verdict(scorer, example, one, record.mode)) for one in record.samples)
            rescored.append(replace(record, samples=samples, **asdict(majority(samples))))
        else:
            rescored.append(replace(record, **_verdict(scorer, example, record, record.mode)))
    return rescored


def _verdict(scorer: Scorer, example: Example, given: EvalRecord | Sample, mode: Mode) -> dict[str, Any]:
    completion = Completion(text=given.completion, token_ids=(), finish_reason=given.finish_reason, mode=mode)
    score = scorer(example, completion)
    return {"answer": score.answer, "correct": score.value == 1.0, "parts": score.parts}


def rescore_folder(folder: Path, name: str, scorer: Scorer) -> dict[str, Any]:
    """Figures of an evaluation folder under ``scorer``: those of `summarize`, and what has changed.

    ``mean_score``: mean of the scores, which a scorer with half marks has beside its accuracy. ``recorded_accuracy``:
    as the folder has it; ``changed``: examples whose verdict differs. Raises ``RunError`` when it is none.
    """
    if is_run(folder) and not is_evaluation(folder):
        found = sorted(str(path.parent) for path in folder.glob("eval/*/records.jsonl"))
        raise RunError(f"{folder} is a run; give one of its evaluations: {', '.join(found) or 'it has none yet'}")
    records = read_records(folder)
    rescored = rescore(records, scorer)
    return {
        "scorer": name,
        "evaluation": str(folder),
        **summarize(rescored),
        "mean_score": fmean(record.parts[CORRECT] for record in rescored) if rescored else None,
        "recorded_accuracy": accuracy(records),
        "changed": sum(new.correct != old.correct for new, old in zip(rescored, records, strict=True)),
    }


def rescore_file(file: Path, scorer: Scorer) -> Iterator[dict[str, Any]]:
    """`rescore_lines` over a file, or over standard input for ``-``; rows come as they are read."""
    if str(file) == "-":
        yield from rescore_lines(sys.stdin, scorer, "standard input")
        return
    with file.open(encoding="utf-8") as lines:
        yield from rescore_lines(lines, scorer, str(file))


def rescore_lines(lines: Iterable[str], scorer: Scorer, source: str) -> Iterator[dict[str, Any]]:
    """One verdict per JSON line with ``completion``, ``options``, ``target``, ``kind`` and ``mode``.

    ``kind`` defaults to ``choice`` and ``mode`` to ``think``; ``tolerance`` and ``references`` may be given, further
    columns are ignored. A row holds ``answer``, ``correct``, ``well_formed``, ``score`` and ``explanation``, and the
    ``id`` where there is one. Raises ``DataError`` naming ``source`` and line for a row that makes no sense.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{source} line {number}"
        row = _parse_row(line, place)
        example, completion = _example_of_row(row, place), _completion_of_row(row, place)
        score = scorer(example, completion)
        yield {
            **({"id": row["id"]} if "id" in row else {}),
            "answer": score.answer,
            "correct": score.value == 1.0,
            "well_formed": score.parts[FORM] == 1.0,
            "score": score.value,
            "explanation": score.explanation,
        }


def _example_of(record: EvalRecord) -> Example:
    return Example(
        id=record.id,
        source=record.source,
        images=tuple(map(Path, record.images)),
        question=record.question,
        options=record.options,
        target=record.target,
        modality=record.modality,
        question_type=record.question_type,
        patient=record.patient,
        kind=record.kind,
        references=record.references,
        tolerance=record.tolerance,
    )


def _parse_row(line: str, place: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place} is not JSON: {error}") from error
    missing = {"completion", "target"} - row.keys() if isinstance(row, dict) else None
    if missing is None or missing:
        has = "is no object" if missing is None else f"has no {' and no '.join(sorted(missing))}"
        raise DataError(f"{place} {has}; a row has completion, options, target, kind and mode")
    return row


def _completion_of_row(row: Mapping[str, Any], place: str) -> Completion:
    mode = row.get("mode") or "think"
    if mode not in MODES:
        raise DataError(f"{place} has mode {mode!r}; the modes are {', '.join(MODES)}")
    if not isinstance(row["completion"], str):
        raise DataError(f"{place} has a completion that is no text: {row['completion']!r:.60}")
    return Completion(text=row["completion"], token_ids=(), finish_reason="stop", mode=mode)


def _example_of_row(row: Mapping[str, Any], place: str) -> Example:
    kind = str(row.get("kind") or "choice").casefold().replace("-", "_").replace("/", "_").replace(" ", "_")
    kind = _KIND_NAMES.get(kind, kind)
    if kind not in KINDS:
        raise DataError(f"{place} has kind {row['kind']!r}; the kinds are {', '.join(KINDS)}")
    options = row.get("options") or ()
    if not isinstance(options, list | tuple) or not all(isinstance(option, str) for option in options):
        raise DataError(f"{place} has options that are no list of texts: {options!r:.80}")
    references = row.get("references") or ()
    return Example(
        id=str(row.get("id", place)),
        source=str(row.get("source", "")),
        images=(),
        question=str(row.get("question", "")),
        options=tuple(options),
        target=_target_of(row["target"], kind, options),
        kind=kind,
        references=tuple(map(str, [references] if isinstance(references, str) else references)),
        tolerance=str(row.get("tolerance") or ""),
    )


def _target_of(target: Any, kind: str, options: Sequence[str]) -> str:
    """The target in our form: other programs write lists, numbers, small letters, or the right option's text."""
    parts = [_one_target(part, kind, options) for part in (target if isinstance(target, list | tuple) else [target])]
    if kind == "multi_select" and len(parts) == 1:
        letters = parts[0].replace(",", " ").split()
        parts = letters if all(len(letter) == 1 for letter in letters) else list(parts[0])
    return ", ".join(sorted(parts) if kind == "multi_select" else parts)


def _one_target(target: Any, kind: str, options: Sequence[str]) -> str:
    text = str(target).strip()
    if isinstance(target, bool):
        text = "yes" if target else "no"
    asks_for_letters = kind in ("choice", "multi_select")
    if asks_for_letters and text in options and not (len(text) == 1 and text in LETTERS[: len(options)]):
        return LETTERS[list(options).index(text)]
    if kind == "yes_no":
        offered = LETTERS[: len(options)]
        return (options[offered.index(text)] if len(text) == 1 and text in offered else text).casefold()
    return text.upper() if asks_for_letters else text
