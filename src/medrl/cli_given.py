"""What imports have in common at the edge: their options in one table, where pictures are found, what is printed."""

import inspect
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from medrl import stopping, terminal
from medrl.data.store_images import Names
from medrl.errors import DataError
from medrl.types import KINDS

if TYPE_CHECKING:
    from medrl.data.readers.pictures import Pictures
    from medrl.data.readers.result import ImportResult

imports = typer.Typer(
    help="""Read a data set into a store.

\b
Example:
  medrl import omnimedvqa OmniMedVQA --out data/omnimedvqa
  medrl import table questions.csv --images scans --out data/mine
""",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The options that imports share, as they were given; each command has those it names, see ``command``."""

    out: Annotated[Path, typer.Option(help="The store to write.")]
    images: Annotated[
        Path | None, typer.Option(help="Folder that image paths are relative to; default: the folder that is read.")
    ] = None
    split: Annotated[
        str | None, typer.Option(help="Only files with this in their name, e.g. test; for hub ids, the split.")
    ] = None
    mapping: Annotated[
        list[str] | None, typer.Option("--map", help="OURS=THEIRS, e.g. question=Frage; several times.")
    ] = None
    license: Annotated[str, typer.Option(help="License of the data, for store.json.")] = "not stated"
    modality: Annotated[list[str] | None, typer.Option(help="Only this modality; may be given several times.")] = None
    kind: Annotated[
        list[str] | None, typer.Option(help=f"Only questions of this kind ({', '.join(KINDS)}); several times.")
    ] = None
    copy: Annotated[
        bool,
        typer.Option(
            "--copy", help="Copy images into the store, without metadata, instead of linking to their folder."
        ),
    ] = False
    names: Annotated[
        Names,
        typer.Option(
            help="Image names in the store. digest: copied without metadata and named by a digest, since names of "
            "files and folders may be a patient's; keep: linked to under their own names."
        ),
    ] = "digest"
    window: Annotated[
        str,
        typer.Option(
            help="Window for CT and NIfTI: file, lung, mediastinum, abdomen, brain, bone, stroke; or three: a,b,c."
        ),
    ] = "file"
    plane: Annotated[Literal["axial", "coronal", "sagittal"], typer.Option(help="Plane of NIfTI slices.")] = "axial"
    slices: Annotated[
        str, typer.Option(help="Slices of volumes and multi-frame files: middle, uniform:3 or index:0,5.")
    ] = "middle"
    square: Annotated[
        int | None, typer.Option(min=8, help="Redraw every image as N x N pixels, as Med-R1's data was: 384.")
    ] = None
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every image now, not only its header and its end.")
    ] = False
    clean: Annotated[
        bool, typer.Option("--i-have-deidentified", help="You have checked that no text is burned into the pixels.")
    ] = False
    salt: Annotated[Path, typer.Option("--salt", help="File with the project's salt; made when there is none.")] = Path(
        ".medrl-salt"
    )
    keep_patients: Annotated[
        bool, typer.Option("--patients-are-pseudonyms", help="Keep the patient column as it is; default: hashed.")
    ] = False
    max_bad: Annotated[float, typer.Option(min=0, max=1, help="Largest share of bad rows to accept.")] = 0.001
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False


_ALL_HAVE = ("out", "max_bad", "as_json")
SCANS = ("window", "plane", "slices", "clean")
"""What is asked where scans may be among the pictures."""


def command(name: str, *shared: str, doc: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make ``work(own parameters, given)`` the command ``medrl import NAME`` with the fields ``shared`` of ``Given``.

    Args:
        doc: the help, where it is not the docstring of ``work``.
    """

    def register(work: Callable[..., None]) -> Callable[..., None]:
        own = [item for item in inspect.signature(work).parameters.values() if item.name != "given"]
        options = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=field.type,
            )
            for field in fields(Given)
            if field.name in (*_ALL_HAVE, *shared)
        ]

        def run(**values: Any) -> None:
            given = Given(**{option.name: values.pop(option.name) for option in options})
            work(**values, given=given)

        keyword_only = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in own]
        first = [item for item in keyword_only if item.default is inspect.Parameter.empty]
        others = [item for item in keyword_only if item.default is not inspect.Parameter.empty]
        run.__signature__ = inspect.Signature([*first, options[0], *others, *options[1:]])  # type: ignore[attr-defined]
        run.__doc__ = doc or work.__doc__
        imports.command(name)(run)
        return work

    return register


@contextmanager
def pictures_of(root: Path, given: Given, *, slices: str | None = None, **more: Any) -> "Iterator[Pictures]":
    """Where the images of an import are found; what it unpacks goes into a hidden folder that is gone afterwards."""
    from medrl.data.images import View
    from medrl.data.readers.pictures import Pictures
    from medrl.data.store import check_vacant

    check_vacant(given.out)  # before a hundred thousand questions are read
    unpack = given.out.absolute().parent / f".{given.out.name}.{uuid.uuid4().hex[:8]}.unpacked"
    with stopping.tidily():
        try:
            yield Pictures(
                root,
                unpack,
                view=View(window=given.window, plane=given.plane, slices=slices or given.slices),
                decode=given.decode,
                square_px=given.square,
                pixels_are_clean=given.clean,
                **more,
            )
        finally:
            shutil.rmtree(unpack, ignore_errors=True)


def finish(
    result: "ImportResult",
    pictures: "Pictures",
    given: Given,
    *,
    source: str,
    license: str,
    citation: str = "",
    filtered: bool = False,
    names: Names = "keep",
) -> None:
    """Refuse too many bad rows, write the store, print what was read and what was not."""
    from medrl.data import store
    from medrl.data.readers.result import check_bad

    if not filtered:
        result = result.only(given.modality or (), given.kind or ())
    bad = [{"file": str(row.file), "position": row.position, "reason": row.reason} for row in result.bad]
    try:
        check_bad(result, given.max_bad)
    except DataError:
        if given.as_json:
            terminal.print_json({"rows": 0, "bad": bad, "by_modality": {}, "by_question_type": {}})
        raise
    absent = sum(item.questions for item in result.absent)
    copied = given.copy or pictures.unpacked or names == "digest"
    extra = {"bad_rows": len(result.bad), "absent_questions": absent}
    info = store.write_store(
        given.out,
        result.examples,
        source=source,
        license=license,
        citation=citation,
        extra=extra,
        copy=copied,
        names=names,
    )
    kinds = dict(Counter(example.kind for example in result.examples).most_common())
    notes = [*result.notes, *pictures.notes()]
    if given.as_json:
        terminal.print_json(
            {
                "rows": info.rows,
                "bad": bad,
                "by_modality": info.modalities,
                "by_question_type": info.question_types,
                "by_kind": kinds,
                "images": info.images,
                "absent": [{"file": str(item.file), "questions": item.questions} for item in result.absent],
                "notes": notes,
            }
        )
        return
    terminal.print_table("By modality", ["modality", "questions"], list(info.modalities.items()))
    terminal.print_table("By question type", ["question type", "questions"], list(info.question_types.items()))
    for row in result.bad:
        typer.echo(f"bad: {row}")
    for item in result.absent:
        typer.echo(f"absent: {item.file}: the images of {item.questions} questions must be got from their owners")
    for note in notes:
        typer.echo(f"note: {note}")
    if set(kinds) - {"choice"}:
        typer.echo("kinds: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    where = "copied" if copied else "linked"
    typer.echo(f"{info.rows} questions on {info.images} images ({where}) in {given.out}; {len(bad)} bad rows left out")
    typer.echo(f"license: {info.license}")
