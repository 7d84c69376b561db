"""The commands that divide data sets and question them: split, audit."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from medrl import stopping, terminal
from medrl.types import Mode

if TYPE_CHECKING:
    from medrl.evaluation.audit import Audit


def split(
    source: Annotated[Path, typer.Argument(metavar="STORE", help="The store to divide.")],
    out: Annotated[Path, typer.Option(help="Folder for DIR/<domain>/train and DIR/<domain>/test.")],
    by: Annotated[
        Literal["modality", "question_type", "source", "none"],
        typer.Option(help="What a domain is; none: one domain named all."),
    ] = "modality",
    keep_together: Annotated[
        Literal["image", "patient", "source", "none"] | None,
        typer.Option(help="What must not lie on both sides; near-duplicates count as one image.  [default: image]"),
    ] = None,
    test: Annotated[float | None, typer.Option(help="Share of each domain that goes to test.  [default: 0.2]")] = None,
    protocol: Annotated[
        Literal["med-r1", "med-r1-disjoint", "medvlm-r1"] | None,
        typer.Option(
            help="Med-R1's 80/20 by question, or the same with no image on both sides; MedVLM-R1's 600 on MRI to train "
            "on and 300 each on MRI, CT and X-ray to test on (other sizes: --train-size, --test-size)."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the split.")] = 0,
    train_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Keep this many training questions per domain; smaller subsets lie inside larger ones."
        ),
    ] = None,
    test_size: Annotated[int | None, typer.Option(min=1, help="The same for test questions.")] = None,
    resample_distractors: Annotated[
        bool,
        typer.Option("--resample-distractors", help="Rebuild options from right answers of the same kind of question."),
    ] = False,
    drop_unbalanced: Annotated[
        bool,
        typer.Option("--drop-unbalanced", help="With it, leave out questions whose options still tell the answer."),
    ] = False,
) -> None:
    """Divide a store into train and test.

    No image (or patient) lies on both sides, and none in the training set of one domain and the test set of another.

    \b
    Example:
      medrl split data/omnimedvqa --by modality --out data/by-modality
      medrl split data/omnimedvqa --by none --train-size 600 --out data/few
      medrl split data/omnimedvqa --by question_type --protocol med-r1 --out data/as-in-the-paper
      medrl split data/omnimedvqa --protocol medvlm-r1 --out data/medvlm-r1
    """
    from medrl.data.split_store import split_store
    from medrl.data.splits import PROTOCOLS, Protocol
    from medrl.errors import SettingsError
    from medrl.evaluation.audit import blind_summary

    if protocol and (keep_together or test is not None):
        raise SettingsError(f"--protocol {protocol} already sets --keep-together and --test: leave those out")
    if drop_unbalanced and not resample_distractors:
        raise SettingsError("--drop-unbalanced goes with --resample-distractors: give both, or neither")
    asked = Protocol(test_fraction=0.2 if test is None else test, keep_together=keep_together or "image")
    chosen = PROTOCOLS[protocol] if protocol else asked
    if chosen.by and by != chosen.by:
        raise SettingsError(f"--protocol {protocol} divides by {chosen.by}, not by {by}: leave --by out")
    with stopping.tidily():
        parts = split_store(
            source,
            out,
            by=None if by == "none" else by,
            keep_together=chosen.keep_together,
            test_fraction=chosen.test_fraction,
            seed=seed,
            train_size=train_size or chosen.train_size,
            test_size=test_size or chosen.test_size,
            trained=chosen.trained,
            tested=chosen.tested,
            resample=resample_distractors,
            drop_unbalanced=drop_unbalanced,
            measure=blind_summary,
            quiet=False,
        )
    rows = [(part.domain, part.train_rows, part.test_rows) for part in parts]
    terminal.print_table("Questions", ["domain", "train", "test"], rows)
    if resample_distractors:
        terminal.print_table(
            "Options resampled: questions whose options now tell nothing, still tell something, are as they were",
            ["domain", "balanced", "uneven", "unchanged", "left out"],
            [(p.domain, p.resampled.balanced, p.resampled.uneven, p.resampled.unchanged, p.resampled.dropped)
             for p in parts if p.resampled],
        )  # fmt: skip
        if not drop_unbalanced and any(p.resampled and p.resampled.uneven + p.resampled.unchanged for p in parts):
            note = "note: where answers are too few to draw others from, options still tell something; "
            typer.echo(note + "--drop-unbalanced leaves those questions out", err=True)
    for part in parts:
        typer.echo(f"{part.folder}/")
    for part in parts:
        if not (part.test_rows and part.train_rows):
            side = "train" if part.test_rows else "test"
            typer.echo(
                f"note: {part.domain} has no {side} set: what is kept together there could not be divided, or was "
                "asked to stand on one side",
                err=True,
            )


def audit(
    train: Annotated[Path, typer.Argument(metavar="TRAIN", help="The store that is trained on.")],
    test: Annotated[Path, typer.Argument(metavar="TEST", help="The store that is tested on.")],
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write everything as JSON; -: on stdout, no tables."),
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with image pairs side by side.")
    ] = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE,...",
            help="What makes it unfit: names, name>number or name>number%; nothing: never unfit.  "
            "[default: images_exact,near_duplicates,patients,gold_rejected]",
        ),
    ] = None,
    mode: Annotated[Mode, typer.Option(help="Form of completion in which right answers are tried.")] = "think",
) -> None:
    """Check whether a test set can measure anything.

    Counts images, near-duplicates and patients shared with the training set, right answers that the reward rejects, and
    how many questions can be answered without the image. Exit code 0: no rule is broken; 3: one is.

    \b
    Example:
      medrl audit data/by-modality/ct/train data/by-modality/ct/test --json audit.json --html audit.html
      medrl audit TRAIN TEST --fail-on "patients,near_duplicates>1%,option_prior>90%"
    """
    from medrl.data.store import load, read_info
    from medrl.evaluation.audit import DEFAULT_FAIL_ON, parse_rule
    from medrl.evaluation.audit import audit as audit_examples
    from medrl.files import write_json_atomically

    rules = [rule for given in fail_on or DEFAULT_FAIL_ON for rule in given.split(",") if rule.strip() != "nothing"]
    for rule in rules:
        parse_rule(rule)  # wrong words are said at once, not after the work
    for file in (json_file, html_file):
        if file and file != Path("-"):  # said now, and not after the work, when it cannot be written
            file.parent.mkdir(parents=True, exist_ok=True)
    before = read_info(test).extra.get("blind_before_resampling")
    found = audit_examples(
        load(train), load(test), mode=mode, before=before, train_root=train, test_root=test, quiet=False
    )
    to_stdout = json_file == Path("-")
    if json_file:
        stores = {name: {"path": str(path), "fingerprint": read_info(path).fingerprint}
                  for name, path in (("train", train), ("test", test))}  # fmt: skip
        report = {**found.as_dict(), "stores": stores, "reasons": found.reasons(rules)}
        if to_stdout:
            terminal.print_json(report)
        else:
            write_json_atomically(json_file, report)
    if html_file:
        from medrl.report.audit_page import write_audit_page

        names = [f"{path.resolve().parent.name}/{path.resolve().name}" for path in (train, test)]
        write_audit_page(found, html_file, title=" and ".join(names), fail_on=rules)
    if not to_stdout:
        _print_audit(found)
        for file in (json_file, html_file):
            if file:
                typer.echo(file)
    found.raise_if_unfit(rules)
    typer.echo(f"fit by the rules {', '.join(rules)}" if rules else "no rule was asked for", err=to_stdout)


def _print_audit(found: "Audit") -> None:
    before = found.before
    counts = {**found.overlap, "gold_rejected": len(found.gold_rejected)}
    terminal.print_table(
        f"Of {found.n_test} test questions", ["", "questions", "share"],
        [(name, count, terminal.percent(count / found.n_test)) for name, count in counts.items()],
    )  # fmt: skip
    if found.gold_rejected_train:
        n = len(found.gold_rejected_train)
        typer.echo(f"gold_rejected also among training questions: {n} of {found.n_train}")
    terminal.print_table(
        "Without looking", ["", "accuracy", "95 % interval", "questions", *(["before resampling"] if before else [])],
        [(*terminal.accuracy_row(name, interval.as_dict()),
          *([terminal.percent(before[name]["accuracy"])] if before else []))
         for name, interval in found.blind.items()],
    )  # fmt: skip
    typer.echo(f"{found.best_rule} solves {terminal.percent(found.blind_solvable_share)} of the test set blind")
    if found.leaks.patients_unknown:
        typer.echo(f"{found.leaks.patients_unknown} test questions name no patient: nothing is known about those")
