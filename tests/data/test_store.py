"""A store keeps every field and byte, and is whole or absent."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medrl.data import store
from medrl.data.paths import safe_path
from medrl.data.store_rows import COLUMNS, write_rows
from medrl.errors import DataError
from medrl.types import Example

ODD_NAMES = ["CT & MR/a b (1).tif", "CT & MR/[x] {y}.png", "other/a b (1).tif", "ünï/é%2e.jpg"]


def make_examples(root: Path, names=tuple(ODD_NAMES)) -> list[Example]:
    rows = []
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name, format="PNG")
        rows.append(
            Example(
                id=f"d/{number}",
                source="d",
                images=(root / name,),
                question=f"What is {number}? <b>",
                options=("CT", "MRI", "OCT")[: 2 + number % 2],
                target="AB"[number % 2],
                modality=("CT", "MRI")[number % 2],
                question_type="Modality Recognition",
                patient=None if number else "p1",
            )
        )
    return rows


def write(out: Path, rows: list[Example], **more):
    return store.write_store(out, rows, source="fake", license="CC0", citation="nobody", **more)


def test_what_was_written_comes_back_with_images_under_the_store(tmp_path):
    rows = make_examples(tmp_path / "raw")
    info = write(tmp_path / "s", rows, extra={"seed": 3})
    back = store.load(tmp_path / "s")
    assert [replace(row, images=()) for row in back] == [replace(row, images=()) for row in rows]
    assert [row.images[0].relative_to(tmp_path / "s" / "images").as_posix() for row in back] == ODD_NAMES
    assert [row.images[0].read_bytes() for row in back] == [row.images[0].read_bytes() for row in rows]
    assert (info.rows, info.images, info.modalities) == (4, 4, {"CT": 2, "MRI": 2})
    assert store.read_info(tmp_path / "s") == info == store.verify(tmp_path / "s")
    assert info.extra == {"seed": 3}


def test_datasets_reads_the_parquet(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    write(tmp_path / "s", make_examples(tmp_path / "raw"))
    rows = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "s/data.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert tuple(rows.column_names) == COLUMNS
    assert rows[1]["images"] == ["images/CT & MR/[x] {y}.png"] and rows[1]["options"] == ["CT", "MRI", "OCT"]
    assert rows[1]["patient"] is None


def test_an_image_shown_by_two_rows_is_stored_once(tmp_path):
    first, *_ = make_examples(tmp_path / "raw", ("a.png",))
    second = replace(first, id="d/second", images=(first.images[0], tmp_path / "raw" / ".." / "raw" / "a.png"))
    info = write(tmp_path / "s", [first, second])
    assert info.images == 1
    assert [path.name for path in (tmp_path / "s/images").iterdir()] == ["a.png"]


def test_names_that_collide_once_cleaned_or_in_another_case_are_numbered(tmp_path):
    rows = make_examples(tmp_path / "raw", ("a:b.png", "a?b.png", "A_B.png"))
    write(tmp_path / "s", rows)
    back = store.load(tmp_path / "s")
    assert [row.images[0].name for row in back] == ["a_b.png", "a_b-2.png", "A_B-3.png"]
    assert [row.images[0].read_bytes() for row in back] == [row.images[0].read_bytes() for row in rows]


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    rows = make_examples(tmp_path / "raw")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_rows", full_disk)
    with pytest.raises(DataError, match="No space"):
        write(tmp_path / "s", rows)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_too_small_a_disk_is_noticed_before_copying(tmp_path, monkeypatch):
    rows = make_examples(tmp_path / "raw")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(DataError, match="0 MiB free"):
        write(tmp_path / "s", rows)
    assert not (tmp_path / "s").exists()


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path):
    (tmp_path / "s").mkdir()
    rows = make_examples(tmp_path / "raw")
    write(tmp_path / "s", rows)
    with pytest.raises(DataError, match="not empty"):
        write(tmp_path / "s", rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": "C"}, "target 'C'.*A, B"),
        ({"target": ""}, "target ''"),
        ({"options": ("only",)}, "1 options"),
        ({"images": (Path("gone.png"),)}, r"row 0 \('d/0'\): image gone.png"),
    ],
)
def test_a_malformed_example_is_refused(tmp_path, change, words):
    rows = make_examples(tmp_path / "raw", ("a.png",))
    with pytest.raises(DataError, match=words):
        write(tmp_path / "s", [replace(rows[0], **change)])


def test_repeated_ids_and_empty_sets_are_refused(tmp_path):
    rows = make_examples(tmp_path / "raw", ("a.png",))
    with pytest.raises(DataError, match="'d/0'"):
        write(tmp_path / "s", rows * 2)
    with pytest.raises(DataError, match="no examples"):
        write(tmp_path / "s", [])
    with pytest.raises(DataError, match="question is not valid Unicode"):
        write(tmp_path / "s", [replace(rows[0], question="half a pair \ud83d")])


def test_a_folder_that_is_no_store_is_explained(tmp_path):
    with pytest.raises(DataError, match=r"no store.json; a store is a folder with .*medrl import"):
        store.load(tmp_path)


def test_a_missing_image_is_named_with_its_row(tmp_path):
    write(tmp_path / "s", make_examples(tmp_path / "raw"))
    (tmp_path / "s/images" / ODD_NAMES[2]).unlink()
    with pytest.raises(DataError, match=r"row 2: image images/other/a b \(1\).tif"):
        store.load(tmp_path / "s")


def test_a_newer_or_broken_store_json_is_refused(tmp_path):
    write(tmp_path / "s", make_examples(tmp_path / "raw"))
    file = tmp_path / "s/store.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "format_version": 99}))
    with pytest.raises(DataError, match=r"99.*update medrl"):
        store.load(tmp_path / "s")
    file.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        store.read_info(tmp_path / "s")
    file.write_text(json.dumps({**content, "rows": 5}))
    with pytest.raises(DataError, match=r"4 rows, but its store\.json says 5"):
        store.load(tmp_path / "s")


@pytest.mark.parametrize(
    "path",
    ["../x.png", "a/../../x.png", "/etc/passwd", "file:///etc/passwd", "https://a/b.png", "C:/x.png",
     "..\\x.png", "\\\\host\\x", "a\0b", " ", ""],
)  # fmt: skip
def test_a_path_that_leads_out_is_refused(tmp_path, path):
    with pytest.raises(DataError, match="image path"):
        safe_path(tmp_path, path)


def test_a_link_that_leads_out_is_refused_and_one_that_stays_is_not(tmp_path):
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"x")
    os.symlink(tmp_path, root / "out")
    os.symlink(root / "real", root / "alias")
    with pytest.raises(DataError, match="symbolic link"):
        safe_path(root, "out/secret.png")
    assert safe_path(root, "alias/a.png") == root / "alias" / "a.png"


def test_a_store_whose_rows_point_outside_does_not_load(tmp_path):
    rows = make_examples(tmp_path / "raw", ("a.png",))
    write(tmp_path / "s", rows)
    write_rows(tmp_path / "s/data.parquet", [replace(rows[0], images=(Path("../raw/a.png"),))])
    with pytest.raises(DataError, match=r"row 0: image path '../raw/a.png'"):
        store.load(tmp_path / "s")


def test_the_fingerprint_depends_on_the_data_and_not_on_where_it_lay(tmp_path):
    rows = make_examples(tmp_path / "raw")
    shutil.copytree(tmp_path / "raw", tmp_path / "elsewhere/deep")
    moved = [
        replace(r, images=(tmp_path / "elsewhere/deep" / r.images[0].relative_to(tmp_path / "raw"),)) for r in rows
    ]
    assert write(tmp_path / "s1", rows).fingerprint == write(tmp_path / "s2", moved).fingerprint


def test_a_store_by_reference_leaves_the_images_where_they_are(tmp_path):
    rows = make_examples(tmp_path / "raw")
    linked, copied = write(tmp_path / "s1", rows, copy=False), write(tmp_path / "s2", rows)
    assert (tmp_path / "s1/images").is_symlink() and linked.fingerprint == copied.fingerprint
    back = store.load(tmp_path / "s1")
    assert [row.images[0].read_bytes() for row in back] == [row.images[0].read_bytes() for row in rows]
    assert all(row.images[0].is_relative_to(tmp_path / "s1") for row in back)
    assert store.verify(tmp_path / "s1").images == len({row.images[0] for row in rows})


def test_a_store_by_reference_is_still_left_by_no_path(tmp_path):
    rows = make_examples(tmp_path / "raw", ("a.png", "b/c.png"))
    (tmp_path / "secret.png").write_bytes(b"x")
    write(tmp_path / "s", rows, copy=False)
    os.symlink(tmp_path / "secret.png", tmp_path / "raw/link.png")
    for image in ("images/../secret.png", "images/link.png"):
        write_rows(tmp_path / "s/data.parquet", [replace(row, images=(Path(image),)) for row in rows])
        with pytest.raises(DataError, match="row 0: image path"):
            store.load(tmp_path / "s")


def test_a_copied_image_has_lost_what_was_written_beside_its_pixels(tmp_path):
    rows = make_examples(tmp_path / "raw", ("a.jpg",))
    exif = Image.Exif()
    exif[0x010E] = "Doe^Jane"
    Image.new("RGB", (8, 8)).save(tmp_path / "raw/a.jpg", exif=exif)
    write(tmp_path / "s", rows)
    [row] = store.load(tmp_path / "s")
    assert b"Jane" in rows[0].images[0].read_bytes() and b"Jane" not in row.images[0].read_bytes()


CHANGES = {
    "id": "d/x",
    "source": "e",
    "question": "What?",
    "options": ("CT", "PET"),
    "target": "B",
    "modality": "OCT",
    "question_type": "Anatomy",
    "patient": "p2",
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_fingerprint_changes_with_every_field(tmp_path, name):
    rows = make_examples(tmp_path / "raw", ("a.png",))
    changed = [replace(rows[0], **{name: CHANGES[name]})]
    assert write(tmp_path / "s1", rows).fingerprint != write(tmp_path / "s2", changed).fingerprint


def test_one_changed_image_byte_or_field_is_found_by_verify(tmp_path):
    write(tmp_path / "s", make_examples(tmp_path / "raw"))
    image = tmp_path / "s/images" / ODD_NAMES[0]
    image.write_bytes(b"pixelz 0")
    for _ in range(2):  # nothing is remembered of a store that is not whole
        with pytest.raises(DataError, match="has changed"):
            store.verify(tmp_path / "s")


def test_a_store_that_was_verified_is_read_again_only_once_a_file_has_changed(tmp_path, monkeypatch):
    read, digest_file = [], store.digest_file
    monkeypatch.setattr(store, "digest_file", lambda image: read.append(image) or digest_file(image))
    rows = make_examples(tmp_path / "raw")
    info = write(tmp_path / "s", rows)
    images = len({row.images[0] for row in rows})
    assert store.verify(tmp_path / "s") == info == store.verify(tmp_path / "s", store.load(tmp_path / "s"))
    assert len(read) == images
    image = tmp_path / "s/images" / ODD_NAMES[0]
    before = image.stat()
    image.write_bytes(image.read_bytes()[:-1] + b"?")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # as big as it was
    with pytest.raises(DataError, match="has changed"):
        store.verify(tmp_path / "s")
    assert len(read) == 2 * images


def test_a_store_is_verified_where_nothing_can_be_remembered(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEDRL_CACHE", str(tmp_path / "file"))
    info = write(tmp_path / "s", make_examples(tmp_path / "raw"))
    assert store.verify(tmp_path / "s") == info == store.verify(tmp_path / "s")


@settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=20), min_size=2, max_size=4))
def test_any_text_survives_the_way_to_disk_and_back(tmp_path_factory, texts):
    root = tmp_path_factory.mktemp("store")
    row = Example(
        id="1", source=texts[0], images=(), question=texts[1], options=tuple(texts), target="B", patient=texts[0]
    )
    write(root / "s", [row])
    assert store.load(root / "s") == [row]


QUESTIONS_OF_ALL_KINDS = (
    {"kind": "multi_select", "target": "A, C", "options": ("mass", "effusion", "fracture")},
    {"kind": "yes_no", "target": "no", "options": ()},
    {"kind": "numeric", "target": "3.5 cm", "options": (), "tolerance": "5 %"},
    {"kind": "short", "target": "left lung", "options": (), "references": ("the left lung", "lung, left")},
    {"kind": "box", "target": "10, 20, 30, 40", "options": ()},
)


def test_questions_of_every_kind_come_back_as_they_were(tmp_path):
    rows = make_examples(tmp_path / "raw", [f"{number}.png" for number in range(5)])
    rows = [replace(row, **kind) for row, kind in zip(rows, QUESTIONS_OF_ALL_KINDS, strict=True)]
    write(tmp_path / "s", rows)
    assert [replace(row, images=()) for row in store.load(tmp_path / "s")] == [replace(row, images=()) for row in rows]
    store.verify(tmp_path / "s")


def test_a_store_from_before_there_were_kinds_still_loads_and_verifies(tmp_path):
    import pyarrow.parquet

    rows = make_examples(tmp_path / "raw")
    for number, row in enumerate(rows):
        row.images[0].write_bytes(f"pixels {number}".encode())
    write(tmp_path / "s", rows, copy=False)
    # As the first stores' was computed: over these fields of these rows.
    assert store.read_info(tmp_path / "s").fingerprint == (
        "073209bfa7fb4a4c4b27cfb10b14672039d4df1b0d6ead8cd1e4f8699f1d12d9"
    )
    file = tmp_path / "s" / "data.parquet"
    table = pyarrow.parquet.read_table(file)
    pyarrow.parquet.write_table(table.drop_columns(["kind", "references", "tolerance"]), file)
    assert {(row.kind, row.references, row.tolerance) for row in store.load(tmp_path / "s")} == {("choice", (), "")}
    store.verify(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "essay"}, "kind 'essay'; the kinds are choice, multi_select"),
        ({"kind": "multi_select", "target": "A, D"}, "target 'A, D', but its options are A, B"),
        ({"kind": "multi_select", "target": "AB"}, "target 'AB', but its options are A, B"),
        ({"kind": "yes_no", "target": "maybe"}, "yes or no"),
        ({"kind": "short", "target": " "}, "an empty target"),
        ({"kind": "short", "target": "x", "options": tuple("abcdefghijk")}, "11 options"),
    ],
)
def test_a_target_that_its_kind_cannot_have_is_refused(tmp_path, change, words):
    rows = make_examples(tmp_path / "raw", ["a.png"])
    with pytest.raises(DataError, match=words):
        write(tmp_path / "s", [replace(rows[0], **change)])
