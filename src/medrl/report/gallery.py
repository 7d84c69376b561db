"""Which test items the report shows, and how: image, question, and what every evaluation wrote, side by side."""

import base64
import hashlib
import io
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medrl.data.images import open_image
from medrl.errors import ImageError
from medrl.report.tables import FAILURES, Evaluation, failure
from medrl.rewards.kinds import choices_in
from medrl.types import LETTERS, EvalRecord

N_ITEMS, N_EXTREMES, N_PER_DOMAIN = 24, 4, 2
IMAGE_SIZE_PX = 256
MAX_COMPLETION_CHARACTERS = 6000

RULE = (
    "Chosen without looking at them: within each kind the items are ordered by the SHA-256 of their id, and the kinds "
    f"take turns until {N_ITEMS} are found. Then come the {N_EXTREMES} with the shortest and the {N_EXTREMES} with the "
    f"longest reasoning, and as many as it takes for {N_PER_DOMAIN} of every domain."
)

KINDS = {
    "fixed": "Wrong before, right after",
    "broken": "Right before, wrong after",
    "still_wrong": "Wrong both times",
    "right": "Right both times",
}
KINDS_OF_ONE = {"still_wrong": "Wrong", "right": "Right"}

SHORTEST, LONGEST = "Shortest reasoning", "Longest reasoning"
MORE = "More, so that every domain is shown"

_TAG = re.compile(r"</?(?:think|answer)>", re.IGNORECASE)
_THINK = re.compile(r"<think>(.*?)(?:</think>|$)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image as a data URI, or the reason why there is none."""

    uri: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One completion of an item, with the name of its evaluation."""

    evaluation: str
    record: EvalRecord
    pieces: list[tuple[bool, str]]
    """The text in order: (whether it is a think or answer tag, the text)."""
    cut_characters: int
    failure: str | None
    """Kind of failure; None for a right answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One test item as the gallery shows it."""

    kind: str
    heading: str
    record: EvalRecord
    pictures: list[Picture]
    options: list[tuple[str, str, bool]]
    """(letter, text, whether it is right), where the question asks for letters."""
    answered: list[Answered]
    """One per evaluation, in their order."""

    @property
    def last(self) -> Answered:
        """What the filters go by."""
        return self.answered[-1]

    @property
    def reasoning_characters(self) -> int:
        """Of the last evaluation's."""
        return reasoning_characters(self.last.record)


def choose_items(evaluations: Sequence[Evaluation]) -> list[Item]:
    """Some forty items that evaluations over the same examples answered, under their headings; see ``RULE``.

    What has changed is told by the first evaluation and the last.
    """
    first, last = evaluations[0], evaluations[-1]
    after = {record.id: record for record in last.records}
    headings = KINDS_OF_ONE if first is last else KINDS
    kinds: dict[str, list[EvalRecord]] = {kind: [] for kind in headings}
    for record in first.records:
        kinds[_kind(record.correct, after[record.id].correct)].append(record)
    queues = {kind: sorted(records, key=_draw) for kind, records in kinds.items()}
    chosen = {
        record.id: headings[kind]
        for kind, taken in _take_turns(queues, N_ITEMS).items()
        for record in sorted(taken, key=_draw)
    }
    reasoned = sorted(
        (r for r in last.records if reasoning_characters(r)), key=lambda r: (reasoning_characters(r), r.id)
    )
    for heading, records in ((SHORTEST, reasoned), (LONGEST, reasoned[::-1])):
        for record in [record for record in records if record.id not in chosen][:N_EXTREMES]:
            chosen[record.id] = heading
    for field in ("modality", "question_type"):
        for record in _missing_of_domains(first.records, chosen, field):
            chosen[record.id] = MORE
    by_id = [{record.id: record for record in evaluation.records} for evaluation in evaluations]
    return [
        _item(
            _kind(by_id[0][id].correct, by_id[-1][id].correct), heading, [records[id] for records in by_id], evaluations
        )
        for id, heading in chosen.items()
    ]


def by_heading(items: Iterable[Item]) -> dict[str, list[Item]]:
    """Heading -> its items, in their order."""
    headings: dict[str, list[Item]] = {}
    for item in items:
        headings.setdefault(item.heading, []).append(item)
    return headings


def filters(items: Sequence[Item]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(attribute of an item, label, [(value, text), ...]) of each choice that the script offers."""
    kinds = KINDS if len(items[0].answered) > 1 else {}
    failures = [name for name in FAILURES if any(item.last.failure == name for item in items)]
    choices = [
        ("modality", "Modality", [(name, name) for name in sorted({item.record.modality for item in items})]),
        ("question", "Question type", [(name, name) for name in sorted({item.record.question_type for item in items})]),
        ("verdict", "Verdict", [("right", "right"), ("wrong", "wrong"), *((name, name) for name in failures)]),
        ("kind", "Changed by training", list(kinds.items())),
    ]
    return [choice for choice in choices if choice[2]]


def _missing_of_domains(records: Sequence[EvalRecord], chosen: Collection[str], field: str) -> list[EvalRecord]:
    """What lacks to show ``N_PER_DOMAIN`` of every domain."""
    counts = Counter(getattr(record, field) for record in records if record.id in chosen)
    missing = []
    for record in sorted(records, key=_draw):
        domain = getattr(record, field)
        if record.id not in chosen and counts[domain] < N_PER_DOMAIN:
            counts[domain] += 1
            missing.append(record)
    return missing


def reasoning_characters(record: EvalRecord) -> int:
    """Length of what stands between the think tags; 0 where there are none."""
    found = _THINK.search(record.completion)
    return len(found[1].strip()) if found else 0


def embed_image(store: Path | None, name: str) -> Picture:
    """Read an image of a store, shrink it to 256 px and encode it anew: nothing of the file itself gets into the page.

    Whatever keeps it from being shown becomes the picture's ``problem``: a report does not fail over one image.
    """
    if store is None:
        return Picture(problem="the evaluation does not say where its images are")
    file = (store / name).resolve()
    # A store may link images/ to the folder where its pictures lie.
    if not any(file.is_relative_to(root.resolve()) for root in (store, store / "images")):
        return Picture(problem="the image lies outside its store")
    if not file.is_file():
        return Picture(problem="the image is no longer in its store")
    try:
        small = open_image(file)  # the picture the model saw: same orientation, same gray levels
    except ImageError as error:
        return Picture(problem=f"the image cannot be shown: {error}")
    small.thumbnail((IMAGE_SIZE_PX, IMAGE_SIZE_PX))
    data = io.BytesIO()
    small.save(data, format="JPEG", quality=85, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
    return Picture(uri=uri, width=small.width, height=small.height)


def _kind(before: bool, after: bool) -> str:
    if before:
        return "right" if after else "broken"
    return "fixed" if after else "still_wrong"


def _draw(record: EvalRecord) -> str:
    return hashlib.sha256(record.id.encode("utf-8", "surrogatepass")).hexdigest()


def _take_turns(queues: dict[str, list[EvalRecord]], total: int) -> dict[str, list[EvalRecord]]:
    """One from each queue in turn until there are enough or none are left."""
    taken: dict[str, list[EvalRecord]] = {kind: [] for kind in queues}
    for turn in range(total):
        for kind, queue in queues.items():
            if turn < len(queue) and sum(map(len, taken.values())) < total:
                taken[kind].append(queue[turn])
    return taken


def _item(kind: str, heading: str, records: Sequence[EvalRecord], evaluations: Sequence[Evaluation]) -> Item:
    asked, store = records[0], evaluations[0].summary.get("store")
    return Item(
        kind=kind,
        heading=heading,
        record=asked,
        pictures=[embed_image(Path(store) if store else None, name) for name in asked.images],
        options=[
            (letter, text, letter in choices_in(asked.kind, asked.target))
            for letter, text in zip(LETTERS, asked.options, strict=False)
            if asked.kind in ("choice", "multi_select")
        ],
        answered=[_answered(evaluation.name, record) for evaluation, record in zip(evaluations, records, strict=True)],
    )


def _answered(evaluation: str, record: EvalRecord) -> Answered:
    text = record.completion[:MAX_COMPLETION_CHARACTERS]
    pieces, position = [], 0
    for tag in _TAG.finditer(text):
        pieces += [(False, text[position : tag.start()]), (True, tag.group())]
        position = tag.end()
    pieces.append((False, text[position:]))
    return Answered(
        evaluation=evaluation,
        record=record,
        pieces=[(is_tag, piece) for is_tag, piece in pieces if piece],
        cut_characters=len(record.completion) - len(text),
        failure=failure(record),
    )
