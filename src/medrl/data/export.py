"""A store -> rows that other trainers read. Each format is one function in ``FORMATS``.

All carry the whole example in a field ``medrl``, so that reading the rows back gives the same store, and so that
``medrl.rewards.adapters`` can grade it there: it stands where the other trainer passes columns on to a reward.
"""

import base64
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medrl.data.clean import copy_picture, picture_bytes
from medrl.data.prompts import make_prompt
from medrl.data.store import load, read_info
from medrl.errors import DataError, SettingsError
from medrl.types import Example, Mode

_TYPES = {b"\xff\xd8\xff": "jpeg", b"RIFF": "webp"}
"""How a picture's bytes begin -> its type; all others are PNG."""
_MARK = "<image>"
_BATCH_ROWS = 64


@dataclass(frozen=True, slots=True)
class Asked:
    """One example as it is written out."""

    example: Example
    mode: Mode
    """The form of completion that the wording asks for."""
    text: str
    """The user's turn, in the wording that was chosen."""
    names: tuple[str, ...]
    """Images relative to the store, ``images/...``."""

    @property
    def own(self) -> str:
        """The example as JSON, all fields but the images; their names instead."""
        values = {name: value for name, value in asdict(self.example).items() if name != "images"}
        return json.dumps({**values, "image_names": self.names}, ensure_ascii=False)

    @property
    def marked(self) -> str:
        """The text with one mark per image before it."""
        return _MARK * len(self.names) + self.text


@dataclass(frozen=True, slots=True)
class Written:
    """What an export made."""

    folder: Path
    rows: int
    files: tuple[Path, ...]


def export_data(store: Path, to: str, out: Path, *, mode: Mode = "think", template: str | None = None) -> Written:
    """Write the store's rows as ``to`` reads them, into the new folder ``out``, which is whole or absent.

    Args:
        to: a key of ``FORMATS``.
        mode, template: the wording, see ``medrl.data.prompts``.

    Raises:
        SettingsError: an unknown format or wording.
        DataError: no store, or ``out`` is taken.
    """
    if to not in FORMATS:
        raise SettingsError(f"--to {to!r} is unknown; there are {', '.join(FORMATS)}")
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise DataError(f"{out} exists and is not empty: choose another --out, or remove it first")
    info, examples = read_info(store), load(store)
    asked = [
        Asked(
            example,
            mode,
            make_prompt(example, mode, template).text,
            tuple(image.relative_to(store).as_posix() for image in example.images),
        )
        for example in examples
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        draft.mkdir()
        FORMATS[to](asked, draft)
        about = {"format": to, "mode": mode, "template": template, "rows": len(asked), "source": info.source}
        about |= {"license": info.license, "citation": info.citation, "of": info.fingerprint}
        (draft / "medrl.export").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Written(out, len(asked), tuple(sorted(path for path in out.iterdir() if path.is_file())))


def _trl(asked: list[Asked], out: Path) -> None:
    """Parquet: ``prompt`` (messages), ``images`` (``datasets`` decodes them), ``solution``; all columns reach a reward.
    TRL's dataset_formats."""

    def row(item: Asked) -> dict[str, Any]:
        parts = [{"type": "image", "text": None} for _ in item.names] + [{"type": "text", "text": item.text}]
        turns = [{"role": "user", "content": parts}]
        return {"prompt": turns, "solution": item.example.target, "mode": item.mode, "medrl": item.own}

    message = {"role": "string", "content": [{"type": "string", "text": "string"}]}
    schema = {"prompt": [message], "solution": "string", "mode": "string", "medrl": "string"}
    _write_parquet(out / "data.parquet", asked, row, schema)


def _verl(asked: list[Asked], out: Path) -> None:
    """Parquet: ``data_source, prompt, images, ability, reward_model, extra_info``; a reward gets the first, the right
    answer and ``extra_info``. verl's prepare_data."""

    def row(item: Asked, index: int) -> dict[str, Any]:
        return {
            "data_source": item.example.source,
            "prompt": [{"role": "user", "content": item.marked}],
            "ability": item.example.question_type,
            "reward_model": {"style": "rule", "ground_truth": item.example.target},
            "extra_info": {"split": "", "index": index, "mode": item.mode, "medrl": item.own},  # all that rewards get
        }

    numbered = {id(item): number for number, item in enumerate(asked)}
    schema = {
        "data_source": "string",
        "prompt": [{"role": "string", "content": "string"}],
        "ability": "string",
        "reward_model": {"style": "string", "ground_truth": "string"},
        "extra_info": {"split": "string", "index": "int64", "mode": "string", "medrl": "string"},
    }
    _write_parquet(out / "data.parquet", asked, lambda item: row(item, numbered[id(item)]), schema)


def _easyr1(asked: list[Asked], out: Path) -> None:
    """JSON Lines: ``problem`` with ``<image>`` marks, ``answer``, ``images`` below ``image_dir``: this folder."""
    rows = ({"problem": x.marked, "answer": x.example.target, "images": x.names, "medrl": x.own} for x in asked)
    _write_lines(out, asked, rows)


def _swift(asked: list[Asked], out: Path) -> None:
    """JSON Lines: ``messages`` with ``<image>`` marks, ``images``, ``solution``. ms-swift's Custom-dataset."""
    rows = (
        {
            "messages": [{"role": "user", "content": x.marked}],
            "images": x.names,
            "solution": x.example.target,
            "medrl": x.own,
        }
        for x in asked
    )
    _write_lines(out, asked, rows)


def _llamafactory(asked: list[Asked], out: Path) -> None:
    """JSON: messages with an assistant's turn, ``images``; and ``dataset_info.json``. LLaMA-Factory's data/README."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": x.marked},
                {"role": "assistant", "content": f"<answer>{x.example.target}</answer>"},
            ],
            "images": x.names,
            "medrl": x.own,
        }
        for x in asked
    ]
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    entry = {"file_name": "data.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    _copy_images(asked, out)
    (out / "data.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "dataset_info.json").write_text(json.dumps({"medrl": entry}, indent=2) + "\n", encoding="utf-8")


def _openai(asked: list[Asked], out: Path) -> None:
    """JSON Lines of chat messages, pictures inside as data URIs; the answer and the example in ``metadata``."""

    def row(item: Asked) -> dict[str, Any]:
        urls = [_data_uri(path) for path in item.example.images]
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        parts.append({"type": "text", "text": item.text})
        metadata = {"solution": item.example.target, "medrl": item.own}
        return {"messages": [{"role": "user", "content": parts}], "metadata": metadata}

    _write_lines(out, (), map(row, asked))


FORMATS: dict[str, Callable[[list[Asked], Path], None]] = {
    "trl": _trl,
    "verl": _verl,
    "easyr1": _easyr1,
    "swift": _swift,
    "llamafactory": _llamafactory,
    "openai": _openai,
}


def _data_uri(path: Path) -> str:
    content = picture_bytes(path)
    kind = next((kind for magic, kind in _TYPES.items() if content.startswith(magic)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _bytes(item: Asked) -> list[dict[str, Any]]:
    pairs = zip(item.example.images, item.names, strict=True)
    return [{"bytes": picture_bytes(path), "path": name.removeprefix("images/")} for path, name in pairs]


def _copy_images(asked: Iterable[Asked], out: Path) -> None:
    for item in asked:
        for path, name in zip(item.example.images, item.names, strict=True):
            target = out / name
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                copy_picture(path, target)


def _write_lines(out: Path, asked: Iterable[Asked], rows: Iterable[dict[str, Any]]) -> None:
    _copy_images(asked, out)
    with (out / "data.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_parquet(
    path: Path, asked: list[Asked], row: Callable[[Asked], dict[str, Any]], schema: dict[str, Any]
) -> None:
    """Rows with their ``images``, a batch in memory at a time."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    features = datasets.Features({**_features(schema), "images": [datasets.Image()]})
    arrow = features.arrow_schema
    with pyarrow.parquet.ParquetWriter(path, arrow, compression="zstd") as writer:
        for batch in _batches(asked):
            rows = [{**row(item), "images": _bytes(item)} for item in batch]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=arrow))


def _features(schema: Any) -> Any:
    import datasets

    if isinstance(schema, dict):
        return {name: _features(value) for name, value in schema.items()}
    return [_features(schema[0])] if isinstance(schema, list) else datasets.Value(schema)


def _batches(asked: list[Asked]) -> Iterator[list[Asked]]:
    for start in range(0, len(asked), _BATCH_ROWS):
        yield asked[start : start + _BATCH_ROWS]
