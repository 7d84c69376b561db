"""Figures of an evaluation for a model's page on the Hugging Face hub: ``model-index`` in a card, ``.eval_results``."""

import re
from pathlib import Path
from typing import Any

import yaml

from medrl.errors import SettingsError
from medrl.files import write_text_atomically
from medrl.report.tables import Evaluation
from medrl.report.text import visible

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CAUTION = "Research use only; model-generated reasoning is not an explanation of the model."


def write_model_index(evaluation: Evaluation, out: Path, dataset: str | None, task: str | None) -> list[Path]:
    """A model card whose head holds the accuracy, overall and by modality; ``out`` ends in ``.md``."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    _check_ending(out, ".md")
    name = task or _test_set(evaluation)
    domains: list[tuple[str | None, dict[str, Any]]] = [
        (None, evaluation.figures["accuracy"]),
        *evaluation.figures["by_modality"].items(),
    ]
    results = [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=dataset or _slug(name),
            dataset_name=visible(name),
            dataset_config=visible(domain) if domain is not None else None,
            dataset_split="test",
            dataset_args={"fingerprint": evaluation.summary.get("store_fingerprint")},
            metric_type="accuracy",
            metric_name=_metric_name(found),
            metric_value=round(100 * found["value"], 2),
            metric_args={"mode": evaluation.summary.get("mode"), "template": evaluation.summary.get("template")},
        )
        for domain, found in domains
    ]
    data = ModelCardData(
        model_name=visible(evaluation.name),
        pipeline_tag="image-text-to-text",
        tags=["medical"],
        eval_results=results,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{CAUTION}\n")
    write_text_atomically(out, str(card))
    return [out]


def write_eval_results(evaluation: Evaluation, out: Path, dataset: str | None, task: str | None) -> list[Path]:
    """One entry of ``.eval_results/*.yaml``; ``dataset`` is the benchmark's id on the hub."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    _check_ending(out, ".yaml")
    if dataset is None or not _HUB_ID.fullmatch(dataset):
        raise SettingsError(f"the dataset is {dataset!r}; eval-results need its id on the hub: --dataset OWNER/NAME")
    summary, found = evaluation.summary, evaluation.figures["accuracy"]
    entry = EvalResultEntry(
        dataset_id=dataset,
        task_id=task or "default",
        value=round(100 * found["value"], 2),
        date=summary.get("started"),
        notes=f"{_metric_name(found)}; mode {summary.get('mode')}, template {summary.get('template')}",
    )
    write_text_atomically(out, yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))
    return [out]


def _metric_name(found: dict[str, Any]) -> str:
    return f"Accuracy in %, 95 % interval {100 * found['low']:.1f} to {100 * found['high']:.1f}, n = {found['n']}"


def _test_set(evaluation: Evaluation) -> str:
    store = evaluation.summary.get("store")
    return Path(store).name if store else evaluation.name


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-").lower() or "test-set"


def _check_ending(out: Path, ending: str) -> None:
    if out.suffix != ending:
        raise SettingsError(f"{out} ends in {out.suffix!r}, but this format is a {ending} file")
