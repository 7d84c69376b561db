"""OmniMedVQA with all its oddities, on a small tree of the same layout."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from medrl.data import store
from medrl.data.omnimed_names import DATASETS
from medrl.data.omnimedvqa import BadRow, ImportResult, check_bad, counts, read_omnimedvqa
from medrl.errors import DataError, SettingsError

SHARED = os.environ.get("MEDRL_OMNIMED_MINI", "")


def question(number=0, **change):
    """One row as OmniMedVQA writes it; a field changed to ... is left out."""
    row = {
        "dataset": "Chest CT Scan",
        "question_id": f"Chest CT Scan_{number:04d}",
        "question_type": "Disease Diagnosis",
        "question": "What is shown?",
        "gt_answer": "Adenocarcinoma",
        "image_path": "Images/Chest CT Scan/test/a & b (1) [x].tif",
        "option_A": "Normal",
        "option_B": "Adenocarcinoma",
        "option_C": "Large cell carcinoma",
        "option_D": "Squamous cell carcinoma",
        "modality_type": "CT(Computed Tomography)",
    }
    return {key: value for key, value in {**row, **change}.items() if value is not ...}


def make_tree(root: Path, rows, name="Chest CT Scan.json", access="Open-access") -> Path:
    image = root / "Images/Chest CT Scan/test/a & b (1) [x].tif"
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(image, format="TIFF")
    file = root / "QA_information" / access / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return root


def test_a_row_becomes_an_example_whose_target_is_the_letter_of_the_answer_text(tmp_path):
    [example] = read_omnimedvqa(make_tree(tmp_path, [question(7)])).examples
    assert example.id == "Chest CT Scan/Chest CT Scan_0007" and example.source == "Chest CT Scan"
    assert (example.target, example.target_text) == ("B", "Adenocarcinoma")
    assert example.images == (tmp_path / "Images/Chest CT Scan/test/a & b (1) [x].tif",)
    assert (example.modality, example.question_type, example.patient) == ("CT", "Disease Diagnosis", None)


def test_absent_or_null_options_c_and_d_give_two_options(tmp_path):
    yes_no = {"option_A": "No", "option_B": "Yes", "gt_answer": "Yes", "option_C": ..., "option_D": ...}
    rows = [question(0, **yes_no), question(1, **{**yes_no, "option_C": None, "option_D": None})]
    result = read_omnimedvqa(make_tree(tmp_path, rows))
    assert [example.options for example in result.examples] == [("No", "Yes")] * 2 and not result.bad


def test_a_wrong_option_that_is_offered_twice_makes_no_question_bad(tmp_path):
    [example] = read_omnimedvqa(make_tree(tmp_path, [question(0, option_C="None ", option_D="None")])).examples
    assert example.options[2:] == ("None", "None") and example.target_text == "Adenocarcinoma"


def test_the_one_row_with_modality_for_modality_type_is_read(tmp_path):
    rows = [question(0, modality_type=..., modality="CT(Computed Tomography)")]
    assert read_omnimedvqa(make_tree(tmp_path, rows)).examples[0].modality == "CT"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("CT(Computed Tomography)", "CT"), ("MR (Mag-netic Resonance Imaging)", "MRI"), ("X-Ray", "X-Ray"),
        ("ultrasound", "Ultrasound"), ("Dermoscopy", "Dermoscopy"), ("Fundus Photography", "Fundus"),
        ("OCT (Optical Coherence Tomography", "OCT"), ("Microscopy Images", "Microscopy"),
        ("Thermography", "Thermography"),
    ],
)  # fmt: skip
def test_modalities_get_short_names_and_unknown_ones_are_kept(tmp_path, theirs, ours):
    rows = [question(0, modality_type=theirs)]
    assert read_omnimedvqa(make_tree(tmp_path, rows)).examples[0].modality == ours


def test_an_answer_in_another_case_or_spacing_is_found(tmp_path):
    rows = [question(0, gt_answer=" large  cell Carcinoma ")]
    assert read_omnimedvqa(make_tree(tmp_path, rows)).examples[0].target == "C"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gt_answer": "Edema"}, "answer 'Edema' is none of the options"),
        ({"gt_answer": "B"}, "answer 'B' is none of the options"),
        ({"option_A": "NORMAL", "option_C": "normal", "gt_answer": "Normal"}, "'Normal' matches the options A and C"),
        ({"option_C": "Adenocarcinoma "}, "answer 'Adenocarcinoma' matches the options B and C"),
        ({"option_B": ..., "gt_answer": "Normal"}, "missing field option_B"),
        ({"option_C": ..., "gt_answer": "Normal"}, "missing field option_C"),
        ({"option_C": ..., "option_D": ..., "option_B": ...}, "missing field option_B"),
        ({"option_D": 4}, "field option_D is 4"),
        ({"gt_answer": ...}, "missing field gt_answer"),
        ({"question": "  "}, "field question is '  '"),
        ({"question": "half \ud83d"}, "field question is not valid Unicode"),
        ({"modality_type": ...}, "missing field modality_type"),
        ({"image_path": "Images/gone.png"}, "image Images/gone.png does not exist"),
        ({"image_path": "Images"}, "image Images does not exist"),
        ({"image_path": "../secret.png"}, "not a plain path"),
        ({"image_path": "/etc/passwd"}, "not a plain path"),
        ({"image_path": "file:///etc/passwd"}, "not a plain path"),
        ({"image_path": "Images\\a.png"}, "backslash"),
        ({"image_path": "Images/link/secret.png"}, "symbolic link"),
        ({"image_path": "a/" * 5000 + "a.png"}, "longer than file systems take"),
        ({"image_path": "Images/" + "a" * 5000}, "longer than file systems take"),
    ],
)
def test_a_bad_row_is_listed_with_its_place_and_reason(tmp_path, change, reason):
    root = make_tree(tmp_path / "root", [question(0), question(1, **change), question(2)])
    (tmp_path / "secret.png").write_bytes(b"x")
    (root / "Images/link").symlink_to(tmp_path)
    result = read_omnimedvqa(root)
    assert [example.id[-4:] for example in result.examples] == ["0000", "0002"]
    [bad] = result.bad
    assert (bad.file, bad.position) == (Path("QA_information/Open-access/Chest CT Scan.json"), 1)
    assert reason in bad.reason


def test_a_repeated_id_is_bad_the_second_time_and_free_in_another_data_set(tmp_path):
    rows = [question(0), question(0), question(0, dataset="Other")]
    result = read_omnimedvqa(make_tree(tmp_path, rows))
    assert len(result.examples) == 2
    assert [(bad.position, "duplicate id" in bad.reason) for bad in result.bad] == [(1, True)]


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[" * 100_000, ""])
def test_a_file_that_is_no_list_is_bad_as_a_whole_and_never_under_the_limit(tmp_path, content):
    make_tree(tmp_path, [question(i) for i in range(2000)], name="A.json")
    result = read_omnimedvqa(make_tree(tmp_path, content, name="B.json"))
    assert [(bad.file.name, bad.position) for bad in result.bad] == [("B.json", -1)] and len(result.examples) == 2000
    with pytest.raises(DataError, match=r"B.json, the whole file(.|\n)*--max-bad 1$"):
        check_bad(result, 0.5)
    check_bad(result, 1.0)


def test_a_row_that_is_no_object_is_bad_by_itself(tmp_path):
    result = read_omnimedvqa(make_tree(tmp_path, [3, question(1)]))
    assert len(result.examples) == 1 and "int" in result.bad[0].reason


def test_restricted_rows_without_images_are_read_and_counted_as_absent_and_those_with_images_are_used(tmp_path):
    make_tree(tmp_path, [question(0)])
    gone = [question(i, dataset="MIMIC", image_path=f"Images/MIMIC/{i}.png") for i in range(3)]
    wrong = question(9, dataset="MIMIC", gt_answer="Edema", image_path="Images/MIMIC/9.png")
    make_tree(tmp_path, [*gone, wrong], name="MIMIC.json", access="Restricted-access")
    make_tree(tmp_path, [question(0, dataset="Got"), *gone[:1]], name="Got.json", access="Restricted-access")
    result = read_omnimedvqa(tmp_path)
    assert {absent.file.name: absent.questions for absent in result.absent} == {"MIMIC.json": 3, "Got.json": 1}
    assert [example.source for example in result.examples] == ["Chest CT Scan", "Got"]
    assert [(bad.file.name, bad.position) for bad in result.bad] == [("MIMIC.json", 3)]


def test_a_picture_that_cannot_be_decoded_is_a_bad_row_at_import(tmp_path):
    rows = [question(0), question(1, image_path="Images/broken.png")]
    root = make_tree(tmp_path, rows)
    Image.effect_noise((64, 64), 90).save(root / "Images/broken.png")
    whole = (root / "Images/broken.png").read_bytes()
    for content in (whole[:1000], b"<html>", b""):
        (root / "Images/broken.png").write_bytes(content)
        result = read_omnimedvqa(root)
        assert [(bad.position, "broken.png" in bad.reason) for bad in result.bad] == [(1, True)]


def test_data_sets_and_modalities_are_chosen_by_name(tmp_path):
    make_tree(tmp_path, [question(0), question(1, modality_type="X-Ray")])
    make_tree(tmp_path, [question(0, dataset="Blood Cell", modality_type="Microscopy Images")], name="Blood Cell.json")

    def ids(**filters):
        return [example.id for example in read_omnimedvqa(tmp_path, **filters).examples]

    assert ids(datasets=["blood-cell"]) == ["Blood Cell/Chest CT Scan_0000"]
    assert ids(modalities=["x-ray"]) == ["Chest CT Scan/Chest CT Scan_0001"]
    assert len(ids(modalities=["CT(Computed Tomography)", "microscopy"])) == 2
    with pytest.raises(SettingsError, match=r"no data set 'Blood Cells'; it has Blood Cell"):
        ids(datasets=["Blood Cells"])


def test_the_reader_knows_the_published_files_and_says_what_differs(tmp_path):
    assert len(DATASETS) == 42 and sum(sum(sizes.values()) for sizes in DATASETS.values()) == 88_996
    notes = read_omnimedvqa(make_tree(tmp_path / "some", [question(0)])).notes
    assert notes[0] == "Chest CT Scan.json has 1 questions; the published file has 871"
    assert notes[1].startswith("41 of the 42 published open-access files are not here: RadImageNet, ")
    notes = read_omnimedvqa(make_tree(tmp_path / "none", [question(0)], name="Mine.json")).notes
    assert notes == ["none of OmniMedVQA's 42 open-access files is here: this is another data set in its layout"]


def test_a_folder_of_another_layout_is_explained(tmp_path):
    with pytest.raises(DataError, match=r"no QA_information/Open-access/.*OmniMedVQA.zip"):
        read_omnimedvqa(tmp_path)


def test_check_bad_shows_twenty_rows_and_advice_that_works_when_followed():
    example = object()
    result = ImportResult([example] * 70, [BadRow(Path("f.json"), i, "odd") for i in range(30)])  # type: ignore[list-item]
    with pytest.raises(DataError) as caught:
        check_bad(result)
    message = str(caught.value)
    assert message.startswith("30 of 100 rows are bad") and message.count("odd") == 30
    check_bad(result, float(message.rsplit("--max-bad ", 1)[1]))


def test_one_bad_row_in_a_thousand_passes_and_two_do_not():
    bad = [BadRow(Path("f.json"), i, "odd") for i in range(2)]
    check_bad(ImportResult([object()] * 999, bad[:1]))  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"--max-bad 0\.05"):
        check_bad(ImportResult([object()] * 998, bad))  # type: ignore[list-item]


def test_what_is_read_can_be_stored_and_loaded(tmp_path):
    result = read_omnimedvqa(make_tree(tmp_path / "root", [question(0), question(1, question_type="Lesion Grading")]))
    info = store.write_store(tmp_path / "s", result.examples, source="OmniMedVQA", license="mixed")
    back = store.load(tmp_path / "s")
    assert info.images == 1 and counts(back) == counts(result.examples)
    assert counts(back)["question_type"] == {"Disease Diagnosis": 1, "Lesion Grading": 1}
    assert back[0].images[0].name == "a & b (1) [x].png"


@pytest.mark.skipif(not Path(SHARED, "QA_information").is_dir(), reason="MEDRL_OMNIMED_MINI names no OmniMedVQA folder")
def test_a_real_tree_reads_without_a_bad_row_and_survives_the_store(tmp_path):
    result = read_omnimedvqa(Path(SHARED))
    assert not result.bad and len(result.examples) > 1000
    assert set(counts(result.examples)["modality"]) <= {
        "CT", "MRI", "X-Ray", "Ultrasound", "Dermoscopy", "Fundus", "OCT", "Microscopy",
    }  # fmt: skip
    info = store.write_store(tmp_path / "s", result.examples, source="OmniMedVQA", license="mixed")
    assert len(store.load(tmp_path / "s")) == info.rows == len(result.examples)
    assert store.verify(tmp_path / "s").fingerprint == info.fingerprint
