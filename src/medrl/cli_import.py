"""``medrl import ...`` and ``medrl export-data``: each source into a store, a store into other trainers' rows."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from medrl import stopping, terminal
from medrl.cli_given import SCANS, Given, command, finish, imports, pictures_of
from medrl.data.readers.sources import SOURCES
from medrl.errors import DataError
from medrl.types import Mode

if TYPE_CHECKING:
    from medrl.data.readers.rows import Rows

__all__ = ["export_data", "imports"]


# --- sources that are read from one path each ------------------------------------------------------------------------

_OF_SOURCES = ("images", "split", "modality", "kind", "copy", "square", "decode")
Source_ = Annotated[Path, typer.Argument(metavar="PATH", help="A file, a folder of files, or a hub id, owner/name.")]


def _read_source(name: str, path: Path, given: Given, **more: Any) -> None:
    source = SOURCES[name]
    root = given.images or (path if path.is_dir() else path.parent)
    with pictures_of(root, given, folders=source.folders) as pictures:
        result = source.read(path, pictures, split=given.split, quiet=given.as_json, **more)
        finish(result, pictures, given, source=source.title, license=source.license, citation=source.citation)


def _register(name: str) -> None:
    source = SOURCES[name]
    doc = (
        f"Read {source.title}.\n\nPrints counts; bad rows are listed with file, position and reason.\n\n"
        f"\b\nExample:\n  medrl import {name} {source.example} --out data/{name}"
    )

    @command(name, *_OF_SOURCES, doc=doc)
    def read(path: Source_, given: Given) -> None:
        _read_source(name, path, given)


for _name in SOURCES:
    if _name != "slake":
        _register(_name)


@command("slake", *_OF_SOURCES)
def import_slake(
    path: Source_,
    given: Given,
    lang: Annotated[Literal["en", "zh", "all"], typer.Option(help="Language of the questions.")] = "all",
) -> None:
    """Read SLAKE into a store.

    \b
    Example:
      medrl import slake SLAKE --split test --lang en --out data/slake
    """
    _read_source("slake", path, given, languages=("en", "zh") if lang == "all" else (lang,))


@command("omnimedvqa", "modality", "copy", "decode")
def import_omnimedvqa(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Holds QA_information/ and Images/.")],
    given: Given,
    datasets: Annotated[list[str] | None, typer.Option(help="Only this data set; may be given several times.")] = None,
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

    with pictures_of(folder, given) as pictures:
        result = omnimedvqa.read_omnimedvqa(
            folder, pictures, datasets=datasets or (), modalities=given.modality or (), quiet=given.as_json
        )
        finish(
            result,
            pictures,
            given,
            source=omnimedvqa.SOURCE,
            license=omnimedvqa.LICENSE,
            citation=omnimedvqa.CITATION,
            filtered=True,
        )


# --- tables, hub, folders, DICOM -------------------------------------------------------------------------------------

_OF_TABLES = ("mapping", "modality", "kind", "salt", "keep_patients", "decode", "names")


@command("table", *_OF_TABLES, *SCANS, "images", "license", "copy", "square")
def import_table(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="CSV, TSV, JSON, JSON Lines or Parquet.")],
    given: Given,
    name: Annotated[
        str | None, typer.Option("--name", help="What the data set is called; default: the file's name.")
    ] = None,
    encoding: Annotated[
        str | None,
        typer.Option(help="Encoding of text, e.g. cp1252; default: UTF-8, or what the file's first bytes say."),
    ] = None,
) -> None:
    """Read a table of your own into a store.

    Columns: image (or several, a|b), question, answer, and where there are any options, or option_A, option_B...; also
    id, modality, question_type, source, patient, kind. Others are mapped with --map. Patients are stored as keyed
    hashes. DICOM and NIfTI become slices, through a window.

    \b
    Example:
      medrl import table fragen.csv --map question=Frage --map image=Bild --images scans --out data/mine
    """
    from medrl.data.readers.rows import rows_of_files

    rows = rows_of_files([path], encoding=encoding)
    _import_rows(rows, given.images or path.parent, given, name or path.stem, name or path.stem)


@command("hub", *_OF_TABLES, "split")
def import_hub(
    name: Annotated[str, typer.Argument(metavar="ID", help="owner/name on the hub, or a local folder of that form.")],
    given: Given,
    config: Annotated[str | None, typer.Option(help="Configuration of the data set.")] = None,
    license: Annotated[str, typer.Option(help="License of the data, for store.json.")] = "see its hub page",
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
    rows = hub_rows(name, config=config, split=given.split)
    short = name.rstrip("/").split("/")[-1]
    _import_rows(rows, local if local.is_dir() else Path(), replace(given, copy=True, license=license), short, name)


def _import_rows(rows: "Rows", root: Path, given: Given, short: str, source: str) -> None:
    """Args: short: what rows without a source of their own are said to come from; source: what the store is."""
    from medrl.data.pseudonyms import Salt
    from medrl.data.readers.tables import parse_mapping, read_table

    def pseudonym(patient: str) -> str:
        return patient if given.keep_patients else Salt.open(given.salt).key("patient", patient)

    mapping = parse_mapping(given.mapping or ())
    with pictures_of(root, given) as pictures:
        result = read_table(rows, pictures, mapping, source=short, pseudonym=pseudonym, quiet=given.as_json)
        finish(result, pictures, given, source=source, license=given.license, names=given.names)


@command("folder", *SCANS, "license", "copy", "names", "square", "decode")
def import_folder(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="DIR/LABEL/.../IMAGE")],
    given: Given,
    question: Annotated[
        list[str] | None, typer.Option(help="Wording; several times: one is drawn per image; {modality} is filled in.")
    ] = None,
    modality: Annotated[str, typer.Option(help="Modality of all images.")] = "unknown",
    question_type: Annotated[str, typer.Option(help="Type of all questions.")] = "Disease Diagnosis",
    options: Annotated[int, typer.Option(min=2, max=10, help="Largest number of options per question.")] = 4,
    seed: Annotated[int, typer.Option(help="Random seed for wordings, wrong options and their order.")] = 0,
) -> None:
    """Turn a folder of labeled images into questions.

    The names of the sub-folders are the labels, and the wrong options.

    \b
    Example:
      medrl import folder skin --question "Which lesion does this {modality} image show?" --modality Dermoscopy \\
          --out data/skin
    """
    from medrl.data.readers.folders import QUESTIONS, read_folder

    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give one that holds LABEL/IMAGE.png")
    with pictures_of(folder, given) as pictures:
        result = read_folder(
            folder,
            pictures,
            questions=question or QUESTIONS,
            modality=modality,
            question_type=question_type,
            n_options=options,
            seed=seed,
            ids=given.names,
            quiet=given.as_json,
        )
        finish(result, pictures, given, source=folder.resolve().name, license=given.license, names=given.names)


@command("dicom", "window", "slices", "salt", "clean", "license")
def import_dicom(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of DICOM files, at any depth.")],
    given: Given,
    per: Annotated[
        Literal["image", "series"], typer.Option(help="One round of questions per file, or per series.")
    ] = "image",
    show_paths: Annotated[
        bool, typer.Option("--show-paths", help="Name bad files by their path, which may hold a patient's name.")
    ] = False,
) -> None:
    """Turn a folder of DICOM into questions.

    Which modality, part of the body, plane: what the header answers, asked on pictures without it. Nothing of the
    header is stored but these words; patients and UIDs become keys under the project's salt. Ultrasound, angiography
    and secondary captures whose header does not say that no text is burned in are refused.

    \b
    Example:
      medrl import dicom export/ --window lung --out data/ward
      medrl import dicom export/ --per series --slices uniform:3 --out data/ward
    """
    from medrl.data.dicom import read_dicom
    from medrl.data.pseudonyms import Salt

    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give one that holds DICOM files")
    secret = Salt.open(given.salt)
    of_series = given.slices if per == "series" else None
    name_of = functools.partial(secret.key, "file")
    with pictures_of(folder, given, slices="middle" if of_series else given.slices, name_of=name_of) as pictures:
        result = read_dicom(
            folder, pictures, secret, series_slices=of_series, show_paths=show_paths, quiet=given.as_json
        )
        finish(result, pictures, given, source="DICOM", license=given.license)


def export_data(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="What to write out.")],
    to: Annotated[str, typer.Option(help="trl, verl, easyr1, swift, llamafactory or openai.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    mode: Annotated[Mode, typer.Option(help="Form of completion asked for.")] = "think",
    template: Annotated[str | None, typer.Option(help="Prompt wording; default: the mode's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Write a store as rows that other trainers read.

    `medrl import` of the same name reads them back without loss.

    \b
    Example:
      medrl export-data data/all/train --to verl --out rows/verl
    """
    from medrl.data.export import export_data as write

    with stopping.tidily():
        written = write(store, to, out, mode=mode, template=template)
    if as_json:
        terminal.print_json({"rows": written.rows, "files": [str(file) for file in written.files]})
        return
    typer.echo(f"{written.rows} rows in " + ", ".join(str(file) for file in written.files))
