"""The same questions in several wordings: how much of an accuracy is the wording's."""

from collections.abc import Mapping, Sequence
from typing import Any

from medrl.evaluation.intervals import wilson
from medrl.evaluation.metrics import accuracy
from medrl.types import EvalRecord

TEMPLATES_FILE = "templates.json"


def summarize_wordings(records: Mapping[str, Sequence[EvalRecord]]) -> dict[str, Any]:
    """Figures over evaluations of the same examples, by the name of the template.

    ``templates``: accuracy of each. ``spread``: best minus worst. ``right_in_all``, ``right_in_any``: share of the
    questions answered right in every wording, and in at least one. ``same_answer``: share of the questions with one
    readable answer in all wordings, right or wrong.
    """
    by_question = list(zip(*records.values(), strict=True))
    n = len(by_question)
    accuracies = {name: accuracy(listed) for name, listed in records.items()}
    values = [float(found["value"] or 0.0) for found in accuracies.values()]
    same = [len({record.answer for record in asked}) == 1 and asked[0].answer is not None for asked in by_question]
    return {
        "n": n,
        "templates": accuracies,
        "spread": max(values) - min(values),
        "right_in_all": wilson(sum(all(r.correct for r in asked) for asked in by_question), n).as_dict(),
        "right_in_any": wilson(sum(any(r.correct for r in asked) for asked in by_question), n).as_dict(),
        "same_answer": wilson(sum(same), n).as_dict(),
    }
