"""What released files hold beside their schema: other files, splits inside rows, padding, instructions."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medrl.cli import app
from medrl.data import store
from medrl.data.readers.fields import fields_of, option_list
from medrl.data.readers.inline import split_inline


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path, format="PNG")
    return path


def written(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content)
    if isinstance(content, list) and path.suffix == ".jsonl":
        text = "\n".join(map(json.dumps, content))
    path.write_text(text, encoding="utf-8")
    return path


def run(name: str, path: Path, *flags: object):
    out = path.parent / "store"
    words = ["import", name, path, "--out", out, *flags]
    return CliRunner().invoke(app, [str(word) for word in words]), out


def kept(name: str, path: Path, *flags: object):
    result, out = run(name, path, *flags)
    assert result.exit_code == 0, result.output
    return store.load(out)


def slake(number: int, **change):
    row = {"img_name": f"xmlab{number}/source.jpg", "question": "Is it big?", "answer": "No", "q_lang": "en",
           "modality": "CT", "answer_type": "CLOSED", "content_type": "Size", "qid": number}  # fmt: skip
    return {**row, **change}


def test_slake_as_unpacked_has_copies_of_its_questions_beside_every_picture(tmp_path):
    root = tmp_path / "Slake1.0"
    for number, name in enumerate(("train", "validate", "test")):
        save(root / f"imgs/xmlab{number}/source.jpg", number)
        written(root / f"imgs/xmlab{number}/question.json", [slake(number)])
        written(root / f"imgs/xmlab{number}/detection.json", [{"Liver": [1.0, 2.0, 3.0, 4.0]}])
        written(root / f"{name}.json", [slake(number)])
    (root / "KG").mkdir()
    (root / "KG/en_disease.csv").write_text("disease#attribute#value\nPneumonia#symptom#cough\n")
    assert [row.id for row in kept("slake", root)] == ["test/2", "train/0", "validate/1"]


def test_excerpts_of_slake_without_language_and_type_are_read(tmp_path):
    save(tmp_path / "x.png")
    bare = [
        {"image": "x.png", "question": asked, "answer": answer} for asked, answer in (("Big?", "Yes"), ("大吗", "是"))
    ]
    rows = kept("slake", written(tmp_path / "slake.json", bare))
    assert [(row.kind, row.target_text) for row in rows] == [("yes_no", "yes"), ("choice", "是")]


@pytest.mark.parametrize("given", ["folder", "file"])
def test_vqa_rads_official_test_set_is_named_in_its_rows(tmp_path, given):
    save(tmp_path / "rad/VQA_RAD Image Folder/synpic1.jpg")
    kinds = ("freeform", "test_freeform", "para", "test_para")
    rows = [
        {"image_name": "synpic1.jpg", "image_organ": "CHEST", "phrase_type": kind, "question": f"{kind}?", "answer": 1}
        for kind in kinds
    ]
    file = written(tmp_path / "rad/VQA_RAD Dataset Public.json", rows)
    path = file if given == "file" else file.parent
    assert [row.question for row in kept("vqa-rad", path, "--split", "test")] == ["test_freeform?", "test_para?"]


def test_a_split_that_neither_name_nor_rows_say_is_not_passed_over(tmp_path):
    save(tmp_path / "x.png")
    file = written(tmp_path / "all.json", [{"image": "x.png", "question": "Q?", "answer": "yes"}])
    result, out = run("path-vqa", file, "--split", "test")
    assert result.exit_code == 1 and "the row has no field split" in result.output and not out.exists()


def test_a_split_may_be_the_name_of_a_folder(tmp_path):
    save(tmp_path / "omni/Images/Covid CT/a.png")
    row = {"image": "Images/Covid CT/a.png", "problem": "What? A)CT, B)MRI", "solution": "<answer> A </answer>"}
    for side in ("train", "test"):
        written(tmp_path / f"Splits/{side}/CT.json", [row])
    [found] = kept("med-r1", tmp_path / "Splits", "--split", "test", "--images", tmp_path / "omni")
    assert found.id == "test/CT/0"


def test_pmc_vqa_with_a_repeated_index_and_with_blank_choices(tmp_path):
    save(tmp_path / "images/f.jpg")
    head = "index,Figure_path,Question,Choice A,Choice B,Choice C,Choice D,Answer,split\n"
    (tmp_path / "test_2.csv").write_text(
        head + "7,f.jpg,One?, A:x , B:y , C:z , ,B,test\n7,f.jpg,Two?, A:x , B:y ,,,A,test\n"
    )
    assert [row.options for row in kept("pmc-vqa", tmp_path / "test_2.csv")] == [("x", "y", "z"), ("x", "y")]


def test_medxpertqas_text_part_is_left_aside_and_mmmus_hidden_answers_are_explained(tmp_path):
    save(tmp_path / "MX/images/a.jpeg")
    options = [{"letter": "A", "content": "x"}, {"letter": "B", "content": "y"}]
    row = {"id": "MM-0", "question": "Q?", "options": options, "label": "B", "images": ["a.jpeg"]}
    written(tmp_path / "MX/MM/test.jsonl", [row])
    written(tmp_path / "MX/Text/test.jsonl", [{**row, "id": "Text-0", "images": None}])
    assert [row.target_text for row in kept("medxpertqa", tmp_path / "MX")] == ["y"]
    hidden = {"id": "test_Pharmacy_1", "question": "Q?", "options": "['x', 'y']", "image_1": "a.jpeg", "answer": "?"}
    result, _ = run("mmmu-med", written(tmp_path / "MX/images/test.json", [hidden]))
    assert result.exit_code == 1 and "its answer is kept back" in result.output


def test_options_padded_with_nulls_or_written_as_objects():
    assert option_list(["x", "y", None, None]) == ("x", "y")
    assert option_list([{"value": "x", "key": "A"}, {"value": "B", "key": "B"}]) == ("x", "B")


def test_nan_of_a_data_frame_is_absent_and_no_patient_of_that_name(tmp_path):
    assert fields_of({"a": float("nan"), "b": 1.5}) == {"a": None, "b": 1.5}
    save(tmp_path / "x.png")
    row = {"image": "x.png", "question": "Q?", "answer": "yes", "patient": float("nan")}
    [found] = kept("table", written(tmp_path / "t.json", [row]))
    assert found.patient is None


def test_columns_are_known_in_any_case_and_spacing(tmp_path):
    save(tmp_path / "x.png")
    row = {"Image Path": "x.png", "Question": "Q?", "Option A": "x", "Option B": "y", "Answer": "y", "Modality": "CT"}
    [found] = kept("table", written(tmp_path / "t.json", [row]))
    assert (found.options, found.target, found.modality) == (("x", "y"), "B", "CT")


@pytest.mark.parametrize(
    "behind",
    [
        " You FIRST think about the reasoning process and then provide the final answer in \\boxed{}.",
        "\nPlease think step by step.",
        " First output the thinking process in <think> </think> tags and then the answer in <answer> </answer> tags.",
        "\nAnswer with the option's letter from the given choices directly.",
    ],
)
def test_a_recipes_instruction_is_no_part_of_the_last_option(tmp_path, behind):
    save(tmp_path / "x.png")
    row = {"images": ["x.png"], "problem": f"<image>What is it? A) CT, B) MRI{behind}", "answer": "B"}
    [found] = kept("easyr1", written(tmp_path / "t.jsonl", [row]))
    assert (found.question, found.options) == ("What is it?", ("CT", "MRI"))


def test_a_trainers_row_that_asks_in_the_words_of_an_instruction_keeps_its_question(tmp_path):
    save(tmp_path / "x.png")
    asked = "Please say what you think it is: A) CT, B) MRI. Write <answer> </answer>."
    rows = [
        {"image": "x.png", "problem": asked, "answer": "B"},
        {"image": "x.png", "problem": "Which?", "answer": "B"},
    ]
    result, out = run("trl", written(tmp_path / "t.jsonl", rows), "--max-bad", 1)
    [found] = store.load(out)
    assert found.question == "Please say what you think it is:" and found.options == ("CT", "MRI.")
    assert "row 1: holds no options" in result.output


@pytest.mark.parametrize(
    "row",
    [
        {"query": "<image>Q? A) x, B) y", "response": "B", "images": ["x.png"]},
        {"instruction": "<image>Q?", "input": "A) x\nB) y", "output": "B", "images": ["x.png"]},
        {"body": {"messages": [{"role": "user", "content": "Q? A) x, B) y"}]}, "image": "x.png", "answer": "B"},
        {"image": "x.png", "messages": [
            {"role": "user", "content": [{"type": "input_text", "text": "Q? A) x, B) y"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "B"}]}]},
    ],
)  # fmt: skip
def test_other_writings_of_the_trainers_rows(tmp_path, row):
    save(tmp_path / "x.png")
    [found] = kept("swift", written(tmp_path / "t.jsonl", [row]))
    assert (found.question, found.options, found.target) == ("Q?", ("x", "y"), "B")


def test_a_table_of_contents_with_several_files_asks_for_one(tmp_path):
    for name in ("a", "b"):
        written(tmp_path / f"rows/{name}.json", [])
    written(tmp_path / "rows/dataset_info.json", {name: {"file_name": f"{name}.json"} for name in ("a", "b", "gone")})
    result, out = run("llamafactory", tmp_path / "rows")
    assert result.exit_code == 1 and "(a.json, b.json): give one of them" in result.output and not out.exists()


def test_a_folder_of_images_with_metadata_is_loaded_through_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    save(tmp_path / "hub/train/a.png")
    row = {"file_name": "a.png", "question": "Q?", "options": ["x", "y"], "answer": "y"}
    written(tmp_path / "hub/train/metadata.jsonl", [row])
    [found] = kept("hub", tmp_path / "hub", "--split", "train")
    assert found.target_text == "y" and found.images[0].name.startswith("image-")  # a digest, not a name


def test_a_letter_inside_the_first_option_does_not_begin_the_options():
    for between in (", ", "\n"):
        problem = f"What is it?{between[-1]}A)Stage I, A) early{between}B)Late"
        assert split_inline(problem) == ("What is it?", ("Stage I, A) early", "Late"))
