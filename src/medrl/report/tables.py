"""What the report says in figures: plain rows."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medrl.errors import RunError
from medrl.evaluation.asked import read_how
from medrl.evaluation.compare import Comparison, compare, compare_to_blind
from medrl.evaluation.intervals import Interval, wilson
from medrl.evaluation.metrics import summarize
from medrl.report.monitors import Reading
from medrl.report.text import percent
from medrl.runs import SUMMARY, read_records, read_summary
from medrl.types import EvalRecord

Field = Literal["modality", "question_type", "source"]

ALARMING_RATE = 0.05
"""Share of unreadable or cut-off completions above which an accuracy says little."""
ALARMING_LETTER_EXCESS = 0.25
"""How much more often than it is right a letter may be answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation folder, read. Figures are computed from the records, not taken from the summary."""

    name: str
    path: Path
    records: list[EvalRecord]
    summary: dict[str, Any]
    figures: dict[str, Any]

    @property
    def accuracy(self) -> Interval:
        return Interval(**self.figures["accuracy"])

    @property
    def blind(self) -> dict[str, Mapping[str, bool]]:
        """Which examples each baseline has right, by its name."""
        entries = self.summary.get("blind") or []
        if not all(isinstance(entry.get("correct"), dict) and "name" in entry for entry in entries):
            raise RunError(
                f"{self.path / SUMMARY}: each entry of 'blind' needs a name and 'correct' by id; evaluate it anew"
            )
        return {entry["name"]: entry["correct"] for entry in entries}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadlineRow:
    """One line of the headline table: an evaluation, or a baseline that saw no image."""

    name: str
    kind: Literal["evaluation", "blind"]
    accuracy: Interval
    mode: str = ""
    well_formed: float | None = None
    parse_fail_rate: float | None = None
    truncated_rate: float | None = None
    mean_tokens: float | None = None
    comparison: Comparison | None = None
    """Against the first evaluation; None for the first itself and for baselines."""
    best_blind: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainRow:
    """Accuracy on one modality or question type, one interval per series."""

    name: str
    n: int
    accuracies: list[Interval]


def read_evaluation(path: Path, name: str | None = None) -> Evaluation:
    """Read a finished evaluation folder. Raises RunError when it is not one."""
    summary, records = read_summary(path), read_records(path)
    name = name or str(summary.get("name") or path.name)
    return Evaluation(name=name, path=path, records=records, summary=summary, figures=summarize(records))


def by_test_set(evaluations: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """Evaluations over the same examples together; only those can be compared. Order is kept."""
    sets: dict[frozenset[tuple[object, ...]], list[Evaluation]] = {}
    for evaluation in evaluations:
        key = frozenset((record.id, record.question, record.options, record.target) for record in evaluation.records)
        sets.setdefault(key, []).append(evaluation)
    return list(sets.values())


def headline_rows(evaluations: Sequence[Evaluation]) -> list[HeadlineRow]:
    """One row per evaluation, then one per blind baseline. The evaluations are over the same examples."""
    first = evaluations[0]
    rows = [
        HeadlineRow(
            name=evaluation.name,
            kind="evaluation",
            accuracy=evaluation.accuracy,
            mode=", ".join(sorted({record.mode for record in evaluation.records})),
            well_formed=evaluation.figures["well_formed"],
            parse_fail_rate=evaluation.figures["parse_fail_rate"],
            truncated_rate=evaluation.figures["truncated_rate"],
            mean_tokens=evaluation.figures["mean_tokens"],
            comparison=None if evaluation is first else compare_evaluations(first, evaluation),
        )
        for evaluation in evaluations
    ]
    baselines = blind_of(evaluations)
    best = best_blind_name(baselines)
    return rows + [
        HeadlineRow(name=name, kind="blind", accuracy=_share(correct), best_blind=name == best)
        for name, correct in baselines.items()
    ]


def compare_evaluations(first: Evaluation, other: Evaluation) -> Comparison:
    a_how, b_how = read_how(first.path), read_how(other.path)
    return compare(first.records, other.records, a_name=first.name, b_name=other.name, a_how=a_how, b_how=b_how)


def blind_of(evaluations: Sequence[Evaluation]) -> dict[str, Mapping[str, bool]]:
    """The blind baselines of evaluations over the same examples, each once, whoever kept it."""
    baselines: dict[str, Mapping[str, bool]] = {}
    for evaluation in evaluations:
        for name, correct in evaluation.blind.items():
            if name in baselines and baselines[name] != correct:  # fit on other training examples
                name = f"{name} ({evaluation.name})"
            baselines[name] = correct
    return baselines


def best_blind_name(baselines: Mapping[str, Mapping[str, bool]]) -> str | None:
    """Name of the most accurate baseline, the first of equals; None when there is none."""
    return max(baselines, key=lambda name: _share(baselines[name]).value or 0.0, default=None)


def compare_to_best_blind(evaluation: Evaluation, baselines: Mapping[str, Mapping[str, bool]]) -> Comparison | None:
    """The evaluation against the best baseline; None when there is none."""
    name = best_blind_name(baselines)
    if name is None:
        return None
    return compare_to_blind(evaluation.records, baselines[name], name=evaluation.name, blind_name=name)


def domain_rows(evaluations: Sequence[Evaluation], field: Field) -> list[DomainRow]:
    """Accuracy per modality or question type: one interval per evaluation, then that of the best blind baseline."""
    baselines = blind_of(evaluations)
    best = best_blind_name(baselines)
    series = [{record.id: record.correct for record in evaluation.records} for evaluation in evaluations]
    ids: dict[str, list[str]] = {}
    for record in evaluations[0].records:
        ids.setdefault(getattr(record, field), []).append(record.id)
    correct_by_series: list[Mapping[str, bool]] = [*series, *([baselines[best]] if best else [])]
    return [
        DomainRow(
            name=name,
            n=len(ids[name]),
            accuracies=[_share({id: correct[id] for id in ids[name]}) for correct in correct_by_series],
        )
        for name in sorted(ids)
    ]


FAILURES = ("wrong, in form", "wrong, and out of form", "no readable answer", "cut off before an answer")


def failure(record: EvalRecord) -> str | None:
    """Which of ``FAILURES`` a record is; None for a right answer."""
    if record.correct:
        return None
    if record.answer is None:
        return FAILURES[3] if record.finish_reason == "length" else FAILURES[2]
    return FAILURES[0] if record.parts.get("well_formed", 1.0) == 1.0 else FAILURES[1]


def failure_rows(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[Interval]]]:
    """(kind of failure, its share of all questions in each evaluation), in the order of ``FAILURES``."""
    counts = [Counter(failure(record) for record in evaluation.records) for evaluation in evaluations]
    return [
        (kind, [wilson(count[kind], len(e.records)) for count, e in zip(counts, evaluations, strict=True)])
        for kind in FAILURES
    ]


def evaluation_alarms(evaluations: Sequence[Evaluation]) -> list[str]:
    """What a reader must know before believing the figures of evaluations over the same examples."""
    alarms = []
    baselines = blind_of(evaluations)
    if not baselines:
        alarms.append("No blind baseline was kept: how far one gets without looking at the images is not known.")
    for evaluation in evaluations:
        figures, name = evaluation.figures, evaluation.name
        for rate, what in (
            ("parse_fail_rate", "no readable answer (counted as wrong)"),
            ("truncated_rate", "were cut off by the token limit"),
        ):
            if (figures[rate] or 0.0) > ALARMING_RATE:
                alarms.append(f"{name}: {percent(figures[rate])} of the completions {_verb(rate)}{what}.")
        alarms += [f"{name}: {text}" for text in _letter_alarms(figures)]
        against_blind = compare_to_best_blind(evaluation, baselines)
        if against_blind and not against_blind.better:
            alarms.append(f"{name}: accuracy is not shown to be above the best blind baseline. {against_blind.verdict}")
        if evaluation is not evaluations[0]:
            comparison = compare_evaluations(evaluations[0], evaluation)
            if not comparison.better:
                alarms.append(comparison.verdict)
    return alarms


def run_alarms(name: str, monitors: Sequence[Reading]) -> list[str]:
    """The monitors of a run that are beyond their limits at its end."""
    return [
        f"{name}: at the end, {reading.title.lower()}: {reading.value}, where {reading.limit} is usual "
        f"({reading.meaning})."
        for reading in monitors
        if reading.beyond
    ]


def _verb(rate: str) -> str:
    return "had " if rate == "parse_fail_rate" else ""


def _letter_alarms(figures: Mapping[str, Any]) -> list[str]:
    answers, targets = figures["answer_letters"], figures["target_letters"]
    n_answers, n_targets = sum(answers.values()), sum(targets.values())
    if not n_answers or not n_targets:
        return []
    return [
        f"it answers {letter} in {percent(answers[letter] / n_answers, 0)} of cases, "
        f"but {letter} is right in {percent(targets[letter] / n_targets, 0)}."
        for letter in answers
        if answers[letter] / n_answers - targets[letter] / n_targets > ALARMING_LETTER_EXCESS
    ]


def _share(correct: Mapping[str, bool]) -> Interval:
    return wilson(sum(correct.values()), len(correct))
