"""Which test items the report shows, and how: image, question, and what was written before and after."""

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medrl.data.images import open_image
from medrl.errors import ImageError
from medrl.report.tables import Evaluation
from medrl.rewards.kinds import choices_in
from medrl.types import LETTERS, EvalRecord

N_ITEMS = 24
IMAGE_SIZE_PX = 256
MAX_COMPLETION_CHARACTERS = 6000

RULE = (
    "Chosen without looking at them: within each kind the items are ordered by the SHA-256 of their id, and the kinds "
    f"take turns until {N_ITEMS} are found."
)

KINDS = {
    "fixed": "Wrong before, right after",
    "broken": "Right before, wrong after",
    "still_wrong": "Wrong both times",
    "right": "Right both times",
}
KINDS_OF_ONE = {"still_wrong": "Wrong", "right": "Right"}

_TAG = re.compile(r"</?(?:think|answer)>", re.IGNORECASE)


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


def choose_items(evaluations: Sequence[Evaluation]) -> list[Item]:
    """About 24 items of the first and the last of some evaluations over the same examples, grouped by kind."""
    first, last = evaluations[0], evaluations[-1]
    after = {record.id: record for record in last.records}
    headings = KINDS_OF_ONE if first is last else KINDS
    kinds: dict[str, list[EvalRecord]] = {kind: [] for kind in headings}
    for record in first.records:
        kinds[_kind(record.correct, after[record.id].correct)].append(record)
    queues = {kind: sorted(records, key=_draw) for kind, records in kinds.items()}
    return [
        _item(kind, headings[kind], record, after[record.id], evaluations)
        for kind, taken in _take_turns(queues, N_ITEMS).items()
        for record in taken
    ]


def embed_image(store: Path | None, name: str) -> Picture:
    """Read an image of a store, shrink it to 256 px and encode it anew: nothing of the file itself gets into the page.

    Whatever keeps it from being shown becomes the picture's ``problem``: a report does not fail over one image.
    """
    if store is None:
        return Picture(problem="the evaluation does not say where its images are")
    file = (store / name).resolve()
    if not file.is_relative_to(store.resolve()):
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


def _item(kind: str, heading: str, before: EvalRecord, after: EvalRecord, evaluations: Sequence[Evaluation]) -> Item:
    first, last = evaluations[0], evaluations[-1]
    store = first.summary.get("store")
    answered = [_answered(first.name, before)]
    if last is not first:
        answered.append(_answered(last.name, after))
    return Item(
        kind=kind,
        heading=heading,
        record=before,
        pictures=[embed_image(Path(store) if store else None, name) for name in before.images],
        options=[
            (letter, text, letter in choices_in(before.kind, before.target))
            for letter, text in zip(LETTERS, before.options, strict=False)
            if before.kind in ("choice", "multi_select")
        ],
        answered=answered,
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
    )
