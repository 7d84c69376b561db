"""One store -> a train and a test store per domain, all of them or none."""

import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from medrl.data.resample import Resampled, resample_distractors
from medrl.data.splits import By, KeepTogether, slug, split_examples
from medrl.data.store import load, read_info, write_store
from medrl.errors import DataError
from medrl.types import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPart:
    """What one domain got."""

    domain: str
    """As its folder is named."""
    folder: Path
    """Holds ``train`` and ``test``; one of them is missing when the domain could not be divided."""
    train_rows: int
    test_rows: int
    resampled: Resampled | None = None


def split_store(
    source: Path,
    out: Path,
    *,
    by: By | None = None,
    keep_together: KeepTogether = "image",
    test_fraction: float = 0.2,
    seed: int = 0,
    train_size: int | None = None,
    test_size: int | None = None,
    trained: Sequence[str] = (),
    tested: Sequence[str] = (),
    resample: bool = False,
    drop_unbalanced: bool = False,
    measure: Callable[[list[Example], list[Example]], dict[str, Any]] | None = None,
    quiet: bool = True,
) -> list[SplitPart]:
    """Divide the store ``source`` into ``out/<domain>/train`` and ``out/<domain>/test``, domains named by ``slug``.

    Everything is written beside ``out`` and renamed at the end, so ``out`` is whole or absent. Where ``source`` links
    to its images the new stores do, to the same ones; else each has copies.

    Args:
        resample, drop_unbalanced: rebuild the options of each side from its right answers; see
            ``resample.resample_distractors``.
        measure: what is kept in the test store as ``blind_before_resampling``, from train and test with old options.
        others: as ``split_examples``.

    Raises:
        DataError: no store, ``out`` is taken, two domains need one folder name, or what ``split_examples`` raises.
        SettingsError: an argument that cannot mean anything.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not empty: choose another --out, or remove it first")
    info = read_info(source)
    linked = (source / "images").is_symlink()
    divided = split_examples(
        _in_place(source) if linked else load(source),
        test_fraction=test_fraction,
        seed=seed,
        keep_together=keep_together,
        by=by,
        train_size=train_size,
        test_size=test_size,
        trained=trained,
        tested=tested,
        quiet=quiet,
    )
    names = {domain: slug(domain) for domain in divided}
    if len(set(names.values())) < len(names):
        raise DataError(f"two domains need the same folder name: {', '.join(sorted(names))}; rename one in the source")
    facts = {
        "of": info.fingerprint,
        "by": by,
        "keep_together": keep_together,
        "test": test_fraction,
        "seed": seed,
        "train_size": train_size,
        "test_size": test_size,
        **({"trained": list(trained), "tested": list(tested)} if trained or tested else {}),
    }
    parts = []
    draft = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        for domain, (train, test) in divided.items():
            counts, rows = Resampled(), {"train": 0, "test": 0}
            before = measure(train, test) if resample and measure and train and test else None
            for side, examples in (("train", train), ("test", test)):
                extra: dict[str, object] = {**info.extra, "split": {**facts, "domain": domain, "side": side}}
                if resample and examples:
                    examples, resampled = resample_distractors(examples, seed=seed, drop_unbalanced=drop_unbalanced)
                    extra["resampled_distractors"] = asdict(resampled)
                    if before and side == "test":
                        extra["blind_before_resampling"] = before
                    counts += resampled
                rows[side] = len(examples)
                if examples:
                    write_store(
                        draft / names[domain] / side,
                        examples,
                        source=info.source,
                        license=info.license,
                        citation=info.citation,
                        extra=extra,
                        copy=not linked,
                    )
            parts.append(
                SplitPart(
                    domain=names[domain],
                    folder=out / names[domain],
                    train_rows=rows["train"],
                    test_rows=rows["test"],
                    resampled=counts if resample else None,
                )
            )
        if out.exists():
            out.rmdir()
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return parts


def _in_place(source: Path) -> list[Example]:
    """The examples of a linked store, with images where the link leads: the store itself may go."""
    link = source / "images"
    folder = link.resolve()
    return [
        replace(row, images=tuple(folder / image.relative_to(link) for image in row.images)) for row in load(source)
    ]
