"""The two papers' files as they are in the world: other roots, other letters, moved pictures, sets saved to disk."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medrl.cli import app
from medrl.data import store
from medrl.data.readers.names import domains_of, modality_of_image


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path, format="PNG")
    return path


def imported(folder: Path, name: str, path: Path, *flags: object) -> tuple[dict, list]:
    """What ``medrl import NAME PATH --json`` prints, and the store's examples."""
    out = folder / "store"
    words = ["import", name, path, "--out", out, "--json", "--max-bad", 1, *flags]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), store.load(out)


def written(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


CELL = "Images/Covid CT/CT_COVID/bmj.m606.full-p4-22%3.png"


def med_r1(**change):
    row = {
        "image": CELL,
        "problem": "What is depicted? A)x_ray., B)No, It's normal, C)A, D)Positron Emission Tomography (PET) scan",
        "solution": "<answer> A </answer>",
    }
    return {**row, **change}


def test_a_solutions_letter_is_a_letter_even_where_an_option_is_called_so(tmp_path):
    save(tmp_path / "omni" / CELL)
    _, [row] = imported(
        tmp_path, "med-r1", written(tmp_path / "unknown_train.json", [med_r1()]), "--images", tmp_path / "omni"
    )
    assert (row.target, row.options[2], row.modality, row.source) == ("A", "A", "CT", "Covid CT")


@pytest.mark.parametrize(
    ("cell", "images"),
    [
        ("./" + CELL, "omni"),
        ("OmniMedVQA/" + CELL, "omni"),
        ("/home/someone/data/OmniMedVQA/" + CELL, "omni"),
        ("D:\\data\\" + CELL.replace("/", "\\"), "omni"),
        (CELL.replace("Images", "images"), "omni"),
        (CELL.removeprefix("Images/"), "omni"),
        (CELL, "omni/Images"),
        ([CELL], "omni"),
        ("images/" + CELL.rsplit("/", 1)[1], "omni"),
        (CELL.rsplit("/", 1)[1], "omni"),
    ],
)
def test_a_picture_is_found_whatever_root_its_row_was_written_with(tmp_path, cell, images):
    save(tmp_path / "omni" / CELL)
    file = written(tmp_path / "CT_train.json", [med_r1(image=cell)])
    printed, rows = imported(tmp_path, "med-r1", file, "--images", tmp_path / images)
    assert len(rows) == 1, printed["bad"]
    assert rows[0].images[0].resolve() == (tmp_path / "omni" / CELL).resolve()


def test_a_picture_found_by_its_name_alone_is_told_and_one_of_two_is_never_guessed(tmp_path):
    for name in ("a/one.png", "a/7.png", "b/7.png"):
        save(tmp_path / "omni/Images" / name)
    rows = [med_r1(image="images/one.png"), med_r1(image="images/7.png"), med_r1(image="images/gone.png")]
    printed, kept = imported(tmp_path, "med-r1", written(tmp_path / "CT.json", rows), "--images", tmp_path / "omni")
    assert len(kept) == 1 and "1 picture was found by its file's name alone" in printed["notes"][0]
    assert "2 files have its name" in printed["bad"][0]["reason"] and "does not exist" in printed["bad"][1]["reason"]


@pytest.mark.parametrize(
    "cell", ["../secret.png", "/etc/Images/../../secret.png", "%2e%2e/secret.png", "..\\secret.png"]
)
def test_generosity_does_not_lead_out_of_the_root(tmp_path, cell):
    save(tmp_path / "secret.png")
    save(tmp_path / "omni" / CELL)
    file = written(tmp_path / "CT.json", [med_r1(), med_r1(image=cell)])
    printed, kept = imported(tmp_path, "med-r1", file, "--images", tmp_path / "omni")
    assert len(kept) == 1 and len(printed["bad"]) == 1


@pytest.mark.parametrize(
    ("path", "modality", "question_type"),
    [
        ("CT_384.json", "CT", "unknown"),
        ("VQA_OCT_train.json", "OCT", "unknown"),
        ("open_access_sft_data_hf_modality_OCT_train_test", "OCT", "unknown"),
        ("MR (Mag-netic Resonance Imaging)_train (1).json", "MRI", "unknown"),
        ("mri_600.jsonl", "MRI", "unknown"),
        ("XRay-test.json", "X-Ray", "unknown"),
        ("X_Ray.json", "X-Ray", "unknown"),
        ("train_US.json", "Ultrasound", "unknown"),
        ("fundus.train.json", "Fundus", "unknown"),
        ("DiseaseDiagnosis_test.json", "unknown", "Disease Diagnosis"),
        ("VQA_Other_Bio.json", "unknown", "Other Biological Attributes"),
        ("CT_Disease Diagnosis_test.json", "CT", "Disease Diagnosis"),
        ("Modality Recognition_test.json", "unknown", "Modality Recognition"),
        ("question_type/test/Modality Recognition_test.json", "unknown", "Modality Recognition"),
        ("Dermoscopy/train.json", "Dermoscopy", "unknown"),
        ("MRI_CT_XRAY_300each_dataset.json", "unknown", "unknown"),
        ("CT/MRI_and_US.json", "unknown", "unknown"),
        ("unknown_train.json", "unknown", "unknown"),
        ("action.json", "unknown", "unknown"),
    ],
)
def test_a_files_name_says_what_is_in_it(path, modality, question_type):
    assert domains_of(Path(path)) == (modality, question_type)


@pytest.mark.parametrize(
    ("image", "modality"),
    [
        ("Images/RadImageNet/meniscal_abnormality/knee158838.png", "MRI"),
        ("Images/RadImageNet/normal/mri-abd-normal054078.png", "MRI"),
        ("Images/RadImageNet/pancreatic_lesion/mrabd021030.png", "MRI"),
        ("Images/RadImageNet/normal/abd-normal022017.png", "CT"),
        ("Images/RadImageNet/nodule/lung040497.png", "CT"),
        ("Images/RadImageNet/uterus/usn245526.png", "Ultrasound"),
        ("Images/RadImageNet/x/other1.png", "unknown"),
        ("Images/Retinal OCT-C8/test/MH/mh_test_1338.jpg", "OCT"),
        ("Images/OCT & X-Ray 2017/test/PNEUMONIA/person18_virus_49.jpeg", "X-Ray"),
        ("Images/OCT & X-Ray 2017/test/DRUSEN/DRUSEN-1219884-1.jpeg", "OCT"),
        ("Images/OCT & X-Ray 2017/test/NORMAL/NORMAL-1384-1.jpeg", "unknown"),
        ("Images/Somebody's/1.png", "unknown"),
    ],
)
def test_a_picture_s_place_in_omnimedvqa_says_its_modality(image, modality):
    assert modality_of_image(image) == modality


def test_question_type_files_get_modalities_from_their_pictures(tmp_path):
    cells = ["Images/RadImageNet/uterus/usn245526.png", "Images/RadImageNet/normal/abd-normal022017.png"]
    for number, cell in enumerate(cells):
        save(tmp_path / "omni" / cell, number)
    file = written(tmp_path / "Disease Diagnosis_test.json", [med_r1(image=cell) for cell in cells])
    printed, _ = imported(tmp_path, "med-r1", file, "--images", tmp_path / "omni")
    assert printed["by_modality"] == {"CT": 1, "Ultrasound": 1} and printed["by_question_type"] == {
        "Disease Diagnosis": 2
    }


# --- MedVLM-R1 -------------------------------------------------------------------------------------------------------


def medvlm(**change):
    row = {
        "image": ["images/brain002206.png"],
        "problem": "What is apparent?\nA) Hemorrhage\nB) No, It's normal.",
        "solution": "B",
        "question": "What is apparent?",
        "options": ["Hemorrhage", "No, It's normal."],
        "answer": "No, It's normal.",
        "dataset": "OmniMedVQA",
        "subset": "MR (Mag-netic Resonance Imaging)",
    }
    return {**row, **change}


@pytest.mark.parametrize(
    "change",
    [
        {"image": "images/brain002206.png"},
        {"image": ["brain002206.png"]},
        {"options": "['Hemorrhage', \"No, It's normal.\"]"},
        {"options": "A) Hemorrhage, B) No, It's normal."},
        {"options": ["a. Hemorrhage", "b. No, It's normal."]},
        {"options": {"A": "Hemorrhage", "B": "No, It's normal."}},
        {"solution": "<answer>\nB\n</answer>"},
        {"solution": "No, it's normal", "answer": "(B)"},
        {"solution": "b", "answer": "No its normal"},
        {"solution": "B) No, It's normal."},
        {"answer": None},
        {"solution": None},
        {"question": None},
        {"options": None, "question": None, "answer": "B"},
        {"subset": "MRI"},
    ],
)
def test_a_question_of_medvlm_r1_is_read_in_every_writing(tmp_path, change):
    save(tmp_path / "omni/Images/RadImageNet/normal/brain002206.png")
    row = {name: value for name, value in medvlm(**change).items() if value is not None}
    printed, rows = imported(tmp_path, "medvlm-r1", written(tmp_path / "q.json", [row]), "--images", tmp_path / "omni")
    assert len(rows) == 1, printed["bad"]
    [row] = rows
    assert (row.question, row.target, row.modality) == ("What is apparent?", "B", "MRI")
    assert row.options == ("Hemorrhage", "No, It's normal.") and len(row.images) == 1


def test_what_a_row_says_of_its_modality_goes_before_its_place_in_the_file(tmp_path):
    save(tmp_path / "images/brain002206.png")
    said = ["CT(Computed Tomography)", "X-Ray", "MR (Mag-netic Resonance Imaging)"]
    rows = [medvlm(subset=said[number % 3]) for number in range(900)]
    printed, _ = imported(tmp_path, "medvlm-r1", written(tmp_path / "shuffled.json", rows))
    assert printed["by_modality"] == {"CT": 300, "X-Ray": 300, "MRI": 300}


def test_a_set_that_was_saved_to_disk_for_training_is_read(tmp_path, monkeypatch):
    """Med-R1's scripts train on ``DatasetDict.save_to_disk`` with pictures of 384 x 384 inside."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "problem": datasets.Value("string"), "solution": datasets.Value("string")}
    )
    rows = [med_r1(image=str(save(tmp_path / f"{number}.png", number))) for number in range(3)]
    parts = {"train": datasets.Dataset.from_list(rows, features=features)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "CT_384")
    printed, kept = imported(tmp_path, "med-r1", tmp_path / "CT_384")
    assert printed["by_modality"] == {"CT": 3} and len({row.images for row in kept}) == 3
    again = tmp_path / "again"
    again.mkdir()
    flags = ["--map", "question=problem", "--map", "answer=solution", "--split", "train"]
    _, same = imported(again, "hub", tmp_path / "CT_384", *flags)
    assert [(row.question, row.options, row.target) for row in same] == [
        (row.question, row.options, row.target) for row in kept
    ]
