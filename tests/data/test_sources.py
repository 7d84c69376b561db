"""Every source in its exact public schema, through the command line and into a store; images are noise."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from typer.testing import CliRunner

from medrl import cli_import
from medrl.cli import app
from medrl.data import store
from medrl.errors import SettingsError
from medrl.types import Example


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path)
    return path


def embedded(seed: int, name: str | None = None) -> dict:
    buffer = io.BytesIO()
    picture(seed).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": name}


def write_json(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def write_parquet(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def imported(out: Path, *arguments: object) -> tuple[dict, list]:
    """What ``medrl import ... --json`` prints, and the store's examples."""
    words = ["import", *map(str, arguments), "--out", str(out), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), store.load(out)


def test_every_import_has_help_with_an_example():
    names = [command.name for command in cli_import.imports.registered_commands]
    assert len(names) == len(set(names)) == 19
    for name in names:
        result = CliRunner().invoke(app, ["import", str(name), "--help"])
        assert result.exit_code == 0 and f"medrl import {name} " in result.stdout


# --- the papers ------------------------------------------------------------------------------------------------------


def med_r1_row(**change):
    row = {
        "image": "Images/Chest CT Scan/test/a & b (1).png",
        "problem": "What is shown? A)Normal, B)Adenocarcinoma (T1, N0), C)Large cell, D)None",
        "solution": "<answer> B </answer>",
    }
    return {**row, **change}


@pytest.mark.parametrize(
    ("name", "modality", "question_type"),
    [
        ("CT(Computed Tomography)_train.json", "CT", "unknown"),
        ("MR (Mag-netic Resonance Imaging)_test.json", "MRI", "unknown"),
        ("OCT (Optical Coherence Tomography_test.json", "OCT", "unknown"),
        ("ultrasound_train.json", "Ultrasound", "unknown"),
        ("X-Ray_test.json", "X-Ray", "unknown"),
        ("Microscopy Images.json", "Microscopy", "unknown"),
        ("Disease Diagnosis_test.json", "CT", "Disease Diagnosis"),
        ("other_biological_attributes-train.json", "CT", "Other Biological Attributes"),
        ("unknown_train.json", "CT", "unknown"),
    ],
)
def test_med_r1_takes_modality_or_question_type_from_the_files_name(tmp_path, name, modality, question_type):
    save(tmp_path / "omni/Images/Chest CT Scan/test/a & b (1).png")
    file = write_json(tmp_path / name, [med_r1_row()])
    printed, [row] = imported(tmp_path / "s", "med-r1", file, "--images", tmp_path / "omni")
    assert (row.modality, row.question_type) == (modality, question_type)
    assert (row.question, row.target_text, row.source) == ("What is shown?", "Adenocarcinoma (T1, N0)", "Chest CT Scan")
    assert printed["rows"] == 1 and printed["by_modality"] == {modality: 1} and printed["bad"] == []


def test_med_r1s_image_convention_is_384_pixels_squared(tmp_path):
    save(tmp_path / "omni/Images/Chest CT Scan/test/a & b (1).png")
    file = write_json(
        tmp_path / "unknown_train.json", [med_r1_row(), med_r1_row(problem="What is shown here? A)x, B)y")]
    )
    _, rows = imported(tmp_path / "s", "med-r1", file, "--images", tmp_path / "omni", "--square", 384)
    with Image.open(rows[0].images[0]) as image:
        assert image.size == (384, 384) and image.mode == "RGB" and image.format == "PNG"
    assert rows[0].images == rows[1].images


def test_bad_rows_are_listed_with_file_position_and_reason_and_stop_the_import(tmp_path):
    save(tmp_path / "omni/Images/Chest CT Scan/test/a & b (1).png")
    rows = [med_r1_row(), med_r1_row(solution="<answer> E </answer>"), med_r1_row(image="../x.png"), "text",
            med_r1_row(problem="no options"), med_r1_row(image="Images/gone.png")]  # fmt: skip
    file = write_json(tmp_path / "X-Ray_train.json", rows)
    words = ["import", "med-r1", str(file), "--images", str(tmp_path / "omni"), "--out", str(tmp_path / "s")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1 and "5 of 6 rows are bad" in result.stderr and not (tmp_path / "s").exists()
    assert "X-Ray_train.json, row 2: image path '../x.png'" in result.stderr
    printed, kept = imported(tmp_path / "s", *words[1:-2], "--max-bad", 1)
    assert [row["position"] for row in printed["bad"]] == [1, 2, 3, 4, 5] and len(kept) == 1
    assert {"file", "position", "reason"} == printed["bad"][0].keys()


def medvlm_row(number: int, **change):
    options = ["Lung", "Breast tissue", "Liver"]
    question = f"Question {number}: what is this?"
    row = {
        "image": [f"images/{number % 3}.png"],
        "problem": question + "".join(f"\n{letter}) {option}" for letter, option in zip("ABC", options, strict=True)),
        "solution": "B",
        "question": question,
        "options": options,
        "answer": "Breast tissue",
        "dataset": "RadImageNet",
        "subset": "open",
    }
    return {**row, **change}


def test_medvlm_r1s_test_file_is_three_hundred_of_each_modality_in_order(tmp_path):
    for number in range(3):
        save(tmp_path / f"images/{number}.png", number)
    file = write_json(tmp_path / "MRI_CT_XRAY_300each_dataset.json", [medvlm_row(i) for i in range(900)])
    printed, rows = imported(tmp_path / "s", "medvlm-r1", file)
    assert printed["by_modality"] == {"MRI": 300, "CT": 300, "X-Ray": 300}
    assert [rows[i].modality for i in (0, 299, 300, 599, 600, 899)] == ["MRI", "MRI", "CT", "CT", "X-Ray", "X-Ray"]
    _, only = imported(tmp_path / "ct", "medvlm-r1", file, "--modality", "ct")
    assert len(only) == 300 and only[0].question.startswith("Question 300:")


def test_medvlm_r1_letter_and_text_must_agree_and_missing_ones_are_made_up_for(tmp_path):
    save(tmp_path / "images/0.png")
    bare = {key: value for key, value in medvlm_row(3).items() if key not in ("question", "options", "answer")}
    huatuo = {key: value for key, value in medvlm_row(6).items() if key not in ("problem", "solution")}
    rows = [medvlm_row(0), medvlm_row(0, answer="Lung"), bare, huatuo, medvlm_row(9, answer="Breast tissue.")]
    file = write_json(tmp_path / "q.json", rows)
    printed, kept = imported(tmp_path / "s", "medvlm-r1", file, "--max-bad", 1)
    assert [(row["position"], "but answer is 'Lung'" in row["reason"]) for row in printed["bad"]] == [(1, True)]
    assert [row.target_text for row in kept] == ["Breast tissue"] * 4 and len(kept[1].images) == 1


# --- question and answer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "modality"), [("vqa-rad", "unknown"), ("path-vqa", "Pathology")])
def test_pairs_in_parquet_become_yes_no_and_short_questions(tmp_path, name, modality):
    rows = [
        {"image": embedded(1), "question": "is there a fracture?", "answer": "Yes"},
        {"image": embedded(1), "question": "which organ is this?", "answer": "the liver"},
        {"image": {"bytes": b"broken", "path": None}, "question": "is it big?", "answer": "no"},
    ]
    write_parquet(tmp_path / "hub/data/test-00000-of-00001.parquet", rows)
    write_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet", rows[:1])
    flags = ["--split", "test", "--max-bad", 1]
    printed, kept = imported(tmp_path / "s", name, tmp_path / "hub", *flags)
    assert [(row.kind, row.target, row.options) for row in kept] == [("yes_no", "yes", ()), ("short", "the liver", ())]
    assert printed["by_modality"] == {modality: 2} and printed["images"] == 1
    assert [row["position"] for row in printed["bad"]] == [2] and "none of PNG" in printed["bad"][0]["reason"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    _, closed = imported(tmp_path / "closed", name, tmp_path / "hub", *flags, "--kind", "yes_no")
    assert len(closed) == 1


def test_vqa_rad_says_its_modality_by_organ_or_by_a_question_on_the_same_picture_or_not_at_all(tmp_path):
    """The public JSON: chest is X-ray and abdomen CT; heads are CT or MRI, and so is everything in the hub's rows."""
    for name in ("chest", "abdomen", "mri", "ct", "twice", "silent"):
        save(tmp_path / f"rad/images/{name}.jpg", len(name))
    rows = [
        ("chest", "CHEST", "Is there a mass?", "No"), ("abdomen", "ABD", "Which organ is enlarged?", "spleen"),
        ("mri", "HEAD", "What imaging modality was used?", "MRI-T2 weighted"), ("mri", "HEAD", "Is it big?", "Yes"),
        ("ct", "HEAD", "Is this a CT of the brain?", "yes"), ("ct", "HEAD", "Is this an MRI image?", "no"),
        ("twice", "HEAD", "What type of imaging is this?", "CT"), ("twice", "HEAD", "Is this an MRI?", "yes"),
        ("silent", "HEAD", "Was this taken with CT or MRI?", "yes"), ("silent", "HEAD", "Are there lesions?", 3),
    ]  # fmt: skip
    names = ("image_name", "image_organ", "question", "answer")
    rows = [dict(zip(names, (f"{row[0]}.jpg", *row[1:]), strict=True)) for row in rows]
    write_json(tmp_path / "rad/VQA_RAD Dataset Public.json", rows)
    _, kept = imported(tmp_path / "s", "vqa-rad", tmp_path / "rad")
    assert [row.modality for row in kept] == ["X-Ray", "CT", *["MRI"] * 2, *["CT"] * 2, *["unknown"] * 4]
    for row in rows:
        del row["image_organ"]
    write_json(tmp_path / "rad/VQA_RAD Dataset Public.json", rows)
    _, kept = imported(tmp_path / "t", "vqa-rad", tmp_path / "rad")
    assert [row.modality for row in kept] == [*["unknown"] * 2, *["MRI"] * 2, *["CT"] * 2, *["unknown"] * 4]


def slake_row(**change):
    row = {"img_id": 1, "img_name": "xmlab1/source.jpg", "question": "Is the lung healthy?", "answer": "No",
           "q_lang": "en", "location": "Lung", "modality": "CT", "answer_type": "CLOSED", "base_type": "vqa",
           "content_type": "Abnormality", "triple": ["vhead", "_", "_"], "qid": 11934}  # fmt: skip
    return {**row, **change}


def test_slake_in_two_languages_open_and_closed(tmp_path):
    save(tmp_path / "SLAKE/imgs/xmlab1/source.jpg")
    rows = [
        slake_row(),
        slake_row(qid=2, question="Which organ is larger?", answer="Lung"),
        slake_row(qid=3, question="What is shown?", answer="Liver, Spleen", answer_type="OPEN"),
        slake_row(qid=4, question="肺健康吗?", answer="不是", q_lang="zh"),
        slake_row(qid=5, question="这是什么?", answer="肝", q_lang="zh", answer_type="OPEN"),
        slake_row(qid=6, answer="Yes", answer_type="OPEN"),
    ]
    write_json(tmp_path / "SLAKE/test.json", rows)
    _, kept = imported(tmp_path / "s", "slake", tmp_path / "SLAKE", "--split", "test")
    assert [(row.kind, row.target_text) for row in kept] == [
        ("yes_no", "no"), ("short", "Lung"), ("short", "Liver, Spleen"), ("choice", "不是"), ("short", "肝"),
        ("short", "Yes"),
    ]  # fmt: skip
    assert kept[0].id == "test/11934" and (kept[0].modality, kept[0].question_type) == ("CT", "Abnormality")
    _, chinese = imported(tmp_path / "zh", "slake", tmp_path / "SLAKE", "--lang", "zh")
    assert [row.options for row in chinese] == [("是", "不是"), ()]


# --- multiple-choice benchmarks --------------------------------------------------------------------------------------

PMC_FILES = {
    "train.csv": "Figure_path,Question ,Answer ,Choice A ,Choice B ,Choice C ,Choice D ,Answer_label\n"
    'PMC1_Fig1.jpg, What is it? ,"CT, axial"," A:MRI "," B:CT, axial "," C:PET "," D:None ",B\n',
    "test_2.csv": "index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split\n"
    '7,PMC1_Fig1.jpg,"A scan, axial",What is it?, A: MRI , B: CT , C: PET , D: None ,B,test\n',
    "v2_choices.csv": "index,Figure_path,Caption,Question,Choices,Answer_label,split\n"
    "7,PMC1_Fig1.jpg,A scan,What is it?,\"['A: MRI', 'B: CT', 'C: PET', 'D: None']\",B,test\n",
    "test_clean.csv": "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\n"
    "PMC1_Fig1.jpg,What is it?,CT,MRI,CT,PET,None,B\n",
}


@pytest.mark.parametrize("name", PMC_FILES)
def test_pmc_vqa_in_its_three_versions(tmp_path, name):
    save(tmp_path / "images/PMC1_Fig1.jpg")
    (tmp_path / name).write_text(PMC_FILES[name])
    _, [row] = imported(tmp_path / "s", "pmc-vqa", tmp_path / name)
    assert row.question == "What is it?" and row.target == "B" and row.target_text.startswith("CT")
    assert row.options[0] == "MRI" and len(row.options) == 4


def mmmu_row(number: int, subject: str = "Clinical_Medicine", **change):
    row = {"id": f"validation_{subject}_{number}", "question": "Compare <image 1> with <image 3>.",
           "options": "['Cyst, \"simple\"', \"Crohn's\", '<image 1>', '4']", "explanation": "",
           "image_1": embedded(1), "image_2": None, "image_3": embedded(3), "img_type": "['Body Scans: MRI']",
           "answer": "B", "topic_difficulty": "Hard", "question_type": "multiple-choice", "subfield": "x"}  # fmt: skip
    return {**row, **{f"image_{n}": None for n in (4, 5, 6, 7)}, **change}


def test_mmmu_reads_lists_in_strings_and_numbers_its_images(tmp_path):
    rows = [
        mmmu_row(1, explanation="The rim enhances."),
        mmmu_row(2, question_type="open", options="[]", answer="['72', '72 bpm']", question="Rate in <image 1>?"),
        mmmu_row(3, options="[__import__('os').system('touch x'), 'b']"),
        mmmu_row(4, question="See <image 2>."),
    ]
    write_parquet(tmp_path / "MMMU/Clinical_Medicine/validation-00000-of-00001.parquet", rows)
    art = write_parquet(tmp_path / "MMMU/Art/validation-00000-of-00001.parquet", [mmmu_row(1, "Art")])
    assert art.exists()
    printed, kept = imported(tmp_path / "s", "mmmu-med", tmp_path / "MMMU", "--max-bad", 1)
    assert [row.id for row in kept] == ["validation_Clinical_Medicine_1", "validation_Clinical_Medicine_2"]
    assert kept[0].question == "Compare [image 1] with [image 2]." and len(kept[0].images) == 2
    assert kept[0].options == ('Cyst, "simple"', "Crohn's", "[image 1]", "4") and kept[0].target == "B"
    assert np.array_equal(np.asarray(Image.open(kept[0].images[1])), np.asarray(picture(3)))
    assert (kept[1].kind, kept[1].target, kept[1].references) == ("short", "72", ("72 bpm",))
    assert [row.rationale for row in kept] == ["The rim enhances.", None]
    assert [row["position"] for row in printed["bad"]] == [2, 3] and "no image_2" in printed["bad"][1]["reason"]
    assert printed["by_question_type"] == {"Clinical Medicine": 2}


def test_medxpertqa_drops_the_choices_from_the_question_and_keeps_several_images(tmp_path):
    for name in ("MM-26-a.jpeg", "MM-26-b.jpeg"):
        save(tmp_path / f"MM/images/{name}", len(name))
    row = {
        "id": "MM-26",
        "question": "A 3-year-old limps. What next?\nAnswer Choices: (A) X-ray (B) MRI (C) Rest (D) Surgery (E) Cast",
        "options": {"A": "X-ray", "B": "MRI", "C": "Rest", "D": "Surgery", "E": "Cast"},
        "label": "E",
        "images": ["MM-26-a.jpeg", "MM-26-b.jpeg"],
        "medical_task": "Treatment",
        "body_system": "Skeletal",
        "question_type": "Reasoning",
    }
    path = tmp_path / "MM/test.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "id": "T-1", "images": []}) + "\nnot json\n")
    printed, [kept] = imported(tmp_path / "s", "medxpertqa", path, "--max-bad", 1)
    assert kept.question == "A 3-year-old limps. What next?" and kept.target_text == "Cast" and len(kept.images) == 2
    assert kept.question_type == "Reasoning" and [row["position"] for row in printed["bad"]] == [1, 2]


# --- tables, hub, folders --------------------------------------------------------------------------------------------

GERMAN = [
    {"Bild": "a.png", "Frage": "Was ist das?", "A": "Leber", "B": "Milz", "Antwort": "Milz", "Patient": "P1"},
    {"Bild": "a.png|b.png", "Frage": "Größer?", "A": "links", "B": "rechts", "Antwort": "A", "Patient": "P1"},
]
PAIRS = ("image=Bild", "question=Frage", "option_A=A", "option_B=B", "answer=Antwort", "patient=Patient")
MAP = [word for pair in PAIRS for word in ("--map", pair)]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_a_table_with_mapped_columns(tmp_path, suffix):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png", 1)
    path = tmp_path / f"fragen.{suffix}"
    mark = "\t" if suffix == "tsv" else ","
    if suffix == "parquet":
        write_parquet(path, GERMAN)
    elif suffix == "json":
        write_json(path, GERMAN)
    elif suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in GERMAN))
    else:
        path.write_text("\n".join(mark.join(line) for line in [list(GERMAN[0]), *(row.values() for row in GERMAN)]))
    salt = ["--salt", tmp_path / "salt"]
    _, rows = imported(tmp_path / "s", "table", path, *MAP, *salt)
    assert [row.target_text for row in rows] == ["Milz", "links"] and [len(row.images) for row in rows] == [1, 2]
    assert rows[0].patient == rows[1].patient != "P1"
    _, kept = imported(tmp_path / "k", "table", path, *MAP, "--patients-are-pseudonyms")
    assert kept[0].patient == "P1"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--map", "frage=x"], "no field 'frage'"),
        (["--map", "questoin=Frage"], "it has question"),
        (["--map", "question"], "OURS=THEIRS"),
        (["--map", "question=Fragen"], "no column 'Fragen'; it has Bild, Frage"),
        (["--window", "liver"], "window 'liver' is unknown"),
        (["--slices", "first"], "means nothing here"),
    ],
)
def test_a_mapping_or_view_that_means_nothing_is_wrong_words(tmp_path, flags, words):
    path = write_json(tmp_path / "t.json", GERMAN)
    result = CliRunner().invoke(app, ["import", "table", str(path), "--out", str(tmp_path / "s"), *flags])
    assert result.exit_code == 2 and words in result.stderr
    assert sorted(item.name for item in tmp_path.iterdir()) == ["t.json"]


def test_a_table_of_volumes_becomes_slices(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    volume = np.random.default_rng(0).integers(-1000, 1000, (12, 14, 9)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "v.nii.gz")
    path = write_json(
        tmp_path / "t.json", [{"image": "v.nii.gz", "question": "Q?", "options": ["x", "y"], "answer": "x"}]
    )
    flags = ["--slices", "uniform:3", "--plane", "coronal", "--window", "lung,abdomen,bone"]
    _, [row] = imported(tmp_path / "s", "table", path, *flags)
    assert len(row.images) == 3 and Image.open(row.images[0]).size == (12, 9) and "v.nii" not in str(row.images)


def test_a_hub_data_set_is_loaded_through_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"image": datasets.Image(), "Q": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    rows = [{"image": embedded(i), "Q": "Is it big?", "answer": ["yes", "no"][i % 2]} for i in range(4)]
    (tmp_path / "hub/data").mkdir(parents=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "hub/data/test-00000-of-00001.parquet")
    (tmp_path / "hub/README.md").write_text("---\nlicense: mit\n---\n")
    _, kept = imported(tmp_path / "s", "hub", tmp_path / "hub", "--split", "test", "--map", "question=Q")
    assert [row.target for row in kept] == ["yes", "no", "yes", "no"]
    assert np.array_equal(np.asarray(Image.open(kept[3].images[0])), np.asarray(picture(3)))


def test_classes_of_a_hub_data_set_are_read_by_their_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "choices": datasets.Sequence(datasets.Value("string")),
            "label": datasets.ClassLabel(names=["A", "B"]),
        }
    )
    rows = [{"image": embedded(i), "question": "?", "choices": ["cyst", "mass"], "label": i % 2} for i in range(3)]
    (tmp_path / "hub/data").mkdir(parents=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "hub/data/test-00000-of-00001.parquet")
    _, kept = imported(tmp_path / "s", "hub", tmp_path / "hub", "--split", "test")
    assert [row.target_text for row in kept] == ["cyst", "mass", "cyst"]


def test_a_path_that_is_not_there_is_explained(tmp_path):
    for name in ("vqa-rad", "med-r1"):
        result = CliRunner().invoke(app, ["import", name, str(tmp_path / "gone"), "--out", str(tmp_path / "s")])
        assert result.exit_code == 1 and "does not exist" in result.stderr, result.output
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["import", "slake", str(tmp_path / "empty"), "--out", str(tmp_path / "s")])
    assert result.exit_code == 1 and "holds no SLAKE" in result.stderr


def test_folders_of_labels_become_choices_that_other_images_do_not_change(tmp_path):
    for number, label in enumerate(["benign_mole", "melanoma", "melanoma", "nevus", "wart", "cyst"]):
        save(tmp_path / f"skin/{label}/deep/{number}.png", number)
    flags = ["--question", "Which lesion does this {modality} image show?", "--modality", "Dermoscopy"]
    _, rows = imported(tmp_path / "s", "folder", tmp_path / "skin", *flags)
    assert len(rows) == 6 and {row.question for row in rows} == {"Which lesion does this Dermoscopy image show?"}
    assert [row.target_text for row in rows][:2] == ["benign mole", "cyst"] and all(
        len(set(row.options)) == 4 for row in rows
    )
    save(tmp_path / "skin/wart/new.png", 99)
    _, more = imported(tmp_path / "s2", "folder", tmp_path / "skin", *flags)
    assert {row.id: row.options for row in rows}.items() <= {row.id: row.options for row in more}.items()
    lonely = save(tmp_path / "one/a/1.png").parent.parent
    result = CliRunner().invoke(app, ["import", "folder", str(lonely), "--out", str(tmp_path / "x")])
    assert result.exit_code == 1 and "a choice needs two" in result.stderr


def test_images_that_keep_their_names_are_linked_to_and_copied_when_asked(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png", 1)
    path = write_json(tmp_path / "t.json", GERMAN)
    flags = [*MAP, "--salt", tmp_path / "salt", "--names", "keep"]
    imported(tmp_path / "linked", "table", path, *flags)
    imported(tmp_path / "copied", "table", path, *flags, "--copy")
    assert (tmp_path / "linked/images").is_symlink() and not (tmp_path / "copied/images").is_symlink()
    assert store.read_info(tmp_path / "linked").fingerprint == store.read_info(tmp_path / "copied").fingerprint


def everything_written(store: Path) -> str:
    """Names, rows and bytes of a store."""
    rows = repr(pyarrow.parquet.read_table(store / "data.parquet").to_pylist())
    files = [path for path in store.rglob("*") if path.is_file()]
    return rows + "".join(f"{path}{path.read_bytes().decode('latin-1')}" for path in files)


def test_names_of_folders_and_files_reach_no_store_of_ones_own_pictures(tmp_path):
    for label, number in (("cyst", 1), ("mass", 2)):
        save(tmp_path / f"ward/{label}/DOE_JOHN/DOE-{number}.png", number)
    shutil.copy(tmp_path / "ward/mass/DOE_JOHN/DOE-2.png", tmp_path / "ward/mass/DOE_JOHN/DOE-3.PNG")
    rows = [{"image": f"{label}/DOE_JOHN/DOE-{n}.png", "question": "?", "answer": "yes", "patient": "DOE_JOHN"}
            for label, n in (("cyst", 1), ("mass", 2))]  # fmt: skip
    table, salt = write_json(tmp_path / "t.json", rows), ["--salt", tmp_path / "salt"]
    _, of_folder = imported(tmp_path / "f", "folder", tmp_path / "ward")
    _, of_table = imported(tmp_path / "t", "table", table, "--images", tmp_path / "ward", *salt)
    assert len(of_folder) == 3 and len({row.id for row in of_folder}) == 3  # two with the same bytes
    assert len(of_table) == 2 and len({row.patient for row in of_table}) == 1
    for name in ("f", "t"):
        assert "DOE" not in everything_written(tmp_path / name)
    _, again = imported(tmp_path / "again", "folder", tmp_path / "ward")
    assert [row.id for row in again] == [row.id for row in of_folder]
    _, kept = imported(tmp_path / "kept", "folder", tmp_path / "ward", "--names", "keep")
    assert kept[0].id == "cyst/DOE_JOHN/DOE-1.png" and (tmp_path / "kept/images").is_symlink()


def test_names_made_of_digests_do_not_go_with_a_link(tmp_path):
    row = Example(id="1", source="s", images=(save(tmp_path / "a.png"),), question="?", options=("a", "b"), target="A")
    with pytest.raises(SettingsError, match="copy=True"):
        store.write_store(tmp_path / "s", [row], source="s", license="l", copy=False, names="digest")


def test_pictures_that_differ_in_their_suffix_alone_are_redrawn_as_two(tmp_path):
    paths = ["a/1.png", "a/1.jpg", "b/1.png"]
    for number, path in enumerate(paths):
        save(tmp_path / path, number)
    rows = [{"image": path, "question": "?", "answer": "yes"} for path in [*paths, "a/1.png"]]
    table = write_json(tmp_path / "t.json", rows)
    for names in ("keep", "digest"):
        _, kept = imported(tmp_path / names, "table", table, "--square", 8, "--names", names)
        assert len({row.images[0].read_bytes() for row in kept}) == 3 and kept[0].images == kept[3].images
        drawn = [np.asarray(Image.open(row.images[0])) for row in kept]
        assert all(np.array_equal(one, np.asarray(Image.open(tmp_path / path).resize((8, 8))))
                   for one, path in zip(drawn, paths, strict=False))  # fmt: skip
