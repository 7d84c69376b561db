"""``medrl import ...`` and ``medrl export-data``: each source into a store, a store into other trainers' rows."""

import functools
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from medrl import terminal
from medrl.data.readers.sources import SOURCES
from medrl.errors import DataError, SettingsError
from medrl.types import KINDS, Mode

if TYPE_CHECKING:
    from medrl.data.readers.pictures import Pictures
    from medrl.data.readers.result import ImportResult
    from medrl.data.readers.rows import Rows

imports = typer.Typer(help="Read a data set into a store.", no_args_is_help=True, rich_markup_mode=None)

Out = Annotated[Path, typer.Option(help="The store to write.")]
Images = Annotated[
    Path | None, typer.Option(help="Folder that image paths are relative to; default: the folder that is read.")
]
Copy = Annotated[
    bool, typer.Option("--copy", help="Copy images into the store, without metadata; default: link to their folder.")
]
MaxBad = Annotated[float, typer.Option(min=0, max=1, help="Share of bad rows that is put up with.")]
Modality = Annotated[list[str] | None, typer.Option(help="Only this modality; may be given several times.")]
Kind = Annotated[
    list[str] | None, typer.Option(help=f"Only questions of this kind ({', '.join(KINDS)}); several times.")
]
Decode = Annotated[bool, typer.Option("--decode", help="Decode every image now, not only its header and its end.")]
Split = Annotated[
    str | None, typer.Option(help="Only files with this in their name, e.g. test; for hub ids, the split.")
]
Window = Annotated[
    str,
    typer.Option(help="Of CT and NIfTI: file, lung, mediastinum, abdomen, brain, bone, stroke; or three: a,b,c."),
]
Plane = Annotated[Literal["axial", "coronal", "sagittal"], typer.Option(help="Of NIfTI volumes.")]
Slices = Annotated[str, typer.Option(help="Of volumes and multi-frame files: middle, uniform:3 or index:0,5.")]
SaltFile = Annotated[Path, typer.Option("--salt", help="File with the project's salt; made when there is none.")]
Clean = Annotated[
    bool, typer.Option("--i-have-deidentified", help="No text is burned into the pixels; you have looked.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


Path_ = Annotated[Path, typer.Argument(metavar="PATH", help="A file, a folder of files, or a hub id like owner/name.")]
Square = Annotated[
    int | None, typer.Option(min=8, help="Redraw every image as N x N pixels, as Med-R1's data was: 384.")
]


def _register(name: str) -> None:
    """Add the command of a source that is read from one path."""

    def command(
        path: Path_,
        out: Out,
        images: Images = None,
        split: Split = None,
        modality: Modality = None,
        kind: Kind = None,
        copy: Copy = False,
        square: Square = None,
        decode: Decode = False,
        max_bad: MaxBad = 0.001,
        as_json: Json = False,
    ) -> None:
        _read_source(name, path, out, images, modality, kind, copy, square, decode, max_bad, as_json, split=split)

    source = SOURCES[name]
    command.__doc__ = (
        f"Read {source.title} into a store.\n\nPrints counts; bad rows are listed with file, position and reason.\n\n"
        f"\b\nExample:\n  medrl import {name} {source.example} --out data/{name}"
    )
    imports.command(name)(command)


for _name in SOURCES:
    if _name != "slake":
        _register(_name)


@imports.command("slake")
def import_slake(
    path: Path_,
    out: Out,
    images: Images = None,
    split: Split = None,
    lang: Annotated[Literal["en", "zh", "all"], typer.Option(help="Language of the questions.")] = "all",
    modality: Modality = None,
    kind: Kind = None,
    copy: Copy = False,
    square: Square = None,
    decode: Decode = False,
    max_bad: MaxBad = 0.001,
    as_json: Json = False,
) -> None:
    """Read SLAKE into a store.

    \b
    Example:
      medrl import slake SLAKE --split test --lang en --out data/slake
    """
    more = {"split": split, "languages": ("en", "zh") if lang == "all" else (lang,)}
    _read_source("slake", path, out, images, modality, kind, copy, square, decode, max_bad, as_json, **more)


def _read_source(
    name: str,
    path: Path,
    out: Path,
    images: Path | None,
    modality: list[str] | None,
    kind: list[str] | None,
    copy: bool,
    square: int | None,
    decode: bool,
    max_bad: float,
    as_json: bool,
    **more: Any,
) -> None:
    source = SOURCES[name]
    root = images or (path if path.is_dir() else path.parent)
    with _pictures(root, out, decode=decode, square_px=square, folders=source.folders) as pictures:
        result = source.read(path, pictures, quiet=as_json, **more)
        terms = {"source": source.title, "license": source.license, "citation": source.citation}
        _finish(_only(result, modality, kind), out, pictures, copy, max_bad, as_json, **terms)


@imports.command("omnimedvqa")
def import_omnimedvqa(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Holds QA_information/ and Images/.")],
    out: Out,
    datasets: Annotated[list[str] | None, typer.Option(help="Only this data set; may be given several times.")] = None,
    modality: Modality = None,
    copy: Copy = False,
    decode: Decode = False,
    max_bad: MaxBad = 0.001,
    as_json: Json = False,
) -> None:
    """Read OmniMedVQA into a store.

    Or any folder in its layout. Prints counts by modality and question type; bad rows are listed with file, position
    and reason, and above --max-bad nothing is written.

    \b
    Example:
      medrl import omnimedvqa OmniMedVQA --out data/omnimedvqa
      medrl import omnimedvqa OmniMedVQA --datasets "Chest CT Scan" --modality CT --out data/chest-ct
    """
    from medrl.data import omnimedvqa

    with _pictures(folder, out, decode=decode) as pictures:
        result = omnimedvqa.read_omnimedvqa(
            folder, pictures, datasets=datasets or (), modalities=modality or (), quiet=as_json
        )
        terms = {"source": omnimedvqa.SOURCE, "license": omnimedvqa.LICENSE, "citation": omnimedvqa.CITATION}
        _finish(result, out, pictures, copy, max_bad, as_json, **terms)


Map = Annotated[list[str] | None, typer.Option("--map", help="OURS=THEIRS, e.g. question=Frage; several times.")]
Name = Annotated[str | None, typer.Option("--name", help="What the data set is called; default: the file's name.")]
License = Annotated[str, typer.Option(help="Its terms, for store.json.")]
KeepPatients = Annotated[
    bool, typer.Option("--patients-are-pseudonyms", help="Keep the patient column as it is; default: hashed.")
]


@imports.command("table")
def import_table(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="CSV, TSV, JSON, JSON Lines or Parquet.")],
    out: Out,
    mapping: Map = None,
    images: Images = None,
    name: Name = None,
    encoding: Annotated[
        str | None, typer.Option(help="Of text files, e.g. cp1252; default: UTF-8, or what the file's first bytes say.")
    ] = None,
    license: License = "not stated",
    modality: Modality = None,
    kind: Kind = None,
    copy: Copy = False,
    window: Window = "file",
    plane: Plane = "axial",
    slices: Slices = "middle",
    salt: SaltFile = Path(".medrl-salt"),
    keep_patients: KeepPatients = False,
    square: Square = None,
    decode: Decode = False,
    clean: Clean = False,
    max_bad: MaxBad = 0.001,
    as_json: Json = False,
) -> None:
    """Read a table of your own into a store.

    Columns: image (or several, a|b), question, answer, and where there are any options, or option_A, option_B...; also
    id, modality, question_type, source, patient, kind. Others are mapped with --map. A patient is stored as a hash.
    DICOM and NIfTI become slices, through a window.

    \b
    Example:
      medrl import table fragen.csv --map question=Frage --map image=Bild --images scans --out data/mine
    """
    from medrl.data.readers.rows import rows_of_files

    rows = rows_of_files([path], encoding=encoding)
    view = {"window": window, "plane": plane, "slices": slices}
    with _pictures(
        images or path.parent, out, decode=decode, square_px=square, view=view, pixels_are_clean=clean
    ) as pictures:
        result = _read_table(rows, pictures, mapping, name or path.stem, salt, keep_patients, as_json)
        terms = {"source": name or path.stem, "license": license}
        _finish(_only(result, modality, kind), out, pictures, copy, max_bad, as_json, **terms)


@imports.command("hub")
def import_hub(
    name: Annotated[str, typer.Argument(metavar="ID", help="owner/name on the hub, or a local folder of that form.")],
    out: Out,
    config: Annotated[str | None, typer.Option(help="Configuration of the data set.")] = None,
    split: Annotated[str | None, typer.Option(help="Split, e.g. test; default: all.")] = None,
    mapping: Map = None,
    license: License = "see its hub page",
    modality: Modality = None,
    kind: Kind = None,
    salt: SaltFile = Path(".medrl-salt"),
    keep_patients: KeepPatients = False,
    decode: Decode = False,
    max_bad: MaxBad = 0.001,
    as_json: Json = False,
) -> None:
    """Read any data set of the Hugging Face hub into a store.

    Through the datasets library; columns as in `medrl import table`.

    \b
    Example:
      medrl import hub owner/name --split test --map answer=label --out data/theirs
    """
    from medrl.data.readers.rows import hub_rows

    terminal.quiet_libraries()
    local = Path(name)
    rows = hub_rows(name, config=config, split=split)
    with _pictures(local if local.is_dir() else Path(), out, decode=decode) as pictures:
        result = _read_table(rows, pictures, mapping, name.rstrip("/").split("/")[-1], salt, keep_patients, as_json)
        _finish(_only(result, modality, kind), out, pictures, True, max_bad, as_json, source=name, license=license)


def _read_table(
    rows: "Rows",
    pictures: "Pictures",
    mapping: list[str] | None,
    source: str,
    salt: Path,
    keep_patients: bool,
    quiet: bool,
) -> "ImportResult":
    from medrl.data.pseudonyms import Salt
    from medrl.data.readers.tables import parse_mapping, read_table

    def pseudonym(patient: str) -> str:
        return patient if keep_patients else Salt.open(salt).key("patient", patient)

    return read_table(rows, pictures, parse_mapping(mapping or ()), source=source, pseudonym=pseudonym, quiet=quiet)


@imports.command("folder")
def import_folder(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="DIR/LABEL/.../IMAGE")],
    out: Out,
    question: Annotated[
        list[str] | None, typer.Option(help="Wording; several times: one is drawn per image; {modality} is filled in.")
    ] = None,
    modality: Annotated[str, typer.Option(help="Of all images.")] = "unknown",
    question_type: Annotated[str, typer.Option(help="Of all questions.")] = "Disease Diagnosis",
    options: Annotated[int, typer.Option(min=2, max=10, help="Most options of a question.")] = 4,
    seed: Annotated[int, typer.Option(help="Names wordings, wrong options and their order.")] = 0,
    license: License = "not stated",
    copy: Copy = False,
    window: Window = "file",
    plane: Plane = "axial",
    slices: Slices = "middle",
    square: Square = None,
    decode: Decode = False,
    clean: Clean = False,
    max_bad: MaxBad = 0.001,
    as_json: Json = False,
) -> None:
    """Turn a folder of labeled images into multiple-choice questions.

    The names of the sub-folders are the labels, and the wrong options.

    \b
    Example:
      medrl import folder skin --question "Which lesion does this {modality} image show?" --modality Dermoscopy \\
          --out data/skin
    """
    from medrl.data.readers.folders import QUESTIONS, read_folder

    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give one that holds LABEL/IMAGE.png")
    view = {"window": window, "plane": plane, "slices": slices}
    with _pictures(folder, out, decode=decode, square_px=square, view=view, pixels_are_clean=clean) as pictures:
        result = read_folder(
            folder,
            pictures,
            questions=question or QUESTIONS,
            modality=modality,
            question_type=question_type,
            n_options=options,
            seed=seed,
            quiet=as_json,
        )
        _finish(result, out, pictures, copy, max_bad, as_json, source=folder.resolve().name, license=license)


@imports.command("dicom")
def import_dicom(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of DICOM files, at any depth.")],
    out: Out,
    per: Annotated[
        Literal["image", "series"], typer.Option(help="One round of questions per file, or per series.")
    ] = "image",
    window: Window = "file",
    slices: Slices = "middle",
    salt: SaltFile = Path(".medrl-salt"),
    clean: Clean = False,
    show_paths: Annotated[
        bool, typer.Option("--show-paths", help="Name bad files by their path, which may hold a patient's name.")
    ] = False,
    license: License = "not stated",
    max_bad: MaxBad = 0.001,
    as_json: Json = False,
) -> None:
    """Turn a folder of DICOM into questions on pictures without a header.

    Which modality, part of the body, plane: what the header answers. Nothing of the header is stored but these words;
    patients and UIDs become keys under the project's salt. Ultrasound, angiography and secondary captures whose header
    does not say that no text is burned in are refused.

    \b
    Example:
      medrl import dicom export/ --window lung --out data/ward
      medrl import dicom export/ --per series --slices uniform:3 --out data/ward
    """
    from medrl.data.dicom import read_dicom
    from medrl.data.pseudonyms import Salt

    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give one that holds DICOM files")
    secret = Salt.open(salt)
    view = {"window": window, "slices": slices if per == "image" else "middle"}
    name_of = functools.partial(secret.key, "file")
    with _pictures(folder, out, view=view, pixels_are_clean=clean, name_of=name_of) as pictures:
        result = read_dicom(
            folder,
            pictures,
            secret,
            series_slices=slices if per == "series" else None,
            show_paths=show_paths,
            quiet=as_json,
        )
        _finish(result, out, pictures, True, max_bad, as_json, source="DICOM", license=license)


def export_data(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="What to write out.")],
    to: Annotated[str, typer.Option(help="trl, verl, easyr1, swift, llamafactory or openai.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    mode: Annotated[Mode, typer.Option(help="Form of completion asked for.")] = "think",
    template: Annotated[str | None, typer.Option(help="Prompt wording; default: the mode's.")] = None,
    as_json: Json = False,
) -> None:
    """Write a store as rows that other trainers read.

    `medrl import` of the same name reads them back without loss.

    \b
    Example:
      medrl export-data data/all/train --to verl --out rows/verl
    """
    from medrl.data.export import export_data as write

    written = write(store, to, out, mode=mode, template=template)
    if as_json:
        terminal.print_json({"rows": written.rows, "files": [str(file) for file in written.files]})
        return
    typer.echo(f"{written.rows} rows in " + ", ".join(str(file) for file in written.files))


# --- shared ----------------------------------------------------------------------------------------------------------


@contextmanager
def _pictures(root: Path, out: Path, *, view: dict[str, Any] | None = None, **options: Any) -> "Iterator[Pictures]":
    """Where the images of an import are found; what it unpacks goes into a hidden folder that is gone afterwards."""
    from medrl.data.images import View
    from medrl.data.readers.pictures import Pictures
    from medrl.data.store import check_vacant

    check_vacant(out)  # before a hundred thousand questions are read
    unpack = out.absolute().parent / f".{out.name}.{uuid.uuid4().hex[:8]}.unpacked"
    try:
        yield Pictures(root, unpack, view=View(**view) if view else None, **options)
    finally:
        shutil.rmtree(unpack, ignore_errors=True)


def _only(result: "ImportResult", modalities: list[str] | None, kinds: list[str] | None) -> "ImportResult":
    """The result without the examples that were not asked for."""
    if kinds and not set(kinds) <= set(KINDS):
        raise SettingsError(f"--kind {', '.join(kinds)}: the kinds are {', '.join(KINDS)}")
    wanted = {name.casefold() for name in modalities or ()}
    examples = [
        example
        for example in result.examples
        if (not wanted or example.modality.casefold() in wanted) and (not kinds or example.kind in kinds)
    ]
    if result.examples and not examples:
        there = sorted({example.modality for example in result.examples})
        raise DataError(f"no question is left by --modality and --kind; the modalities are {', '.join(there)}")
    return replace(result, examples=examples)


def _finish(
    result: "ImportResult",
    out: Path,
    pictures: "Pictures",
    copy: bool,
    max_bad: float,
    as_json: bool,
    *,
    source: str,
    license: str,
    citation: str = "",
) -> None:
    """Refuse too many bad rows, write the store, print what was read and what was not."""
    from medrl.data import store
    from medrl.data.readers.result import check_bad

    bad = [{"file": str(row.file), "position": row.position, "reason": row.reason} for row in result.bad]
    try:
        check_bad(result, max_bad)
    except DataError:
        if as_json:
            terminal.print_json({"rows": 0, "bad": bad, "by_modality": {}, "by_question_type": {}})
        raise
    absent = sum(item.questions for item in result.absent)
    info = store.write_store(
        out,
        result.examples,
        source=source,
        license=license,
        citation=citation,
        extra={"bad_rows": len(result.bad), "absent_questions": absent},
        copy=copy or pictures.unpacked,
    )
    notes = [*result.notes, *pictures.notes()]
    kinds = dict(Counter(example.kind for example in result.examples).most_common())
    if as_json:
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
    where = "copied" if copy or pictures.unpacked else "linked"
    typer.echo(f"{info.rows} questions on {info.images} images ({where}) in {out}; {len(result.bad)} bad rows left out")
    typer.echo(f"license: {info.license}")
