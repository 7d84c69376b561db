"""An evaluation as a log of Inspect (inspect_ai): `inspect view` shows it, its data frames and scorers read it.

A sample of several is an epoch. Reasoning stands in reasoning blocks, with the completion as written in the metadata.
Pictures are embedded as in the report: small, encoded anew. Patients are left out.
"""

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from medrl.errors import MissingExtraError, SettingsError
from medrl.report.gallery import embed_image
from medrl.report.tables import Evaluation
from medrl.report.text import asked_text
from medrl.types import EvalRecord, Sample

_REASONING = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_SCORER = "medrl"


def write(evaluation: Evaluation, out: Path, dataset: str | None, task: str | None) -> list[Path]:
    """Write ``out``, which ends in ``.eval`` or ``.json``."""
    try:
        import inspect_ai.log as log  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise MissingExtraError("inspect-ai", "inspect") from error
    if out.suffix not in (".eval", ".json"):
        raise SettingsError(f"{out} ends in {out.suffix!r}, but a log of Inspect ends in .eval or .json")
    summary, name = evaluation.summary, task or _test_set(evaluation)
    spec = log.EvalSpec(
        created=summary.get("started") or datetime.now(UTC).isoformat(),
        task=name,
        dataset=log.EvalDataset(
            name=dataset or name,
            samples=len(evaluation.records),
            sample_ids=[record.id for record in evaluation.records],
            shuffled=False,
        ),
        model=f"medrl/{str(summary.get('model') or evaluation.name).lstrip('/')}",
        model_base_url=summary.get("endpoint"),
        config=log.EvalConfig(epochs=max(1, len(evaluation.records[0].samples)), epochs_reducer=["mode"]),
        packages={"medrl": str(summary.get("versions", {}).get("medrl", "unknown"))},
        metadata={key: summary.get(key) for key in ("mode", "template", "store_fingerprint", "sampling")},
    )
    samples = [sample for record in evaluation.records for sample in _samples(evaluation, record)]
    score = log.EvalScore(
        name=_SCORER,
        scorer=_SCORER,
        scored_samples=len(evaluation.records),
        metrics={
            metric: log.EvalMetric(name=metric, value=value)
            for metric, value in _metrics(evaluation).items()
            if value is not None
        },
    )
    results = log.EvalResults(total_samples=len(samples), completed_samples=len(samples), scores=[score])
    stats = log.EvalStats(**_times(summary))
    log.write_eval_log(
        log.EvalLog(status="success", eval=spec, results=results, stats=stats, samples=samples), str(out)
    )
    return [out]


def _times(summary: Mapping[str, Any]) -> dict[str, str]:
    """When the first question was asked, and that much later as was worked: the viewer shows what lies between."""
    if not summary.get("started"):
        return {}
    started = datetime.fromisoformat(summary["started"])
    ended = started + timedelta(seconds=summary.get("seconds") or 0.0)
    return {"started_at": started.isoformat(), "completed_at": ended.isoformat()}


def _test_set(evaluation: Evaluation) -> str:
    store = evaluation.summary.get("store")
    return Path(store).name if store else evaluation.name


def _metrics(evaluation: Evaluation) -> dict[str, float | None]:
    accuracy = evaluation.accuracy
    return {"accuracy": accuracy.value, "accuracy_low": accuracy.low, "accuracy_high": accuracy.high}


def _samples(evaluation: Evaluation, record: EvalRecord) -> Iterator[Any]:
    from inspect_ai.log import EvalSample  # pyright: ignore[reportMissingImports]
    from inspect_ai.model import ChatMessageUser, ContentImage, ContentText, ModelOutput  # pyright: ignore[reportMissingImports]
    from inspect_ai.scorer import Score  # pyright: ignore[reportMissingImports]

    store = evaluation.summary.get("store")
    pictures = [embed_image(Path(store) if store else None, name) for name in record.images]
    asked = ChatMessageUser(
        content=[
            *(
                ContentImage(image=picture.uri) if picture.uri else ContentText(text=f"[no image: {picture.problem}]")
                for picture in pictures
            ),
            ContentText(text=asked_text(record)),
        ]
    )
    for epoch, given in enumerate(record.samples or (record,), start=1):
        answered = _message(given, evaluation)
        stop = "max_tokens" if given.finish_reason == "length" else "stop"
        yield EvalSample(
            id=record.id,
            epoch=epoch,
            input=[asked],
            choices=list(record.options) or None,
            target=record.target,
            messages=[asked, answered],
            output=ModelOutput.from_message(answered, stop_reason=stop),
            scores={
                _SCORER: Score(
                    value="C" if given.correct else "I",
                    answer=given.answer,
                    explanation="no readable answer, counted as wrong" if given.answer is None else None,
                    metadata={"parts": given.parts},
                )
            },
            metadata={
                "source": record.source,
                "modality": record.modality,
                "question_type": record.question_type,
                "mode": record.mode,
                "tokens": given.tokens,
                "completion": given.completion,
                "option_probs": record.option_probs if isinstance(given, EvalRecord) else None,
            },
        )


def _message(given: EvalRecord | Sample, evaluation: Evaluation) -> Any:
    from inspect_ai.model import ChatMessageAssistant, ContentReasoning, ContentText  # pyright: ignore[reportMissingImports]

    found = _REASONING.fullmatch(given.completion)
    content = (
        [ContentReasoning(reasoning=found[1]), ContentText(text=found[2])]
        if found
        else [ContentText(text=given.completion)]
    )
    return ChatMessageAssistant(content=content, model=evaluation.name, source="generate")
