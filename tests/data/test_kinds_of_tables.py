"""Tables of every kind of question: how answers may be written, and what is refused."""

import csv
import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from medrl.cli import app
from medrl.data.store import load

OPTIONS = ["edema", "left lung, upper lobe", "mass", "cyst"]


def imported(folder, rows, *words, suffix="jsonl"):
    """What ``medrl import table`` prints of these rows, and the examples of the store."""
    Image.new("L", (16, 16), 90).save(folder / "a.png")
    rows = [{"id": f"q{number}", "image": "a.png", "question": "?", **row} for number, row in enumerate(rows)]
    table = folder / f"table.{suffix}"
    if suffix == "csv":
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(
                {name: json.dumps(cell) if isinstance(cell, list) else cell for name, cell in row.items()}
                for row in rows
            )
    else:
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["import", "table", str(table), "--out", str(folder / "store"), "--json", "--max-bad", "1", *words]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code in (0, 1), result.output
    return (json.loads(result.stdout), load(folder / "store")) if result.exit_code == 0 else (result.stderr, [])


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize(
    ("row", "kind", "target"),
    [
        ({"options": OPTIONS, "answer": "cyst", "kind": "mcq"}, "choice", "D"),
        ({"options": OPTIONS, "answer": ["C", "A"], "kind": "multi_select"}, "multi_select", "A, C"),
        ({"options": OPTIONS, "answer": ["left lung, upper lobe", "edema"]}, "multi_select", "A, B"),
        ({"options": OPTIONS, "answer": "A, C", "kind": "multi-select"}, "multi_select", "A, C"),
        ({"answer": True, "kind": "yes_no"}, "yes_no", "yes"),
        ({"answer": "No.", "kind": ""}, "yes_no", "no"),
        ({"answer": 0, "kind": "yes/no"}, "yes_no", "no"),
        ({"answer": "3.5 cm", "kind": "numeric"}, "numeric", "3.5 cm"),
        ({"answer": 7, "kind": "number"}, "numeric", "7"),
        ({"answer": "left kidney", "kind": "open"}, "short", "left kidney"),
        ({"answer": [10, 10.5, 30, 40], "kind": "box"}, "box", "10, 10.5, 30, 40"),
        ({"answer": "(10,10),(30,40)", "kind": "bbox"}, "box", "10, 10, 30, 40"),
    ],
)
def test_an_answer_is_read_by_its_kind(tmp_path, suffix, row, kind, target):
    printed, (kept,) = imported(tmp_path, [row], suffix=suffix)
    assert (kept.kind, kept.target, printed["bad"]) == (kind, target, [])


def test_an_option_that_is_the_number_zero_is_one(tmp_path):
    row = {"option_A": 3, "option_B": 2, "option_C": 1, "option_D": 0, "answer": "D"}
    printed, (kept,) = imported(tmp_path, [row])
    assert (kept.options, kept.target, printed["bad"]) == (("3", "2", "1", "0"), "D", [])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"answer": "cyst", "kind": "guess"}, "the kinds are choice"),
        ({"answer": "wide", "kind": "numeric"}, "is no number"),
        ({"answer": ["3 cm", "4 cm"], "kind": "numeric"}, "2 answers, but a question of kind numeric has one"),
        ({"answer": [10, 10, 30], "kind": "box"}, "is no box"),
        ({"answer": [30, 10, 10, 40], "kind": "box"}, "is no box"),
        ({"answer": "maybe", "kind": "yes_no"}, "neither yes nor no"),
        ({"options": OPTIONS, "answer": ["A", "polyp"], "kind": "multi_select"}, "'polyp' is none of the options"),
        ({"options": OPTIONS, "answer": [], "kind": "multi_select"}, "answer"),
    ],
)
def test_an_answer_that_its_kind_cannot_have_is_a_bad_row(tmp_path, row, reason):
    printed, kept = imported(tmp_path, [{"answer": "liver"}, row])
    assert [one.id for one in kept] == ["q0"] and reason in printed["bad"][0]["reason"]


def test_references_tolerance_and_rationale_are_kept(tmp_path):
    rows = [
        {"answer": ["liver", "the liver"], "references": "hepar", "rationale": "Large and on the right."},
        {"answer": "3 cm", "kind": "numeric", "tolerance": "5 %", "rationale": " "},
    ]
    _, (short, numeric) = imported(tmp_path, rows)
    assert (short.target, short.references) == ("liver", ("the liver", "hepar"))
    assert (short.rationale, numeric.rationale) == ("Large and on the right.", None)
    assert numeric.tolerance == "5 %"


def test_the_column_of_rationales_can_be_named(tmp_path):
    _, (kept,) = imported(tmp_path, [{"answer": "liver", "Begründung": "Dark."}], "--map", "rationale=Begründung")
    assert kept.rationale == "Dark."


@pytest.mark.parametrize("names", [("option_a", "option_b"), ("Option A", "Option B"), ("A", "B")])
def test_option_columns_are_known_by_more_than_one_spelling(tmp_path, names):
    row = dict(zip(names, ("cyst", "mass"), strict=True)) | {"answer": "B"}
    _, (example,) = imported(tmp_path, [row])
    assert (example.kind, example.options, example.target) == ("choice", ("cyst", "mass"), "B")


def test_a_letter_without_options_is_a_bad_row_that_says_how_to_name_them(tmp_path):
    message, _ = imported(tmp_path, [{"Optionen": "cyst|mass", "answer": "b)"}], "--max-bad", "0")
    assert "no column holds options" in message and "--map options=COLUMN" in message


def test_a_table_whose_separator_is_a_semicolon_is_read(tmp_path):
    Image.new("L", (16, 16), 90).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("image;question;options;answer\na.png;Which, then?;cyst|mass;A\n")
    result = CliRunner().invoke(app, ["import", "table", str(tmp_path / "t.csv"), "--out", str(tmp_path / "store")])
    assert result.exit_code == 0, result.output
    (example,) = load(tmp_path / "store")
    assert (example.question, example.options) == ("Which, then?", ("cyst", "mass"))


def test_too_many_bad_rows_are_printed_as_json_too_and_nothing_is_written(tmp_path):
    (tmp_path / "t.csv").write_text("image,question,answer\nnone.png,?,yes\n")
    arguments = ["import", "table", str(tmp_path / "t.csv"), "--out", str(tmp_path / "store"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and not (tmp_path / "store").exists()
    (bad,) = json.loads(result.stdout)["bad"]
    assert bad["position"] == 0 and "none.png" in bad["reason"]
