"""Question-and-answer sets: VQA-RAD, PathVQA, SLAKE. Yes and no become ``yes_no``, all other answers a few words.

VQA-RAD: Lau et al., Scientific Data 2018; the public JSON: image_name, image_organ (HEAD, CHEST, ABD), question,
answer and more; hub ``flaviagiammarino/vqa-rad``: image, question, answer. Chests are X-rays, abdomens CT; heads are
CT or MRI.
PathVQA: He et al., arXiv 2003.10286; hub ``flaviagiammarino/path-vqa``: image, question, answer.
SLAKE: Liu et al., ISBI 2021, arXiv 2102.09542; hub ``BoKelvin/SLAKE``: train, validation and test.json with img_name,
question, answer, q_lang (en, zh), modality, answer_type (OPEN, CLOSED), content_type, qid; pictures in imgs/xmlab1/,
each beside a copy of its questions and its boxes. English excerpts of it have image, question and answer alone.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medrl.data.readers.fields import YES_NO, fields_of, normal, text, text_or
from medrl.data.readers.pictures import Pictures
from medrl.data.readers.result import ImportResult, collect
from medrl.data.readers.rows import Row, RowError, rows_of
from medrl.types import Example

_VQA_RAD_ORGANS = {"CHEST": "X-Ray", "ABD": "CT"}
_MODALITY_WORDS = {
    "CT": re.compile(r"\b(ct|cat scan|computed tomography)\b", re.IGNORECASE),
    "MRI": re.compile(r"\b(mri|mr|magnetic resonance|t1|t2|flair|dwi)\b", re.IGNORECASE),
    "X-Ray": re.compile(r"\b(x-?ray|cxr|radiograph|plain film)s?\b", re.IGNORECASE),
    "Ultrasound": re.compile(r"\b(ultrasound|sonogra\w+)\b", re.IGNORECASE),
}
_ASKS_MODALITY = re.compile(
    r"\bmodality\b|\bimaging (type|method|technique)\b"
    r"|\b(type|kind|sort|method|technique) of (imag\w+|scan|study|picture)\b",
    re.IGNORECASE,
)
_ASKS_WHETHER = re.compile(r"\s*(is|was) (this|it|the (above )?(image|scan|study|picture))\b", re.IGNORECASE)
LANGUAGES = ("en", "zh")
_CHINESE_PAIRS = (
    ("是", "否"),
    ("是", "不是"),
    ("是的", "不是"),
    ("是的", "不是的"),
    ("有", "没有"),
    ("会", "不会"),
    ("能", "不能"),
)
"""Yes and no in Chinese; of pairs that share a word, the first is offered."""
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_SLAKE_APART = ("imgs", "KG")
_SLAKE_MODALITIES = {"X-Ray": "X-Ray", "CT": "CT", "MRI": "MRI"}


def read_vqa_rad(path: Path, pictures: Pictures, *, split: str | None = None, quiet: bool = True) -> ImportResult:
    """VQA-RAD from Parquet or JSON files, a folder of them, or a hub id.

    Raises:
        DataError: there is nothing to read.
    """
    result = _read_pairs(path, pictures, "VQA-RAD", "unknown", split, quiet)
    said = _modalities_said(result.examples)
    known = [
        replace(row, modality=said.get(row.images, "unknown")) if row.modality == "unknown" else row
        for row in result.examples
    ]
    return replace(result, examples=known)


def _modalities_said(examples: Sequence[Example]) -> dict[tuple[Path, ...], str]:
    """Modality of each picture on which the questions that ask for it agree."""
    said: dict[tuple[Path, ...], set[str]] = defaultdict(set)
    for row in examples:
        if row.kind == "yes_no":
            words = row.question if row.target == "yes" and _ASKS_WHETHER.match(row.question) else ""
        else:
            words = row.target if _ASKS_MODALITY.search(row.question) else ""
        named = [modality for modality, pattern in _MODALITY_WORDS.items() if pattern.search(words)]
        if len(named) == 1:
            said[row.images].update(named)
    return {images: modalities.pop() for images, modalities in said.items() if len(modalities) == 1}


def read_path_vqa(path: Path, pictures: Pictures, *, split: str | None = None, quiet: bool = True) -> ImportResult:
    """PathVQA from Parquet or JSON files, a folder of them, or a hub id.

    Raises:
        DataError: there is nothing to read.
    """
    return _read_pairs(path, pictures, "PathVQA", "Pathology", split, quiet)


def read_slake(
    path: Path,
    pictures: Pictures,
    *,
    split: str | None = None,
    languages: tuple[str, ...] = LANGUAGES,
    quiet: bool = True,
) -> ImportResult:
    """SLAKE from its folder, or from one of its JSON files; only questions in ``languages``.

    Raises:
        DataError: there is nothing to read.
    """

    def convert(row: Row) -> Example | None:
        example, language = _slake(row, pictures)
        return example if language in languages else None

    return collect(rows_of(path, "SLAKE", split, apart=_SLAKE_APART), convert, quiet=quiet)


def _read_pairs(
    path: Path, pictures: Pictures, source: str, modality: str, split: str | None, quiet: bool
) -> ImportResult:
    return collect(rows_of(path, source, split), lambda row: _pair(row, pictures, source, modality), quiet=quiet)


def _pair(place: Row, pictures: Pictures, source: str, modality: str) -> Example:
    row = fields_of(place.value)
    image = next((row[name] for name in ("image", "image_name", "image_path") if row.get(name)), None)
    if image is None:
        raise RowError("missing field image")
    return Example(
        id=place.id,
        source=source,
        images=pictures.find(image),
        question=text(row, "question"),
        options=(),
        modality=_VQA_RAD_ORGANS.get(text_or(row, "", "image_organ").upper(), modality),
        question_type=text_or(row, "unknown", "question_type"),
        **_answer(text(row, "answer")),
    )


def _slake(place: Row, pictures: Pictures) -> tuple[Example, str]:
    row = fields_of(place.value)
    language = text_or(row, "zh" if _CHINESE.search(text(row, "question")) else "en", "q_lang")
    if language not in LANGUAGES:
        raise RowError(f"q_lang is {language!r}; SLAKE is in {' and '.join(LANGUAGES)}")
    kind = text_or(row, "CLOSED", "answer_type").upper()
    if kind not in ("OPEN", "CLOSED"):
        raise RowError(f"answer_type is {row['answer_type']!r}; it must be OPEN or CLOSED")
    modality = text_or(row, "unknown", "modality")
    example = Example(
        id=f"{place.name}/{text_or(row, str(place.position), 'qid')}",
        source="SLAKE",
        images=pictures.find(row.get("img_name") or row.get("image")),
        question=text(row, "question"),
        modality=_SLAKE_MODALITIES.get(modality, modality),
        question_type=text_or(row, "unknown", "content_type"),
        **{"options": (), **_answer(text(row, "answer"), closed=kind == "CLOSED")},
    )
    return example, language


def _answer(answer: str, closed: bool = True) -> dict[str, Any]:
    """Kind and target; for yes or no in Chinese also the two options, since graders know only the English words."""
    plain = normal(answer).casefold().rstrip(".")
    if closed and plain in YES_NO:
        return {"kind": "yes_no", "target": plain}
    pair = next((pair for pair in _CHINESE_PAIRS if closed and answer in pair), None)
    if pair:
        return {"kind": "choice", "options": pair, "target": "AB"[pair.index(answer)]}
    return {"kind": "short", "target": answer}
