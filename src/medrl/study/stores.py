"""The train and the test store of a study, made by whichever worker comes first."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medrl.data.demo import build_demo
from medrl.data.splits import split_examples
from medrl.data.store import StoreInfo, load, read_info, write_store
from medrl.errors import DataError, SettingsError
from medrl.study.claims import exclusive
from medrl.study.settings import StudyData
from medrl.types import Example

SIDES = ("train", "test")


@dataclass(frozen=True, slots=True)
class Stores:
    """Where the questions of a study lie."""

    train: Path
    test: Path


def prepare_stores(data: StudyData, out: Path, *, quiet: bool = False) -> Stores:
    """The stores of a study, made under ``out/data`` where they are not given as they are.

    Raises SettingsError when ``out/data`` was made from other data or settings, DataError for stores that are none or
    filters that keep nothing.
    """
    if data.train is not None and data.test is not None and not data.keep:
        for path in (data.train, data.test):
            read_info(path)
        return Stores(data.train, data.test)
    folder = out / "data"
    with exclusive(out / "claims" / "data"):
        if data.demo and not data.keep:
            build_demo(folder, train_images=data.train_images, test_images=data.test_images)
        else:
            _make(data, folder, quiet)
    return Stores(folder / "train", folder / "test")


def _make(data: StudyData, folder: Path, quiet: bool) -> None:
    if data.demo:
        build_demo(folder / "whole", train_images=data.train_images, test_images=data.test_images)
        sources = [folder / "whole" / side for side in SIDES]
    else:
        sources = [path for path in (data.store, data.train, data.test) if path is not None]
    infos = [read_info(source) for source in sources]
    facts = {"of": [info.fingerprint for info in infos], "settings": _settings_that_matter(data)}
    missing = [side for side in SIDES if not _made(folder / side, facts)]
    if not missing:
        return
    if len(sources) == 1:
        sides = _divide(_keep(load(sources[0]), data, sources[0]), data, quiet)
    else:
        sides = [_keep(load(source), data, source) for source in sources]
    for side, examples, info in zip(SIDES, sides, [infos[0], infos[-1]], strict=True):
        if side in missing:
            _write(folder / side, examples, info, {**facts, "side": side})


def _settings_that_matter(data: StudyData) -> dict[str, Any]:
    """What another division would differ in; not where the data lie."""
    return data.model_dump(mode="json", exclude={"train", "test", "store"})


def _made(folder: Path, facts: dict[str, Any]) -> bool:
    if not (folder / "store.json").exists():
        return False
    made_from = read_info(folder).extra.get("study", {})
    if {key: made_from.get(key) for key in facts} != facts:
        raise SettingsError(
            f"{folder} was made from other data or with other settings of data: choose another --out, or delete "
            f"{folder.parent}"
        )
    return True


def _keep(examples: list[Example], data: StudyData, source: Path) -> list[Example]:
    for column, wanted in data.keep.items():
        present = sorted({str(getattr(example, column)) for example in examples})
        unknown = [value for value in wanted if value not in present]
        if unknown:
            raise DataError(f"data.keep.{column} asks for {', '.join(unknown)}, but {source} has {', '.join(present)}")
        examples = [example for example in examples if getattr(example, column) in wanted]
    if not examples:
        raise DataError(f"no example of {source} passes all of data.keep: {', '.join(data.keep)}")
    return examples


def _divide(examples: list[Example], data: StudyData, quiet: bool) -> list[list[Example]]:
    """Train and test over all domains together; no picture of one domain's test lies in another's training."""
    divided = split_examples(
        examples,
        test_fraction=data.test_fraction,
        seed=data.seed,
        keep_together=data.keep_together,
        by=data.by,
        train_size=data.train_size,
        test_size=data.test_size,
        quiet=quiet,
    )
    kept = [{example.id for sides in divided.values() for example in sides[index]} for index in (0, 1)]
    return [[example for example in examples if example.id in ids] for ids in kept]


def _write(folder: Path, examples: list[Example], info: StoreInfo, facts: dict[str, Any]) -> None:
    if not examples:
        raise DataError(f"nothing is left for {folder}: every domain has too few pictures to be divided")
    write_store(
        folder,
        examples,
        source=info.source,
        license=info.license,
        citation=info.citation,
        extra={**info.extra, "study": facts},
        copy=False,  # a study of gigabytes of pictures need not hold them twice
    )
