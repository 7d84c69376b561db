"""The Python interface where it is kinder than the functions behind it: it takes what the other calls return."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medrl.data import store as _store
from medrl.evaluation import asked as _asked
from medrl.evaluation import compare as _compare
from medrl.report import page as _page
from medrl.runs import Run, read_records
from medrl.types import EvalRecord, Example

if TYPE_CHECKING:
    from medrl.evaluation.evaluate import Evaluation
    from medrl.policy.policy import Policy


def evaluate(
    policy: "Policy",
    examples: Sequence[Example],
    *,
    out: str | Path,
    facts: Mapping[str, Any] | None = None,
    **options: Any,
) -> "Evaluation":
    """Ask ``policy`` every example greedily and grade its answers; see ``medrl.evaluation.evaluate.evaluate``.

    Examples that were loaded from a store are recorded as such, so that a report finds their images.
    """
    from medrl.evaluation.evaluate import evaluate as evaluate_examples

    facts = {"name": Path(out).name, **(facts or {})}
    root = options.pop("root", None) or _store.store_of(examples)
    if root is not None and (Path(root) / "store.json").is_file():
        info = _store.read_info(Path(root))
        facts = {"store": str(Path(root).resolve()), "store_fingerprint": info.fingerprint, **facts}
    return evaluate_examples(policy, examples, out=out, root=root, facts=facts, **options)


def compare(
    a: "Evaluation | Sequence[EvalRecord] | str | Path",
    b: "Evaluation | Sequence[EvalRecord] | str | Path",
    *,
    cluster: _compare.Cluster = "image",
    a_name: str | None = None,
    b_name: str | None = None,
) -> _compare.Comparison:
    """B minus A, paired by example: two results of ``evaluate``, lists of records, or evaluation folders.

    Names default to the evaluations' own. Raises ``RunError`` as ``medrl.evaluation.compare.compare`` does.
    """
    return _compare.compare(
        _records(a), _records(b), cluster=cluster, a_name=a_name or _name(a, "A"), b_name=b_name or _name(b, "B"),
        a_how=_how(a), b_how=_how(b),
    )  # fmt: skip


def write_report(what: Run | str | Path | Sequence[Run | str | Path], out: str | Path | None = None) -> Path:
    """Write the report over runs and evaluation folders; ``out`` defaults to ``report.html`` in the first of them."""
    given = [what] if isinstance(what, Run | str | Path) else list(what)
    folders = [item.path if isinstance(item, Run) else Path(item) for item in given]
    return _page.write_report(folders, Path(out) if out is not None else folders[0] / "report.html")


def _records(given: "Evaluation | Sequence[EvalRecord] | str | Path") -> Sequence[EvalRecord]:
    if isinstance(given, str | Path):
        return read_records(Path(given))
    return given if isinstance(given, Sequence) else given.records


def _how(given: "Evaluation | Sequence[EvalRecord] | str | Path") -> dict[str, str]:
    return _asked.read_how(Path(given)) if isinstance(given, str | Path) else {}


def _name(given: "Evaluation | Sequence[EvalRecord] | str | Path", default: str) -> str:
    if isinstance(given, str | Path):
        return Path(given).resolve().name
    return default if isinstance(given, Sequence) else str(given.summary.get("name", default))
