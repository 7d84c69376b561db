from dataclasses import replace

import pyarrow.parquet

from medrl.data.store import load, read_info, verify, write_store


def test_a_rationale_survives_the_store_and_changes_its_fingerprint(make_examples, tmp_path):
    examples = make_examples(tmp_path / "images", 3)
    some = [replace(examples[0], rationale="Dark fluid, so MRI.\n不"), *examples[1:]]
    plain = write_store(tmp_path / "plain", examples, source="s", license="l")
    with_one = write_store(tmp_path / "with", some, source="s", license="l")
    assert [row.rationale for row in load(tmp_path / "with")] == ["Dark fluid, so MRI.\n不", None, None]
    assert plain.fingerprint != with_one.fingerprint
    assert verify(tmp_path / "with").fingerprint == with_one.fingerprint


def test_a_store_written_before_there_was_a_rationale_reads_and_keeps_its_fingerprint(make_examples, tmp_path):
    write_store(tmp_path / "store", make_examples(tmp_path / "images", 3), source="s", license="l")
    before = read_info(tmp_path / "store").fingerprint
    file = tmp_path / "store" / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(file).drop_columns(["rationale"]), file)
    assert [row.rationale for row in load(tmp_path / "store")] == [None] * 3
    assert verify(tmp_path / "store").fingerprint == before
