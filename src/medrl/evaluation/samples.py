"""Several completions of one question: the majority's answer, and pass@k without bias."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from medrl.evaluation.intervals import clustered_bootstrap
from medrl.rewards.pass_at_k import pass_at_k
from medrl.types import EvalRecord, Sample, image_cluster


def majority(samples: Sequence[Sample]) -> Sample:
    """The first sample with the answer that most of them give; of equally frequent answers, the one given first.

    Unreadable completions have no vote; where all are unreadable, the first stands for them.
    """
    answers = [sample.answer.casefold() for sample in samples if sample.answer is not None]
    if not answers:
        return samples[0]
    counts = Counter(answers)
    elected = max(dict.fromkeys(answers), key=lambda answer: counts[answer])
    return next(s for s in samples if s.answer is not None and s.answer.casefold() == elected)


def summarize_samples(records: Sequence[EvalRecord]) -> dict[str, Any]:
    """Figures of records with samples; empty for records without.

    ``samples``: how many per question. ``pass@k``: for k = 1, 2, 4, … and all, the mean over questions of
    `pass_at_k` with its 95 % bootstrap interval over images. ``agreement``: mean share of a question's samples that
    give the answer of the majority. The accuracy of such records is that of the majority.
    """
    sampled = [record for record in records if record.samples]
    if not sampled:
        return {}
    size = min(len(record.samples) for record in sampled)
    clusters = [image_cluster(record.images) if record.images else record.id for record in sampled]
    rights = [sum(sample.correct for sample in record.samples) for record in sampled]
    return {
        "samples": size,
        "pass@k": {
            str(k): clustered_bootstrap(
                [pass_at_k(len(record.samples), right, k) for record, right in zip(sampled, rights, strict=True)],
                clusters,
            ).as_dict()
            for k in _powers_of_two(size)
        },
        "agreement": sum(map(_agreement, sampled)) / len(sampled),
    }


def _powers_of_two(size: int) -> list[int]:
    """1, 2, 4, … up to ``size``, which is always among them."""
    return [*(2**power for power in range(size.bit_length()) if 2**power < size), size]


def _agreement(record: EvalRecord) -> float:
    same = [s.answer is not None and record.answer is not None and s.answer.casefold() == record.answer.casefold()
            for s in record.samples]  # fmt: skip
    return sum(same) / len(same)
