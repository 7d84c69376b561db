"""Rows in the formats of other trainers: TRL, verl, EasyR1, ms-swift, LLaMA-Factory, OpenAI chat.

All are read by one function: they differ in where the user's turn, the pictures and the answer stand. What
``medrl export-data`` wrote carries the example itself in a field ``medrl`` and is taken from there; anybody else's
question and options are read out of the text.
"""

import json
import re
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Any

from medrl.data.prompts import TEMPLATES
from medrl.data.readers.fields import answer_text, fields_of, option_list, reasoning_text, text, text_or
from medrl.data.readers.inline import split_inline
from medrl.data.readers.pictures import Pictures
from medrl.data.readers.result import ImportResult, collect
from medrl.data.readers.rows import Row, RowError, rows_of
from medrl.data.readers.tables import LETTER, answer_form
from medrl.data.store_rows import find_problem
from medrl.errors import DataError
from medrl.types import Example

IMAGE_MARK = "<image>"
OWN_FIELD = "medrl"
_QUESTIONS = ("prompt", "messages", "conversations", "problem", "question", "query", "instruction")
_ANSWERS = ("solution", "answer", "ground_truth", "target", "response", "output")
_LISTS = ("options", "references")
_HOLDERS = ("extra_info", "metadata")
"""Objects in which a format keeps what it does not know."""
_INSTRUCTION = re.compile(
    r"\s*\b(?:you first think|you should first|(?:first,? )?(?:think|output|provide|put|answer|write)|please"
    r"|let'?s think|solve|your task)\b(?=.*(?:<think>|<answer>|\\boxed|option'?s letter|step by step)).*\Z",
    re.DOTALL | re.IGNORECASE,
)
"""How to answer, as trainers' recipes write it behind the question; it is no part of the last option."""


def read_trainer_rows(path: Path, pictures: Pictures, *, split: str | None = None, quiet: bool = True) -> ImportResult:
    """Rows that another trainer reads: a file, a folder of files, or a hub id.

    Raises:
        DataError: there is nothing to read.
    """
    if path.is_dir() and (path / "dataset_info.json").is_file():  # LLaMA-Factory's table of contents holds no rows
        path = path / _llama_factory_file(path)
    return collect(rows_of(path, "rows", split), lambda row: _trainer_row(row, pictures), quiet=quiet)


def _llama_factory_file(folder: Path) -> str:
    """The one file that the folder's table of contents names and that is there."""
    try:
        contents = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
        entries = contents.values()
        names = {PurePosixPath(entry["file_name"]).name for entry in entries if "file_name" in entry}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder / 'dataset_info.json'} is no table of contents ({error}): give one of its files"
        ) from error
    here = sorted(name for name in names if (folder / name).is_file())
    if len(here) != 1:
        raise DataError(
            f"{folder / 'dataset_info.json'} names {len(here)} files that are there ({', '.join(here[:8])}): "
            "give one of them"
        )
    return here[0]


def _trainer_row(place: Row, pictures: Pictures) -> Example:
    row = fields_of(place.value)
    if isinstance(row.get("body"), dict):  # a request of OpenAI's batch files
        row = {**row, **row["body"]}
    turns = _turns(row)
    said, shown = _content(turns["user"])
    cells = row.get("images") or row.get("image") or shown
    own = _own(row)
    if own is not None:
        names = own.pop("image_names", [])
        images = tuple(path for cell, name in _named(cells, names) for path in pictures.find(_with_name(cell, name)))
        return Example(**own, images=images)
    question = _bare(said)
    answer = _answer(row, turns)
    said_back = _content(turns["assistant"])[0] if turns.get("assistant") is not None else ""
    options: tuple[str, ...] = ()
    if row.get("options"):
        options = option_list(row["options"])
    else:
        try:
            question, options = split_inline(question)
            options = (*options[:-1], _INSTRUCTION.sub("", options[-1]) or options[-1])
        except RowError as error:
            if "more than one way" in str(error) or LETTER.fullmatch(answer_text(answer)):
                raise
    return Example(
        id=text_or(row, place.id, "id", "question_id"),
        source=text_or(row, place.file.stem, "data_source", "source", "dataset"),
        images=pictures.find(cells) if cells else (),
        question=question,
        modality=text_or(row, "unknown", "modality"),
        question_type=text_or(row, "unknown", "question_type"),
        rationale=text_or(row, "", "rationale") or reasoning_text(f"{said_back}\n{answer}"),
        **answer_form(options, [answer_text(answer)]),
    )


def _turns(row: dict[str, Any]) -> dict[str, Any]:
    """What the user says last, and what the assistant answers, if the row has that."""
    talk = next((row[name] for name in _QUESTIONS if row.get(name)), None)
    if isinstance(talk, str):
        return {"user": f"{talk}\n{row['input']}" if row.get("input") and row.get("instruction") else talk}
    if not isinstance(talk, list):
        raise RowError("missing field prompt, messages or problem")
    turns: dict[str, Any] = {}
    for message in [*talk, *(row.get("completion") or [])]:
        if not isinstance(message, dict):
            raise RowError(f"a message is a {type(message).__name__}, not an object with role and content")
        role = {"human": "user", "gpt": "assistant"}.get(who := str(message.get("role") or message.get("from")), who)
        turns[role] = message.get("content") if message.get("content") is not None else message.get("value")
    if "user" not in turns:
        raise RowError("no message is the user's")
    return turns


def _content(content: Any) -> tuple[str, list[Any]]:
    """Text and pictures of a message whose content is a string or a list of parts."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise RowError(f"a message's content is {content!r}, neither text nor a list of parts")
    texts, shown = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text", "output_text"):
            texts.append(str(part.get("text") or ""))
        elif kind in ("image_url", "input_image"):
            shown.append(part.get("image_url"))
        elif kind == "image" and part.get("image") is not None:
            shown.append(part["image"])
        elif kind != "image":
            raise RowError(f"a part of a message is {str(part)[:60]!r}; medrl reads text, image and image_url")
    return "\n".join(texts), shown


def _answer(row: dict[str, Any], turns: dict[str, Any]) -> str:
    """The right answer as it is written, with the reasoning that may stand before it."""
    reward = row.get("reward_model")
    if isinstance(reward, dict) and reward.get("ground_truth") is not None:
        return text(reward, "ground_truth")
    holders = [row, *(row[name] for name in _HOLDERS if isinstance(row.get(name), dict))]
    for holder in holders:
        if any(holder.get(name) is not None for name in _ANSWERS):
            return text(holder, *_ANSWERS)
    if turns.get("assistant") is not None:
        return _content(turns["assistant"])[0]
    raise RowError(f"missing field {' or '.join(_ANSWERS)}, and no message is the assistant's")


def _bare(said: str) -> str:
    """The user's text without marks for images and without a template's wording around the question."""
    said = said.replace(IMAGE_MARK, "").strip()
    for template in TEMPLATES.values():
        before, _, after = template.text.partition("{question}")
        if (before or after) and said.startswith(before.strip()) and said.endswith(after.strip()):
            return said.removeprefix(before.strip()).removesuffix(after.strip()).strip()
    return said


def _own(row: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of the example that an export of ours carries, checked; None in anybody else's rows."""
    holders = [row, *(row[name] for name in _HOLDERS if isinstance(row.get(name), dict))]
    written = next((holder[OWN_FIELD] for holder in holders if isinstance(holder.get(OWN_FIELD), str)), None)
    if written is None:
        return None
    try:
        own = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise RowError(f"field {OWN_FIELD} is not JSON: {error}") from error
    known = {field.name for field in fields(Example)} - {"images"} | {"image_names"}
    if not isinstance(own, dict) or not own.keys() <= known:
        raise RowError(f"field {OWN_FIELD} is not what medrl writes there")
    for name in (*_LISTS, "image_names"):
        items = own.setdefault(name, [])
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise RowError(f"field {OWN_FIELD}: {name} is {own[name]!r}")
    own |= {name: tuple(own[name]) for name in _LISTS}
    texts = {name: value for name, value in own.items() if name not in (*_LISTS, "image_names") and value is not None}
    if (
        not all(isinstance(value, str) for value in texts.values())
        or not {"id", "source", "question", "target"} <= texts.keys()
    ):
        raise RowError(f"field {OWN_FIELD} lacks text for id, source, question or target")
    if problem := find_problem(own.get("kind", "choice"), own["options"], own["target"]):
        raise RowError(f"field {OWN_FIELD} has {problem}")
    return own


def _named(cells: Any, names: list[str]) -> list[tuple[Any, str | None]]:
    cells = cells if isinstance(cells, list | tuple) else [cells] if cells else []
    return [(cell, names[i] if i < len(names) else None) for i, cell in enumerate(cells)]


def _with_name(cell: Any, name: str | None) -> Any:
    """Bytes and data URIs get the name that the picture had; paths already have theirs."""
    if name is None or (isinstance(cell, str) and not cell.startswith("data:")):
        return cell
    name = name.removeprefix("images/")
    return {**cell, "name": name} if isinstance(cell, dict) else {"url": cell, "name": name}
