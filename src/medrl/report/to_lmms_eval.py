"""An evaluation as lmms-eval leaves one: ``<run>_samples_<task>.jsonl`` and ``<run>_results.json`` beside it.

lmms-eval numbers documents, so ``doc_id`` is the place in the test set; our id stands beside it. Patients are left out.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from medrl.errors import SettingsError
from medrl.files import write_json_atomically, write_text_atomically
from medrl.report.tables import Evaluation
from medrl.report.text import asked_text
from medrl.types import EvalRecord


def write(evaluation: Evaluation, out: Path, dataset: str | None, task: str | None) -> list[Path]:
    """Write the samples to ``out``, which ends in ``.jsonl``, and the results beside it."""
    if out.suffix != ".jsonl":
        raise SettingsError(f"{out} ends in {out.suffix!r}, but lmms-eval's samples are a .jsonl file")
    run, _, named = out.stem.partition("_samples_")
    store = evaluation.summary.get("store")
    task = task or named or (Path(store).name if store else evaluation.name)
    rows = (_row(number, record) for number, record in enumerate(evaluation.records))
    write_text_atomically(out, "".join(json.dumps(row) + "\n" for row in rows))
    results = out.with_name(f"{run}_results.json")
    write_json_atomically(results, _results(evaluation, task, dataset))
    return [out, results]


def _row(number: int, record: EvalRecord) -> dict[str, Any]:
    written = [sample.completion for sample in record.samples] or [record.completion]
    return {
        "doc_id": number,
        "id": record.id,
        "input": asked_text(record),
        "input_media": list(record.images),
        "target": record.target,
        "resps": written,
        "filtered_resps": record.answer if record.answer is not None else "",
        "doc_hash": _hash(json.dumps([record.id, record.question, record.options, record.target])),
        "prompt_hash": record.prompt_hash,
        "target_hash": _hash(record.target),
        "token_counts": [{"output_tokens": tokens} for tokens in _tokens(record)],
        "score": float(record.correct),
        "acc": float(record.correct),
        "modality": record.modality,
        "question_type": record.question_type,
        "source": record.source,
    }


def _tokens(record: EvalRecord) -> list[int]:
    return [sample.tokens for sample in record.samples] or [record.tokens]


def _results(evaluation: Evaluation, task: str, dataset: str | None) -> dict[str, Any]:
    summary, accuracy, n = evaluation.summary, evaluation.accuracy, len(evaluation.records)
    share = accuracy.value or 0.0
    by_modality = {f"acc_{name},none": found["value"] for name, found in evaluation.figures["by_modality"].items()}
    return {
        "results": {
            task: {
                "alias": task,
                "acc,none": share,
                "acc_stderr,none": (share * (1 - share) / n) ** 0.5,
                "acc_low,none": accuracy.low,
                "acc_high,none": accuracy.high,
                **by_modality,
            }
        },
        "configs": {
            task: {
                "task": task,
                "dataset_path": dataset or summary.get("store"),
                "output_type": "generate_until",
                "metadata": {key: summary.get(key) for key in ("mode", "template", "store_fingerprint", "sampling")},
            }
        },
        "versions": {task: 0},
        "n-shot": {task: 0},
        "higher_is_better": {task: {"acc": True}},
        "n-samples": {task: {"original": n, "effective": n}},
        "config": {"model": "medrl", "model_args": str(summary.get("model") or evaluation.name), "limit": None},
        "git_hash": None,
        "date": summary.get("started"),
        "model_name": str(summary.get("model") or evaluation.name),
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
