"""Evaluation records in the formats of other programs: one table, format -> writer."""

from collections.abc import Callable
from pathlib import Path

from medrl.errors import RunError, SettingsError
from medrl.report import to_hub, to_inspect, to_lmms_eval
from medrl.report.tables import Evaluation, read_evaluation

Writer = Callable[[Evaluation, Path, str | None, str | None], list[Path]]
"""``(evaluation, out, dataset, task)`` -> the files written."""

FORMATS: dict[str, Writer] = {
    "inspect": to_inspect.write,
    "lmms-eval": to_lmms_eval.write,
    "model-index": to_hub.write_model_index,
    "eval-results": to_hub.write_eval_results,
}


def export_records(
    folder: Path, to: str, out: Path, *, dataset: str | None = None, task: str | None = None
) -> list[Path]:
    """Write the evaluation in ``folder`` in the format ``to``, a key of ``FORMATS``; returns the files written.

    Args:
        dataset: id of the test set on the hub; ``eval-results`` needs it, others take the store's name.
        task: name of the task there; default: the store's name.

    Raises:
        RunError: the folder is no finished evaluation. MissingExtraError: the format's package is not installed.
    """
    if to not in FORMATS:
        raise SettingsError(f"there is no format {to!r}; there are {', '.join(FORMATS)}")
    evaluation = read_evaluation(folder)
    if not evaluation.records:
        raise RunError(f"{folder} holds no record: there is nothing to export")
    out.parent.mkdir(parents=True, exist_ok=True)
    return FORMATS[to](evaluation, out, dataset, task)
