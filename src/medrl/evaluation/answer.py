"""Questions -> records: by a policy in this process, or by a server. One completion each, or several and their vote."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medrl.evaluation.grading import grade
from medrl.evaluation.option_probs import option_probs
from medrl.evaluation.samples import majority
from medrl.evaluation.settings import EvalSettings
from medrl.policy.encoding import REMEMBERED_PIXEL_BYTES, EncodedPrompt
from medrl.policy.policy import Policy
from medrl.rollout.endpoint import Endpoint
from medrl.rollout.engine import complete
from medrl.rollout.sampling import Sampling
from medrl.rollout.scheduler import Finished, Tally
from medrl.training.ahead import Ahead, choose_processes
from medrl.types import Completion, EvalRecord, Example, Prompt, Sample, relative_to

Question = tuple[Example, Prompt]
MOST_WORKERS = 8
"""Preparing prompts, where nobody says how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What came back for some questions."""

    records: list[EvalRecord]
    refused: dict[str, str]
    """Why a question has no answer, by its id."""
    decode_steps: int = 0
    """Steps of decoding so far, those of earlier answers included; 0 where a server decodes."""


def answer(
    policy: Policy | Endpoint,
    questions: Sequence[Question],
    settings: EvalSettings,
    root: str | Path | None,
    ahead: Ahead | None = None,
) -> Iterator[Answers]:
    """Ask them all; answers come as they are ready, to be kept at once.

    Args:
        root: as for ``make_record``.
        ahead: what prepares prompts, open; None: as the settings say, for as long as this takes.

    Raises ``EndpointError`` when a server fails for good.
    """
    if isinstance(policy, Endpoint):
        yield from _answer_by_server(policy, questions, settings, root)
        return
    with nullcontext(ahead) if ahead is not None else reading_ahead(policy, settings) as ahead:
        yield from _answer_here(policy, questions, settings, root, ahead)


def reading_ahead(policy: Policy, settings: EvalSettings | None = None) -> Ahead:
    """What decodes, resizes and tokenizes the next questions while some are answered; to be opened."""
    settings = settings or EvalSettings()
    workers = settings.data_workers or min(MOST_WORKERS, _cores())
    return Ahead(policy, workers, processes=choose_processes(settings.data_processes, workers, policy.device))


def _cores() -> int:
    """Those that this process may use, where that is known: a scheduler may give it a few of many."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _answer_here(
    policy: Policy, questions: Sequence[Question], settings: EvalSettings, root: str | Path | None, ahead: Ahead
) -> Iterator[Answers]:
    prompts, tally = [prompt for _, prompt in questions], Tally()
    sampling, k, at_once = settings.sampling, settings.samples, settings.batch_size
    batches = complete_reading_ahead(
        policy, prompts, sampling, ahead, at_once=at_once, group_size=k, seed=settings.seed, tally=tally
    )
    while True:
        with policy.looking_once():  # to score the options, the images need not be seen again
            finished = next(batches, None)
            if finished is None:
                return
            records = _records(policy, questions, finished, settings, root)
        yield Answers(records=records, refused={}, decode_steps=tally.decode_steps)


def complete_reading_ahead(
    policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, ahead: Ahead, *, at_once: int, **options: Any
) -> Iterator[list[Finished]]:
    """``engine.complete``, while ``ahead`` decodes, resizes and tokenizes what comes next."""
    together = max(1, at_once // 4)  # as many prompts as may be held ready, once it is known how large they are
    ahead.start([])  # whoever used it before may have stopped early

    def encode(numbers: Sequence[int]) -> list[EncodedPrompt]:
        nonlocal together
        encoded: list[EncodedPrompt] = []
        ahead.wait()
        while len(encoded) < len(numbers):
            some = [prompts[n] for n in numbers[len(encoded) : len(encoded) + together]]
            ahead.start(some)  # none that is ready is made ready again
            ahead.wait()
            encoded += policy.encode(some, room_tokens=sampling.max_new_tokens)
            largest = max(prompt.pixel_bytes for prompt in encoded)
            together = max(1, min(at_once, REMEMBERED_PIXEL_BYTES // (2 * largest or 1)))
        ahead.start(prompts[numbers[-1] + 1 :][:together])
        return encoded

    return complete(policy, prompts, sampling, at_once=at_once, encode=encode, **options)


def _records(
    policy: Policy,
    questions: Sequence[Question],
    finished: Sequence[Finished],
    settings: EvalSettings,
    root: str | Path | None,
) -> list[EvalRecord]:
    asked = [questions[one.number] for one in finished]
    examples = [example for example, _ in asked]
    graded = [_elect(example, one.completions) for example, one in zip(examples, finished, strict=True)]
    probs: list[tuple[float, ...] | None] = [None] * len(asked)
    if settings.option_probs:
        encoded = [one.encoded for one in finished]
        probs = option_probs(policy, examples, encoded, [completion for completion, _ in graded])
    return [
        replace(make_record(example, prompt, completion, root), option_probs=shares, samples=samples)
        for (example, prompt), (completion, samples), shares in zip(asked, graded, probs, strict=True)
    ]


def _answer_by_server(
    endpoint: Endpoint, questions: Sequence[Question], settings: EvalSettings, root: str | Path | None
) -> Iterator[Answers]:
    examples = {example.id: example for example, _ in questions}
    prompts = [prompt for _, prompt in questions]
    k, at_once = settings.samples, settings.batch_size
    for reply in endpoint.complete(prompts, settings.sampling, group_size=k, seed=settings.seed, at_once=at_once):
        example = examples[reply.prompt.id]
        if reply.refusal:
            yield Answers(records=[], refused={example.id: reply.refusal})
            continue
        completion, samples = _elect(example, reply.completions, reply.tokens)
        tokens = reply.tokens[reply.completions.index(completion)]
        record = make_record(example, reply.prompt, completion, root)
        yield Answers(records=[replace(record, tokens=tokens, samples=samples)], refused={})


def _elect(
    example: Example, completions: Sequence[Completion], tokens: Sequence[int] | None = None
) -> tuple[Completion, tuple[Sample, ...]]:
    """The completion that stands for the majority, and all of them graded where there are several."""
    if len(completions) == 1:
        return completions[0], ()
    tokens = [len(completion.token_ids) for completion in completions] if tokens is None else tokens
    samples = tuple(grade(example, one, length) for one, length in zip(completions, tokens, strict=True))
    return completions[samples.index(majority(samples))], samples


def make_record(example: Example, prompt: Prompt, completion: Completion, root: str | Path | None = None) -> EvalRecord:
    """Grade one completion. ``root``: folder that image paths become relative to; None keeps them as they are."""
    graded = grade(example, completion, len(completion.token_ids))
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
        completion=graded.completion,
        finish_reason=graded.finish_reason,
        answer=graded.answer,
        target=example.target,
        correct=graded.correct,
        parts=graded.parts,
        tokens=graded.tokens,
        kind=example.kind,
        references=example.references,
        tolerance=example.tolerance,
    )


def describe_asked(policy: Policy | Endpoint, settings: EvalSettings, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Who is asked and how, as far as records do not tell."""
    return {
        **(_describe_server(policy) if isinstance(policy, Endpoint) else _describe_policy(policy)),
        "max_new_tokens": settings.max_new_tokens,
        "option_probs": settings.option_probs and not isinstance(policy, Endpoint),
        "sampling": settings.describe_sampling(),
        "store_fingerprint": facts.get("store_fingerprint"),
    }


def _describe_policy(policy: Policy) -> dict[str, Any]:
    size = policy.processor.image_processor.size
    return {
        "weights": policy.fingerprint(),
        "dtype": str(policy.family.head.dtype),
        "image_size": {key: size[key] for key in ("shortest_edge", "longest_edge")},
    }


def _describe_server(endpoint: Endpoint) -> dict[str, Any]:
    return {"endpoint": endpoint.url, "served_model": endpoint.model}
