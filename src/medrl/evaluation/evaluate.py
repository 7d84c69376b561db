"""Model x examples -> records.jsonl and summary.json. Killed anywhere, it continues where it stopped.

Greedy, or several samples per question; by a policy in this process or by a server; by one process or by several.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medrl.data import store
from medrl.data.prompts import find_template, make_prompt
from medrl.errors import DataError, EndpointError
from medrl.evaluation.answer import Question, answer, describe_asked, make_record
from medrl.evaluation.blind import best_blind, blind_baselines
from medrl.evaluation.compare import compare_to_blind
from medrl.evaluation.metrics import summarize
from medrl.evaluation.resume import Start, check_asked, read_answered
from medrl.evaluation.samples import summarize_samples
from medrl.evaluation.settings import EvalSettings
from medrl.evaluation.shards import Shard
from medrl.files import write_json_atomically
from medrl.policy.lengths import check_room
from medrl.policy.policy import Policy
from medrl.progress import Progress
from medrl.provenance import describe_machine, describe_versions
from medrl.rewards.kinds import check_target
from medrl.rollout.endpoint import Endpoint
from medrl.runs import (
    RECORDS,
    SUMMARY,
    append_records,
    is_evaluation,
    read_records,
    read_summary,
    write_records_atomically,
)
from medrl.settings import choose_settings
from medrl.training.ahead import Ahead
from medrl.types import EvalRecord, Example

__all__ = ["EvalSettings", "Evaluation", "evaluate", "evaluate_store", "make_record"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """An evaluation, finished but for what other shards still have to answer."""

    records: list[EvalRecord]
    """In the order of the examples."""
    summary: dict[str, Any]
    """What ``summary.json`` holds; figures of the present records alone, and no file, while ``unanswered`` is not 0."""
    unanswered: int = 0
    """Questions that are left to other shards."""


def evaluate(
    policy: Policy | Endpoint,
    examples: Sequence[Example],
    *,
    out: str | Path,
    root: str | Path | None = None,
    train_examples: Sequence[Example] | None = None,
    facts: Mapping[str, Any] | None = None,
    settings: EvalSettings | None = None,
    shard: Shard | None = None,
    ahead: Ahead | None = None,
    quiet: bool = False,
    **options: Any,
) -> Evaluation:
    """Ask ``policy``, or the model behind an endpoint, every example and grade its answers.

    Args:
        out: folder for records.jsonl and summary.json. Records that are there already are kept, so an evaluation that
            was stopped continues; it is refused when they are of another model, prompt or setting.
        root: folder that image paths in the records are relative to (the store); None keeps the paths as they are.
        train_examples: what the blind baselines that need a fit are fit on.
        facts: more to keep in the summary, e.g. ``name``, ``model``, ``store``.
        settings: see ``EvalSettings``; or give its fields as keyword arguments.
        shard: ask only this part; whichever shard finds everything answered writes records and summary of all.
        ahead: what prepares the prompts, where it serves several evaluations; else as the settings say.

    Raises:
        RunError: ``out`` holds answers to something else.
        EndpointError: the server failed for good, or refused some questions; all that it answered is kept.
    """
    settings = choose_settings(EvalSettings, settings, options)
    find_template(settings.mode, settings.template)
    if not examples:
        raise DataError("there is nothing to evaluate: the test set is empty")
    for example in examples:
        check_target(example)  # what cannot be graded shows now, not when its batch is answered
    out, facts = Path(out), facts or {}
    name = facts.get("name", out.name)
    prompts = [make_prompt(example, settings.mode, settings.template) for example in examples]
    questions = {prompt.id: (example, prompt) for example, prompt in zip(examples, prompts, strict=True)}
    done = read_answered(out, questions)
    asked = describe_asked(policy, settings, facts)
    started = check_asked(out, asked)
    before = read_summary(out) if is_evaluation(out) else {}
    clock = time.monotonic()
    mine = shard.of(list(questions.values())) if shard else list(questions.values())
    missing = [question for question in mine if question[0].id not in done]
    if isinstance(policy, Policy):
        check_room(policy, [prompt for _, prompt in missing], settings.max_new_tokens)
    decode_steps = 0
    if missing:
        folder = shard.folder(out) if shard else out
        start = Start(out=out, folder=folder, asked=asked, started=started, questions=len(questions))
        decode_steps = _ask(policy, missing, settings, root, start, name, ahead, quiet)
        done = read_answered(out, questions)
    ordered = [done[id] for id in questions if id in done]
    summary = {
        **facts,
        "mode": settings.mode,
        "template": find_template(settings.mode, settings.template).name,
        **summarize(ordered),
        **summarize_samples(ordered),
        **({"sampling": asked["sampling"]} if asked["sampling"] else {}),
    }
    if len(ordered) < len(questions):
        return Evaluation(records=ordered, summary=summary, unanswered=len(questions) - len(ordered))
    summary |= {
        **_against_blind(ordered, examples, train_examples, name),
        **describe_versions(),
        **describe_machine(),
        "started": started,
        # Looking at a finished evaluation again takes no time of the evaluation's.
        "seconds": before.get("seconds", 0.0) + (time.monotonic() - clock if missing or not before else 0.0),
        "decode_steps": before.get("decode_steps", 0) + decode_steps,
    }
    # Shards and servers answer in any order: the file ends in that of the examples, however it came to be.
    if not (out / RECORDS).is_file() or read_records(out) != ordered:
        write_records_atomically(out, ordered)
    write_json_atomically(out / SUMMARY, summary)
    return Evaluation(records=ordered, summary=summary)


def evaluate_store(
    policy: Policy | Endpoint,
    test: Path,
    *,
    out: Path,
    model: str,
    train: Path | None = None,
    name: str | None = None,
    limit: int | None = None,
    settings: EvalSettings | None = None,
    shard: Shard | None = None,
    ahead: Ahead | None = None,
    quiet: bool = False,
) -> Evaluation:
    """``evaluate`` on a store, with where everything came from written into the summary."""
    examples = store.load(test)[:limit]
    info = store.read_info(test)
    facts = {
        "name": name or out.name,
        "model": model,
        "store": str(test.resolve()),
        "store_fingerprint": info.fingerprint,
        "train_store": str(train.resolve()) if train else None,
    }
    if isinstance(policy, Endpoint):
        facts |= {"endpoint": policy.url, "served_model": policy.model}
    train_examples = store.load(train) if train else None
    return evaluate(
        policy,
        examples,
        out=out,
        root=test,
        train_examples=train_examples,
        facts=facts,
        settings=settings,
        shard=shard,
        ahead=ahead,
        quiet=quiet,
    )


def _ask(
    policy: Policy | Endpoint,
    questions: Sequence[Question],
    settings: EvalSettings,
    root: str | Path | None,
    start: Start,
    name: str,
    ahead: Ahead | None,
    quiet: bool,
) -> int:
    """Append every answer to the records as it comes. Returns the steps of decoding that took."""
    answered, right, refused, decode_steps = 0, 0, {}, 0
    with Progress(len(questions), noun=f"evaluate {name}, question", quiet=quiet) as progress:
        for answers in answer(policy, questions, settings, root, ahead):
            if answers.records and not answered:
                start.write(to_answer=len(questions))
            append_records(start.folder, answers.records)
            answered += len(answers.records)
            right += sum(record.correct for record in answers.records)
            refused |= answers.refused
            decode_steps = answers.decode_steps
            row = {"accuracy": right / answered} if answered else {}
            progress.advance(row, steps=len(answers.records) + len(answers.refused))
    if refused:
        id, reason = next(iter(refused.items()))
        raise EndpointError(
            f"the endpoint refused {len(refused)} of {len(questions)} questions (for one, {id}: {reason}). The other "
            f"answers are kept in {start.folder}; the same command asks the refused ones again"
        )
    return decode_steps


def _against_blind(
    records: Sequence[EvalRecord], examples: Sequence[Example], train_examples: Sequence[Example] | None, name: str
) -> dict[str, Any]:
    results = blind_baselines(train_examples, examples)
    best = best_blind(results)
    return {
        "blind": [result.as_dict() for result in results],
        "comparison_to_blind": compare_to_blind(records, best, name=name).as_dict(),
    }
