"""Saved completions, graded again by another scorer: no model, no image, no torch."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from medrl.errors import DataError, RewardError, RunError
from medrl.evaluation.compare import compare_to_blind
from medrl.evaluation.completion_rows import COLUMNS, parse_row, read_row, without_mark
from medrl.evaluation.metrics import accuracy, summarize
from medrl.evaluation.samples import majority
from medrl.files import write_json_atomically
from medrl.rewards.judge import JudgeError
from medrl.rewards.scorers import CORRECT, FORM, Scorer
from medrl.runs import ASKED, SUMMARY, append_records, is_evaluation, is_run, read_records, read_summary
from medrl.types import Completion, EvalRecord, Example, Mode, Sample


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


def rescore_folder(folder: Path, name: str, scorer: Scorer, out: Path | None = None) -> dict[str, Any]:
    """Figures of an evaluation folder under ``scorer``: those of `summarize`, and what has changed.

    ``mean_score``: mean of the scores, which a scorer with half marks has beside its accuracy. ``recorded_accuracy``:
    as the folder has it; ``changed``: examples whose verdict differs. Raises ``RunError`` when it is none.

    Args:
        out: a new folder for an evaluation with these verdicts in the place of the recorded ones, for ``compare`` and
            ``report``; None writes nothing.
    """
    if out is not None:
        _check_vacant(out)
    if is_run(folder) and not is_evaluation(folder):
        found = sorted(str(path.parent) for path in folder.glob("eval/*/records.jsonl"))
        raise RunError(f"{folder} is a run; give one of its evaluations: {', '.join(found) or 'it has none yet'}")
    records = read_records(folder)
    rescored = rescore(records, scorer)
    if out is not None:
        _write_evaluation(out, rescored, folder, name)
    return {
        "scorer": name,
        "evaluation": str(folder),
        **summarize(rescored),
        "mean_score": fmean(record.parts[CORRECT] for record in rescored) if rescored else None,
        "recorded_accuracy": accuracy(records),
        "changed": sum(new.correct != old.correct for new, old in zip(rescored, records, strict=True)),
    }


def _check_vacant(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists and is not an empty folder: choose another --out, or remove it first")


def _write_evaluation(out: Path, records: Sequence[EvalRecord], folder: Path, scorer: str) -> None:
    """The records as an evaluation folder of its own; what is known of the old one is kept, its figures are not."""
    before = read_summary(folder) if is_evaluation(folder) else {}
    facts = {**before, "name": f"{before.get('name') or folder.name} ({scorer})"}
    facts |= {"scorer": scorer, "rescored_from": str(folder.resolve()), **summarize(records)}
    blind = {entry["name"]: entry["correct"] for entry in before.get("blind") or []}
    if blind:
        best = max(blind, key=lambda baseline: sum(blind[baseline].values()))
        comparison = compare_to_blind(records, blind[best], name=facts["name"], blind_name=best)
        facts["comparison_to_blind"] = comparison.as_dict()
    # Who goes on with `medrl eval` in this folder would mix verdicts: it asks for this file first.
    write_json_atomically(out / ASKED, {"rescored_by": scorer, "started": before.get("started")})
    append_records(out, records)
    write_json_atomically(out / SUMMARY, facts)


def rescore_file(file: Path, scorer: Scorer) -> Iterator[dict[str, Any]]:
    """`rescore_lines` over a file, or over standard input for ``-``; rows come as they are read."""
    if str(file) == "-":
        yield from rescore_lines(sys.stdin.buffer, scorer, "standard input")
        return
    with file.open("rb") as lines:
        yield from rescore_lines(lines, scorer, str(file))


def rescore_lines(lines: Iterable[str | bytes], scorer: Scorer, source: str) -> Iterator[dict[str, Any]]:
    """One verdict per JSON line, see `medrl.evaluation.completion_rows` for what a line holds.

    A verdict has ``answer``, ``correct``, ``well_formed``, ``score`` and ``explanation``, and the ``id`` where the row
    has one. A row that cannot be graded ends nothing: its verdict has an ``error`` naming ``source`` and line, and null
    in the place of ``correct``, ``well_formed`` and ``score``, because it is neither right nor wrong. What is wrong
    with the scorer and not with a row (an endpoint that fails, a package that is missing) is raised, and so is
    ``DataError`` for a ``source`` without any row.
    """
    found = False
    for number, line in enumerate(map(without_mark, lines), start=1):
        if not line.strip():
            continue
        found = True
        place = f"{source} line {number}"
        row: Mapping[str, Any] = {}
        try:
            row = parse_row(line, place)
            verdict = _verdict_on(scorer, *read_row(row, place))
        except JudgeError:
            raise
        except (DataError, RewardError) as error:
            verdict = _no_verdict(str(error), place)
        yield {**({"id": row["id"]} if "id" in row else {}), **verdict}
    if not found:
        raise DataError(f"{source} has no rows; a row is one JSON object per line with {', '.join(COLUMNS)}")


def _verdict_on(scorer: Scorer, example: Example, completion: Completion) -> dict[str, Any]:
    score = scorer(example, completion)
    return {
        "answer": score.answer,
        "correct": score.value == 1.0,
        "well_formed": score.parts[FORM] == 1.0,
        "score": score.value,
        "explanation": score.explanation,
    }


def _no_verdict(problem: str, place: str) -> dict[str, Any]:
    named = problem if place in problem else f"{place}: {problem}"
    ungraded = dict.fromkeys(("answer", "correct", "well_formed", "score"))
    return {**ungraded, "explanation": f"Not graded: {named}.", "error": named}


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
