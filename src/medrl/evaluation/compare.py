"""Two evaluations of the same examples, compared example by example."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from medrl.errors import RunError
from medrl.evaluation.asked import differing
from medrl.evaluation.blind import BlindResult
from medrl.evaluation.intervals import Interval, clustered_bootstrap, mcnemar_exact, wilson
from medrl.types import EvalRecord, image_cluster

Cluster = Literal["image", "patient"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """B against A over the same examples."""

    difference: Interval
    """Accuracy of B minus accuracy of A; 95 % bootstrap interval over clusters."""
    n: int
    n_clusters: int
    cluster: Cluster
    mcnemar_p: float
    """Exact, two-sided; takes examples to be independent."""
    a_accuracy: Interval
    b_accuracy: Interval
    only_a: int
    """Examples that A has right and B wrong."""
    only_b: int
    a_name: str = "A"
    b_name: str = "B"
    asked_differently: tuple[str, ...] = ()
    """In what they differ besides the weights, as far as is known: ``max_pixels (401408, 50176)``."""

    @property
    def note(self) -> str:
        """One sentence on what else the difference may come from; empty where nothing else differs."""
        if not self.asked_differently:
            return ""
        return f"Besides their weights, {self.a_name} and {self.b_name} differ in {', '.join(self.asked_differently)}."

    @property
    def better(self) -> bool:
        """Whether the data show B to be better."""
        return self._shown and (self.difference.low or 0.0) > 0

    @property
    def worse(self) -> bool:
        """Whether the data show B to be worse."""
        return self._shown and (self.difference.high or 0.0) < 0

    @property
    def _shown(self) -> bool:
        # Both must agree: the bootstrap is too sure of itself over a handful of clusters, McNemar's test within them.
        return self.difference.excludes(0.0) and self.mcnemar_p < 0.05

    @property
    def verdict(self) -> str:
        """One sentence that claims no more than the interval and the test allow."""
        if self.difference.value is None:
            return "Nothing to compare: there are no examples."
        points = f"{100 * abs(self.difference.value):.1f} points"
        if self.better:
            claim = f"{self.b_name} is better than {self.a_name} by {points}"
        elif self.worse:
            claim = f"{self.b_name} is worse than {self.a_name} by {points}"
        else:
            claim = (
                f"No difference shown: {self.b_name} minus {self.a_name} is {100 * self.difference.value:+.1f} points"
            )
        return f"{claim} ({self._evidence})."

    def __str__(self) -> str:
        return self.verdict

    @property
    def _evidence(self) -> str:
        low, high = self.difference.low, self.difference.high
        if low is None or high is None:
            interval = f"no interval: all examples share one {self.cluster}"
        else:
            interval = f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
        return (
            f"{interval}, exact McNemar p = {self.mcnemar_p:.2g}, {self.n} examples, {self.n_clusters} {self.cluster}s"
        )

    def as_dict(self) -> dict[str, Any]:
        """As JSON: what ``medrl compare --json`` prints."""
        return {
            "a": self.a_name,
            "b": self.b_name,
            "difference": self.difference.as_dict(),
            "n": self.n,
            "n_clusters": self.n_clusters,
            "cluster": self.cluster,
            "mcnemar_p": self.mcnemar_p,
            "a_accuracy": self.a_accuracy.as_dict(),
            "b_accuracy": self.b_accuracy.as_dict(),
            "only_a": self.only_a,
            "only_b": self.only_b,
            "verdict": self.verdict,
            "asked_differently": list(self.asked_differently),
        }


def compare(
    a: Sequence[EvalRecord],
    b: Sequence[EvalRecord],
    *,
    cluster: Cluster = "image",
    a_name: str = "A",
    b_name: str = "B",
    a_how: Mapping[str, str] | None = None,
    b_how: Mapping[str, str] | None = None,
) -> Comparison:
    """B minus A, paired by example id.

    The interval resamples whole images (or patients): questions about one image are right or wrong together.
    Modes and prompts may differ, that is often what is compared; so may how they were asked, which ``a_how`` and
    ``b_how`` say (see ``asked.read_how``): the comparison then has a note.
    Raises RunError when the two are not over the same examples, or a patient is unknown and patients are asked for.
    """
    a_by_id, b_by_id = _by_id(a, a_name), _by_id(b, b_name)
    _check_same_ids(a_by_id, b_by_id, a_name, b_name)
    changed = [id for id in a_by_id if _content(a_by_id[id]) != _content(b_by_id[id])]
    if changed:
        raise RunError(
            f"{a_name} and {b_name} differ in question, options or target of {_counted(changed, len(a_by_id))}: "
            "evaluate both on the same store"
        )
    b_correct = {id: record.correct for id, record in b_by_id.items()}
    found = _compare(
        a_by_id, {id: record.correct for id, record in a_by_id.items()}, b_correct, cluster, a_name, b_name
    )
    prompts = _prompts_that_differ(a_by_id, b_by_id)
    return replace(found, asked_differently=(*prompts, *differing(a_how or {}, b_how or {})))


def _prompts_that_differ(a: Mapping[str, EvalRecord], b: Mapping[str, EvalRecord]) -> tuple[str, ...]:
    """The modes, or that the wording differs within one mode."""
    modes = [", ".join(sorted({record.mode for record in records.values()})) for records in (a, b)]
    if modes[0] != modes[1]:
        return (f"mode ({modes[0]}, {modes[1]})",)
    return ("the wording of the prompt",) if any(a[id].prompt_hash != b[id].prompt_hash for id in a) else ()


def compare_to_blind(
    records: Sequence[EvalRecord],
    blind: BlindResult | Mapping[str, bool],
    *,
    cluster: Cluster = "image",
    name: str = "the model",
    blind_name: str = "the blind baseline",
) -> Comparison:
    """The evaluation (as B) minus a baseline that saw no image (as A).

    ``blind`` is the baseline, or whether it has each example id right, as ``summary.json`` keeps it.
    Raises RunError when the two are not over the same examples.
    """
    if isinstance(blind, BlindResult):
        blind_name, blind = blind.name, blind.correct_by_id
    by_id = _by_id(records, name)
    _check_same_ids(blind, by_id, blind_name, name)
    correct = {id: record.correct for id, record in by_id.items()}
    return _compare(by_id, blind, correct, cluster, blind_name, name)


def _compare(
    records: Mapping[str, EvalRecord],
    a_correct: Mapping[str, bool],
    b_correct: Mapping[str, bool],
    cluster: Cluster,
    a_name: str,
    b_name: str,
) -> Comparison:
    ids = list(records)
    clusters = [cluster_of(records[id], cluster) for id in ids]
    differences = [int(b_correct[id]) - int(a_correct[id]) for id in ids]
    only_a, only_b = differences.count(-1), differences.count(1)
    return Comparison(
        difference=clustered_bootstrap(differences, clusters),
        n=len(ids),
        n_clusters=len(set(clusters)),
        cluster=cluster,
        mcnemar_p=mcnemar_exact(only_a, only_b),
        a_accuracy=wilson(sum(a_correct[id] for id in ids), len(ids)),
        b_accuracy=wilson(sum(b_correct[id] for id in ids), len(ids)),
        only_a=only_a,
        only_b=only_b,
        a_name=a_name,
        b_name=b_name,
    )


def _by_id(records: Sequence[EvalRecord], name: str) -> dict[str, EvalRecord]:
    by_id = {record.id: record for record in records}
    if len(by_id) < len(records):
        seen: set[str] = set()
        repeated = [record.id for record in records if record.id in seen or seen.add(record.id)]
        raise RunError(f"{name} holds {_counted(repeated, len(records))} more than once; evaluate it anew")
    return by_id


def _check_same_ids(a: Mapping[str, Any], b: Mapping[str, Any], a_name: str, b_name: str) -> None:
    only_a, only_b = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
    if only_a or only_b:
        parts = [
            f"{_counted(ids, len(all_ids))} only in {name}"
            for ids, all_ids, name in ((only_a, a, a_name), (only_b, b, b_name))
            if ids
        ]
        raise RunError(
            f"{a_name} and {b_name} are over different examples: {'; '.join(parts)}. "
            "Evaluate both on the same store, to the end"
        )


def _content(record: EvalRecord) -> tuple[str, tuple[str, ...], str]:
    return record.question, record.options, record.target


def cluster_of(record: EvalRecord, cluster: Cluster) -> str:
    """What a record's answer is right or wrong together with. Raises RunError for an unknown patient."""
    if cluster == "image":
        return image_cluster(record.images) if record.images else record.id
    if record.patient is None:
        raise RunError(f"example {record.id} names no patient; compare by image instead")
    return f"{record.source}\0{record.patient}"  # "1" of two data sets is two patients


def _counted(ids: Sequence[str], total: int) -> str:
    shown = ", ".join(ids[:3]) + (", …" if len(ids) > 3 else "")
    return f"{len(ids)} of {total} examples ({shown})"
