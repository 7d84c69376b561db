"""What every reader gives back: examples, and every row that could not be used, with its place and the reason."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from medrl.data.readers.rows import Row, RowError, Rows
from medrl.data.scan_files import scan_kind
from medrl.errors import DataError, ImageError, SettingsError
from medrl.progress import Progress
from medrl.types import KINDS, Example

_FIRST_ROWS = 10
_FEW_ROWS = 2000
"""Below this, reading is over before a bar is of use."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A question that could not be used."""

    file: Path
    position: int
    """Place in the file's list, from 0; -1 when it is the whole file."""
    reason: str

    def __str__(self) -> str:
        place = "the whole file" if self.position < 0 else f"row {self.position}"
        return f"{self.file}, {place}: {self.reason}"


@dataclass(frozen=True, slots=True)
class AbsentImages:
    """Questions whose images must be got from their owners and are not here: read, counted, and not bad."""

    file: Path
    questions: int


@dataclass(frozen=True, slots=True)
class ImportResult:
    """What was read, and what was not."""

    examples: list[Example]
    bad: list[BadRow]
    absent: list[AbsentImages] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What the user should know about the source, a sentence each."""

    def only(self, modalities: Sequence[str], kinds: Sequence[str]) -> "ImportResult":
        """The result without the examples that were not asked for; empty: all are.

        Raises:
            SettingsError: there is no such kind. DataError: nothing is left.
        """
        if not set(kinds) <= set(KINDS):
            raise SettingsError(f"--kind {', '.join(kinds)}: the kinds are {', '.join(KINDS)}")
        wanted = {name.casefold() for name in modalities}
        examples = [
            example
            for example in self.examples
            if (not wanted or example.modality.casefold() in wanted) and (not kinds or example.kind in kinds)
        ]
        if self.examples and not examples:
            there = sorted({example.modality for example in self.examples})
            raise DataError(f"no question is left by --modality and --kind; the modalities are {', '.join(there)}")
        return replace(self, examples=examples)


def collect(rows: Rows, convert: Callable[[Row], Example | None], *, quiet: bool = True) -> ImportResult:
    """Each row through ``convert``: an example, None where the row is not wanted, a RowError or ImageError where it is
    bad. An id that was met before is bad too.

    Args:
        quiet: no progress bar.
    """
    result = ImportResult([], [])
    ids: set[str] = set()
    with Progress(max(1, len(rows)), noun="row", quiet=quiet or len(rows) < _FEW_ROWS) as progress:
        for row in rows:
            try:
                if isinstance(row.value, RowError):
                    raise row.value
                example = convert(row)
                if example is not None and example.id in ids:
                    raise RowError(f"duplicate id {example.id!r}")
            except ImageError as error:
                # The name of a scan may be a patient's; file and position say which row it is.
                image = "image" if scan_kind(error.path) else f"image {error.path.name}"
                result.bad.append(BadRow(row.file, row.position, f"{image}: {error.reason}; {error.fix}"))
            except RowError as error:
                result.bad.append(BadRow(row.file, row.position, str(error)))
            else:
                if example is not None:
                    ids.add(example.id)
                    result.examples.append(example)
            progress.advance({})
    return result


def check_bad(result: ImportResult, max_bad_fraction: float = 0.001) -> None:
    """Pass when at most ``max_bad_fraction`` of the questions are bad; an unreadable file passes only at 1.0.

    Raises:
        DataError: too much is bad, and shows all bad rows; or nothing is left, and shows the first.
    """
    total = len(result.bad) + len(result.examples)
    if result.bad and not result.examples:
        shown = "\n".join(f"  {row}" for row in result.bad[:_FIRST_ROWS])
        more = f"\n  and {total - _FIRST_ROWS} more; --json lists all" if total > _FIRST_ROWS else ""
        unread = all(row.position < 0 for row in result.bad)
        what = "nothing can be read" if unread else f"none of the {total} rows can be used"
        raise DataError(f"{what}:\n{shown}{more}")
    whole_files = any(row.position < 0 for row in result.bad)
    fraction = 1.0 if whole_files else len(result.bad) / total if total else 0.0
    if fraction <= max_bad_fraction:
        return
    shown = "\n".join(f"  {row}" for row in result.bad)
    # The fraction to allow is rounded up, so that the advice works when it is followed.
    allowance = 1.0 if whole_files else min(1.0, max(0.05, (int(fraction * 100) + 1) / 100))
    raise DataError(
        f"{len(result.bad)} of {total} rows are bad, more than the {max_bad_fraction:.2%} allowed:\n{shown}\n"
        f"repair the source, or go on without them: --max-bad {allowance:g}"
    )
