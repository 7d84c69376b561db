"""Policy x examples -> records.jsonl and summary.json. Greedy; killed anywhere, it continues where it stopped."""

import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field

from medrl.data import store
from medrl.data.prompts import find_template, make_prompt
from medrl.errors import DataError, RunError
from medrl.evaluation.blind import best_blind, blind_baselines
from medrl.evaluation.compare import compare_to_blind
from medrl.evaluation.metrics import summarize
from medrl.evaluation.option_probs import option_probs
from medrl.policy.lengths import check_room
from medrl.policy.policy import Policy
from medrl.progress import Progress
from medrl.provenance import describe_machine, describe_versions
from medrl.rewards import from_weights
from medrl.rewards.kinds import check_target
from medrl.rollout.engine import generate
from medrl.rollout.sampling import Sampling
from medrl.runs import ASKED, RECORDS, append_records, is_evaluation, read_records, read_summary, write_json_atomically
from medrl.settings import Settings, choose_settings
from medrl.types import KINDS, Completion, EvalRecord, Example, Kind, Mode, Prompt, relative_to

RIGHT: dict[Kind, str] = {kind: "choice_correct" if kind == "choice" else "answer_correct" for kind in KINDS}
"""The part that tells whether an answer is right, by kind of question."""
REWARDS = {kind: from_weights({right: 1.0, "well_formed": 1.0}) for kind, right in RIGHT.items()}


class EvalSettings(Settings):
    """How an evaluation asks and decodes."""

    mode: Mode = "think"
    template: str | None = None
    max_new_tokens: int = Field(default=256, ge=1)
    batch_size: int = Field(default=32, ge=1)
    """Prompts decoded together; changes speed, and the answers by no more than rounding."""
    option_probs: bool = True
    """Keep how probable each option's letter was; one more pass over prompt and completion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A finished evaluation."""

    records: list[EvalRecord]
    """In the order of the examples."""
    summary: dict[str, Any]


def evaluate(
    policy: Policy,
    examples: Sequence[Example],
    *,
    out: str | Path,
    root: str | Path | None = None,
    train_examples: Sequence[Example] | None = None,
    facts: Mapping[str, Any] | None = None,
    settings: EvalSettings | None = None,
    quiet: bool = False,
    **options: Any,
) -> Evaluation:
    """Ask ``policy`` every example greedily and grade its answers.

    Args:
        out: folder for records.jsonl and summary.json. Records that are there already are kept, so an evaluation that
            was stopped continues; it is refused when they are of another model, prompt or setting.
        root: folder that image paths in the records are relative to (the store); None keeps the paths as they are.
        train_examples: what the blind baselines that need a fit are fit on.
        facts: more to keep in the summary, e.g. ``name``, ``model``, ``store``.
        settings: see ``EvalSettings``; or give its fields as keyword arguments.
    """
    settings = choose_settings(EvalSettings, settings, options)
    find_template(settings.mode, settings.template)
    if not examples:
        raise DataError("there is nothing to evaluate: the test set is empty")
    for example in examples:
        check_target(example)  # what cannot be graded shows now, not when its batch is answered
    out = Path(out)
    name = (facts or {}).get("name", out.name)
    ask = functools.partial(make_prompt, mode=settings.mode, template=settings.template)
    done = _finished(out, {example.id: (example, ask(example)) for example in examples})
    asked = describe_asked(policy, settings, facts or {})
    started = _check_asked(out, asked)
    seconds_before = read_summary(out).get("seconds", 0.0) if is_evaluation(out) else 0.0
    clock = time.monotonic()
    missing = [example for example in examples if example.id not in done]
    check_room(policy, [ask(example) for example in missing], settings.max_new_tokens)
    batches = [missing[start : start + settings.batch_size] for start in range(0, len(missing), settings.batch_size)]
    with Progress(len(batches), noun=f"evaluate {name}, batch", quiet=quiet) as progress:
        for batch in batches:
            records = _answer(policy, batch, [ask(example) for example in batch], settings, root)
            if not (out / ASKED).exists():
                write_json_atomically(out / ASKED, {**asked, "started": started})
            append_records(out, records)
            done.update({record.id: record for record in records})
            progress.advance({"accuracy": fmean(record.correct for record in done.values())})
    ordered = [done[example.id] for example in examples]
    summary = {
        **(facts or {}),
        "mode": settings.mode,
        "template": find_template(settings.mode, settings.template).name,
        **summarize(ordered),
        **_against_blind(ordered, examples, train_examples, name),
        **describe_versions(),
        **describe_machine(),
        "started": started,
        "seconds": seconds_before + time.monotonic() - clock,
    }
    write_json_atomically(out / "summary.json", summary)
    return Evaluation(records=ordered, summary=summary)


def evaluate_store(
    policy: Policy,
    test: Path,
    *,
    out: Path,
    model: str,
    train: Path | None = None,
    name: str | None = None,
    limit: int | None = None,
    settings: EvalSettings | None = None,
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
    train_examples = store.load(train) if train else None
    return evaluate(
        policy,
        examples,
        out=out,
        root=test,
        train_examples=train_examples,
        facts=facts,
        settings=settings,
        quiet=quiet,
    )


def _answer(
    policy: Policy,
    examples: Sequence[Example],
    prompts: Sequence[Prompt],
    settings: EvalSettings,
    root: str | Path | None,
) -> list[EvalRecord]:
    sampling = Sampling(temperature=0.0, max_new_tokens=settings.max_new_tokens)
    completions = [completion for (completion,) in generate(policy, prompts, sampling)]
    probs: list[tuple[float, ...] | None] = [None] * len(prompts)
    if settings.option_probs:
        probs = option_probs(policy, examples, policy.encode(prompts), completions)
    return [
        replace(make_record(example, prompt, completion, root), option_probs=shares)
        for example, prompt, completion, shares in zip(examples, prompts, completions, probs, strict=True)
    ]


def make_record(example: Example, prompt: Prompt, completion: Completion, root: str | Path | None = None) -> EvalRecord:
    """Grade one completion."""
    score = REWARDS[example.kind](example, completion)
    return EvalRecord(
        id=example.id,
        source=example.source,
        modality=example.modality,
        question_type=example.question_type,
        patient=example.patient,
        images=tuple(relative_to(image, root) for image in example.images),
        question=example.question,
        options=example.options,
        mode=prompt.mode,
        prompt_hash=prompt.hash,
        completion=completion.text,
        finish_reason=completion.finish_reason,
        answer=score.answer,
        target=example.target,
        correct=score.parts[RIGHT[example.kind]] == 1.0,
        parts=score.parts,
        tokens=len(completion.token_ids),
        kind=example.kind,
        references=example.references,
        tolerance=example.tolerance,
    )


def _finished(out: Path, asked: Mapping[str, tuple[Example, Prompt]]) -> dict[str, EvalRecord]:
    """Records of an earlier start, by example. Raises ``RunError`` when they answer other prompts or other targets."""
    if not (out / RECORDS).exists():
        return {}
    records = {record.id: record for record in read_records(out)}
    strange = [id for id, record in records.items() if id not in asked or not _answers(record, *asked[id])]
    if strange:
        raise RunError(
            f"{out} holds {len(strange)} records of other prompts (for one: {strange[0]}): it belongs to another data "
            "set, mode or template. Choose another --out, or delete that folder"
        )
    return records


def _answers(record: EvalRecord, example: Example, prompt: Prompt) -> bool:
    return record.prompt_hash == prompt.hash and record.target == example.target


def describe_asked(policy: Policy, settings: EvalSettings, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Who is asked and how, as far as records do not tell."""
    size = policy.processor.image_processor.size
    return {
        "weights": policy.fingerprint(),
        "dtype": str(policy.family.head.dtype),
        "image_size": {key: size[key] for key in ("shortest_edge", "longest_edge")},
        "max_new_tokens": settings.max_new_tokens,
        "store_fingerprint": facts.get("store_fingerprint"),
    }


def _check_asked(out: Path, asked: Mapping[str, Any]) -> str:
    """When the first question was asked.

    Raises ``RunError`` when the folder's answers are another model's, or were given under other settings or data.
    """
    if not (out / ASKED).exists():
        return datetime.now(UTC).isoformat(timespec="seconds")
    before = json.loads((out / ASKED).read_text())
    differing = sorted(key for key in asked if asked[key] != before.get(key))
    if differing:
        raise RunError(
            f"{out} holds answers given with other {', '.join(differing)}: choose another --out, or delete that folder"
        )
    return before["started"]


def _against_blind(
    records: Sequence[EvalRecord], examples: Sequence[Example], train_examples: Sequence[Example] | None, name: str
) -> dict[str, Any]:
    results = blind_baselines(train_examples, examples)
    best = best_blind(results)
    return {
        "blind": [result.as_dict() for result in results],
        "comparison_to_blind": compare_to_blind(records, best, name=name).as_dict(),
    }
