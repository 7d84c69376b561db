"""One evaluation answered by several processes: each takes every n-th question and writes a folder of its own."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from medrl.errors import SettingsError
from medrl.runs import RECORDS, SHARDS

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Shard:
    """The ``index``-th of ``count`` processes, from 1."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise SettingsError(
                f"there is no shard {self.index}/{self.count}: shards of {self.count} are 1 to {self.count}"
            )

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Its part of ``items``; the parts of all shards are all items, each once."""
        return list(items[self.index - 1 :: self.count])

    def folder(self, out: Path) -> Path:
        """Where it writes within the evaluation folder ``out``."""
        return out / SHARDS / f"{self.index}-of-{self.count}"


def parse_shard(text: str) -> Shard:
    """``2/4`` -> the second of four. Raises ``SettingsError`` for anything else."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise SettingsError(f"the shard is {text!r}; give two numbers like 1/4, the first of four")
    return Shard(int(index), int(count))


def launched_shard() -> Shard | None:
    """This process's part under ``torchrun`` or ``accelerate launch``; None when it was started alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return Shard(int(os.environ["RANK"]) + 1, count) if count > 1 else None


def record_files(out: Path) -> list[Path]:
    """Every records file of an evaluation folder: its own, and those of its shards."""
    return [file for file in (out / RECORDS, *sorted(out.glob(f"{SHARDS}/*/{RECORDS}"))) if file.is_file()]
