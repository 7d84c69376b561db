"""What a table's owner is told when it cannot be read: encoding, columns, folders; and no advice that does not help."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from medrl.cli import app
from medrl.data.store import load

GERMAN = "Bild;Frage;Antwort\na.png;Größe der Läsion?;Übergroß\n"


def tried(folder, *words):
    result = CliRunner().invoke(app, ["import", "table", *map(str, words), "--out", str(folder / "store")])
    assert (folder / "store").exists() is (result.exit_code == 0)
    return result


@pytest.fixture
def folder(tmp_path):
    Image.new("L", (16, 16), 90).save(tmp_path / "a.png")
    return tmp_path


MAP = ("--map", "image=Bild", "--map", "question=Frage", "--map", "answer=Antwort")


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_a_table_that_is_not_utf_8_says_so_and_how_to_read_it(folder, encoding):
    (folder / "t.csv").write_bytes(GERMAN.encode(encoding))
    result = tried(folder, folder / "t.csv", *MAP)
    assert result.exit_code == 1 and "--max-bad" not in result.stderr
    assert "not UTF-8" in result.stderr and "--encoding cp1252" in result.stderr and "iconv" in result.stderr
    assert tried(folder, folder / "t.csv", *MAP, "--encoding", encoding).exit_code == 0
    (example,) = load(folder / "store")
    assert (example.question, example.target) == ("Größe der Läsion?", "Übergroß")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_table_that_marks_its_encoding_needs_no_option(folder, encoding):
    (folder / "t.csv").write_bytes(GERMAN.encode(encoding))
    assert tried(folder, folder / "t.csv", *MAP).exit_code == 0
    assert load(folder / "store")[0].target == "Übergroß"


def test_an_encoding_that_is_none_or_not_the_files_is_named(folder):
    (folder / "t.csv").write_bytes(GERMAN.encode("cp1252"))
    result = tried(folder, folder / "t.csv", *MAP, "--encoding", "cp-1252x")
    assert result.exit_code == 2 and "--encoding 'cp-1252x'" in result.stderr
    result = tried(folder, folder / "t.csv", *MAP, "--encoding", "ascii")
    assert result.exit_code == 1 and "not ascii" in result.stderr


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_columns_of_other_names_are_listed_with_the_option_that_names_them(folder, suffix):
    rows = [{"Bild": "a.png", "Frage": "Was?", "Antwort": "Leber"}] * 2
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    text = "\n".join(lines) if suffix == "csv" else "\n".join(map(json.dumps, rows))
    (folder / f"t.{suffix}").write_text(text)
    result = tried(folder, folder / f"t.{suffix}")
    assert result.exit_code == 2 and "--map image=COLUMN --map question=COLUMN --map answer=COLUMN" in result.stderr
    assert "it has Bild, Frage, Antwort" in result.stderr and "--max-bad" not in result.stderr
    result = tried(folder, folder / f"t.{suffix}", *MAP[2:])
    assert "--map image=COLUMN" in result.stderr and "question=COLUMN" not in result.stderr


def test_when_no_row_can_be_used_nothing_is_said_of_putting_up_with_it(folder):
    rows = "".join(f"gone{number}.png,?,yes\n" for number in range(50))
    (folder / "t.csv").write_text("image,question,answer\n" + rows)
    for words in ([], ["--max-bad", "1"]):
        result = tried(folder, folder / "t.csv", *words)
        assert result.exit_code == 1 and "none of the 50 rows can be used" in result.stderr
        assert "--max-bad" not in result.stderr and "and 40 more" in result.stderr
        assert "gone0.png does not exist" in result.stderr and "gone10.png" not in result.stderr


def test_a_table_without_rows_is_said_to_be_empty(folder):
    (folder / "t.csv").write_text("image,question,answer\n")
    result = tried(folder, folder / "t.csv")
    assert result.exit_code == 1 and "t.csv has no rows" in result.stderr


def test_a_folder_is_no_table_and_its_tables_are_named(folder):
    result = tried(folder, folder)
    assert result.exit_code == 1 and "is a folder" in result.stderr and "medrl import folder" in result.stderr
    (folder / "mine.csv").write_text("x")
    assert "mine.csv" in tried(folder, folder).stderr


def test_a_spreadsheet_is_told_how_to_become_a_table(folder):
    (folder / "t.xlsx").write_bytes(b"PK")
    result = tried(folder, folder / "t.xlsx")
    assert result.exit_code == 1 and "save it as CSV" in result.stderr
