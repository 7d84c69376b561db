"""One store -> a train and a test store per domain, all of them or none."""

import re
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medrl.data.splits import By, KeepTogether, split_examples
from medrl.data.store import load, read_info, write_store
from medrl.errors import DataError
from medrl.types import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPart:
    """What one domain got."""

    domain: str
    folder: Path
    """Holds ``train`` and ``test``; one of them is missing when the domain could not be divided."""
    train_rows: int
    test_rows: int


def split_store(
    source: Path,
    out: Path,
    *,
    by: By | None = None,
    keep_together: KeepTogether = "image",
    test_fraction: float = 0.2,
    seed: int = 0,
) -> list[SplitPart]:
    """Divide the store ``source`` into ``out/<domain>/train`` and ``out/<domain>/test``; without ``by``, ``out/train``
    and ``out/test``.

    Everything is written beside ``out`` and renamed at the end, so ``out`` is whole or absent.

    Raises:
        DataError: no store, ``out`` is taken, two domains need one folder name, or what ``split_examples`` raises.
        SettingsError: an argument that cannot mean anything.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not empty: choose another --out, or remove it first")
    info = read_info(source)
    divided = split_examples(load(source), test_fraction=test_fraction, seed=seed, keep_together=keep_together, by=by)
    names = {domain: folder_name(domain) if by else "" for domain in divided}
    if len({name.casefold() for name in names.values()}) < len(names):
        raise DataError(f"two domains need the same folder name: {', '.join(sorted(names))}; rename one in the source")
    facts = {"of": info.fingerprint, "by": by, "keep_together": keep_together, "test": test_fraction, "seed": seed}
    draft = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        for domain, sides in divided.items():
            for side, examples in zip(("train", "test"), sides, strict=True):
                extra = {**info.extra, "split": {**facts, "domain": domain, "side": side}}
                _write(draft / names[domain] / side, examples, info.source, info.license, info.citation, extra)
        if out.exists():
            out.rmdir()
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return [
        SplitPart(domain=domain, folder=out / names[domain], train_rows=len(train), test_rows=len(test))
        for domain, (train, test) in divided.items()
    ]


def folder_name(domain: str) -> str:
    """A domain's name as a folder: blanks, ``&`` and brackets stay, what file systems refuse becomes ``_``."""
    name = re.sub(r'[\x00-\x1f\x7f\\/:*?"<>|]', "_", domain).strip()
    return re.sub(r"^\.|\.$", "_", name) or "_"


def _write(
    out: Path, examples: Sequence[Example], source: str, license: str, citation: str, extra: dict[str, object]
) -> None:
    if examples:
        write_store(out, examples, source=source, license=license, citation=citation, extra=extra)
