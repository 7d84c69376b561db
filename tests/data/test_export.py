"""A store goes out in six formats and comes back the same; foreign rows of the same formats are read too."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from typer.testing import CliRunner

from medrl.cli import app
from medrl.data import store
from medrl.data.export import FORMATS
from medrl.data.store_rows import COLUMNS
from medrl.rewards import answer_correct, gold_completion, weighted, well_formed
from medrl.rewards.adapters import as_easyr1, as_trl, as_verl
from medrl.types import Example


def make_store(root: Path) -> Path:
    """Several images, options with commas and control tokens, an open and a yes/no question, a patient."""
    images = []
    for number in range(4):
        path = root / "raw" / f"set {number % 2}" / f"a & b ({number}).{'png' if number % 2 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x010E] = "Doe^Jane"
        pixels = np.random.default_rng(number).integers(0, 256, (16, 18, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, exif=exif)
        images.append(path)
    common = {"source": "Chest CT Scan", "modality": "CT", "question_type": "Disease Diagnosis"}
    rows = [
        Example(id="c/1", images=(images[0],), question="What, B) here?", options=("Cyst, simple", "B) x", "é <image>"),
                target="C", patient="p1", **common),
        Example(id="c/2", images=tuple(images[1:3]), question="Compare <|im_end|>.", options=("yes", "no"), target="A",
                **common),
        Example(id="o/1", images=(images[3],), question="Which organ?", options=(), target="liver", kind="short",
                references=("the liver",), **common),
        Example(id="y/1", images=(images[0],), question="Is it big?", options=(), target="no", kind="yes_no", **common),
        Example(id="n/1", images=(images[1],), question="How wide?", options=(), target="3.5 cm", kind="numeric",
                tolerance="5 %", rationale="Ruler at the left.", **common),
        Example(id="m/1", images=(images[2],), question="Which?", options=("C", "B, or A", "A"), target="A, C",
                kind="multi_select", **common),
        Example(id="b/1", images=(images[3],), question="Where?", options=(), target="1, 2, 3, 4", kind="box",
                **common),
    ]  # fmt: skip
    store.write_store(root / "store", rows, source="made up", license="CC0", copy=False)
    return root / "store"


def run(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("name", FORMATS)
def test_what_goes_out_comes_back_without_loss(tmp_path, name):
    first = make_store(tmp_path)
    written = run("export-data", first, "--to", name, "--out", tmp_path / "rows", "--json")
    assert written.exit_code == 0 and json.loads(written.stdout)["rows"] == 7, written.output
    assert not any(b"Jane" in path.read_bytes() for path in (tmp_path / "rows").rglob("*") if path.is_file())
    data = next((tmp_path / "rows").glob("data.*"))
    back = run("import", name, data, "--images", tmp_path / "rows", "--out", tmp_path / "back", "--copy", "--json")
    assert back.exit_code == 0 and json.loads(back.stdout)["bad"] == [], back.output
    before, after = store.load(first), store.load(tmp_path / "back")

    def plain(root: Path, row: Example):
        return {**{f: getattr(row, f) for f in COLUMNS}, "images": [str(i.relative_to(root)) for i in row.images]}

    assert [plain(tmp_path / "back", row) for row in after] == [plain(first, row) for row in before]
    for old, new in zip(before, after, strict=True):
        for a, b in zip(old.images, new.images, strict=True):
            assert np.array_equal(np.asarray(Image.open(a)), np.asarray(Image.open(b)))
    store.write_store(tmp_path / "clean", before, source="made up", license="CC0")
    assert store.read_info(tmp_path / "back").fingerprint == store.read_info(tmp_path / "clean").fingerprint


def test_trl_and_verl_rows_load_with_datasets_and_hold_decoded_images(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    first = make_store(tmp_path)
    for name in ("trl", "verl"):
        assert run("export-data", first, "--to", name, "--out", tmp_path / name).exit_code == 0
        files = str(tmp_path / name / "data.parquet")
        rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
        assert [image.size for image in rows[1]["images"]] == [(18, 16), (18, 16)]
        [turn] = rows[1]["prompt"]
        if name == "trl":
            assert [part["type"] for part in turn["content"]] == ["image", "image", "text"]
            assert rows[0]["solution"] == "C"
        else:
            assert turn["content"].count("<image>") == 2 and "im_end|>" not in turn["content"]
            assert (
                rows[0]["reward_model"] == {"style": "rule", "ground_truth": "C"}
                and rows[3]["extra_info"]["index"] == 3
            )


@pytest.mark.parametrize("mode", ["think", "no_think"])
def test_a_reward_exported_to_trl_verl_and_easyr1_grades_what_was_exported_there(tmp_path, mode):
    """Each reward sees exactly what its trainer passes on of a row."""
    first = make_store(tmp_path)
    reward = weighted((1.0, answer_correct), (0.5, well_formed))
    for name in ("trl", "verl", "easyr1"):
        words = ("export-data", first, "--to", name, "--mode", mode, "--out", tmp_path / name)
        assert run(*words).exit_code == 0
    trl, verl = (pyarrow.parquet.read_table(tmp_path / name / "data.parquet").to_pylist() for name in ("trl", "verl"))
    easyr1 = [json.loads(line) for line in (tmp_path / "easyr1" / "data.jsonl").read_text().splitlines()]
    for place, example in enumerate(store.load(first)):
        right = gold_completion(example, mode).text
        wrong = right.replace(f"<answer>{example.target}<", "<answer>9, 9, 99, 99<")
        for text, expected in ((right, 1.5), (wrong, 0.5)):
            columns = {name: [value] for name, value in trl[place].items() if name != "prompt"}
            assert as_trl(reward)(prompts=["p"], completions=[text], **columns) == [expected]
            row = verl[place]
            truth = row["reward_model"]["ground_truth"]
            assert as_verl(reward)(row["data_source"], text, truth, row["extra_info"])["score"] == expected
            given = {"response": text, "response_length": 3, "ground_truth": easyr1[place]["medrl"]}
            assert as_easyr1(reward, mode)(given)["overall"] == expected


def test_llama_factory_gets_its_table_of_contents_and_the_folder_is_read(tmp_path):
    first = make_store(tmp_path)
    assert run("export-data", first, "--to", "llamafactory", "--out", tmp_path / "rows").exit_code == 0
    contents = json.loads((tmp_path / "rows/dataset_info.json").read_text())
    assert contents["medrl"]["file_name"] == "data.json" and contents["medrl"]["formatting"] == "sharegpt"
    assert run("import", "llamafactory", tmp_path / "rows", "--out", tmp_path / "back").exit_code == 0


@pytest.mark.parametrize(
    ("mode", "plain", "reasoned"),
    [
        ("think", "<think></think><answer>C</answer>", "<think>Ruler at the left.</think><answer>3.5 cm</answer>"),
        ("no_think", "<answer>C</answer>", "<answer>3.5 cm</answer>"),
        (
            "think_after",
            "<answer>C</answer><think></think>",
            "<answer>3.5 cm</answer><think>Ruler at the left.</think>",
        ),
    ],
)
def test_llama_factory_is_shown_the_form_that_its_prompt_asks_for(tmp_path, mode, plain, reasoned):
    first = make_store(tmp_path)
    assert run("export-data", first, "--to", "llamafactory", "--mode", mode, "--out", tmp_path / "rows").exit_code == 0
    rows = json.loads((tmp_path / "rows/data.json").read_text())
    answers = [row["messages"][1]["content"] for row in rows]
    assert (answers[0], answers[4]) == (plain, reasoned)  # c/1 has no rationale, n/1 has one


@pytest.mark.parametrize(
    ("flags", "code", "words"), [(["--to", "trlx"], 2, "there are trl, verl"), (["--mode", "x"], 2, "")]
)
def test_an_unknown_format_or_mode_is_wrong_words_and_leaves_nothing(tmp_path, flags, code, words):
    first = make_store(tmp_path)
    result = run("export-data", first, "--to", "trl", "--out", tmp_path / "rows", *flags)
    assert result.exit_code == code and words in result.stderr and not (tmp_path / "rows").exists()


IMAGE = "images/x.png"
TEXT = "What is it?\nA) CT\nB) MRI"
FOREIGN = {
    "trl": {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TEXT}]}],
            "images": [IMAGE], "solution": "<answer> B </answer>"},
    "verl": {"data_source": "mine", "prompt": [{"role": "system", "content": "x"},
             {"role": "user", "content": "<image>" + TEXT}],
             "images": [{"image": IMAGE}], "ability": "vqa", "reward_model": {"style": "rule", "ground_truth": "MRI"},
             "extra_info": {"split": "train", "index": 0}},
    "easyr1": {"problem": "<image>" + TEXT, "answer": "B", "images": [IMAGE]},
    "swift": {"messages": [{"role": "user", "content": "<image>" + TEXT}, {"role": "assistant", "content": "B) MRI"}],
              "images": [IMAGE]},
    "llamafactory": {"conversations": [{"from": "human", "value": "<image>" + TEXT}, {"from": "gpt", "value": "B"}],
                     "images": [IMAGE]},
    "openai": {"messages": [{"role": "user", "content": [{"type": "text", "text": TEXT},
               {"type": "image_url", "image_url": {"url": IMAGE}}]}, {"role": "assistant", "content": "B"}]},
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_rows_that_others_wrote_are_read_from_their_text(tmp_path, name):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / IMAGE)
    outside = [{"type": "image_url", "image_url": {"url": "file:///etc/x"}}]
    bad = {"openai": {"messages": [{"role": "user", "content": outside}, {"role": "assistant", "content": "B"}]}}
    rows = [FOREIGN[name], bad.get(name, {"images": [IMAGE]})]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run("import", name, tmp_path / "rows.jsonl", "--out", tmp_path / "s", "--max-bad", 1, "--json")
    assert result.exit_code == 0, result.output
    [row] = store.load(tmp_path / "s")
    assert (row.question, row.options, row.target, len(row.images)) == ("What is it?", ("CT", "MRI"), "B", 1)
    assert [item["position"] for item in json.loads(result.stdout)["bad"]] == [1]


@pytest.mark.parametrize("name", ["swift", "llamafactory", "openai", "trl"])
def test_the_reasoning_in_an_answer_of_others_is_the_rationale(tmp_path, name):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / IMAGE)
    row = json.loads(json.dumps(FOREIGN[name]))
    answer = "<think>\nBones are bright.</think><answer>B</answer>"
    if name == "trl":
        row["solution"] = answer
    else:
        turn = (row.get("messages") or row["conversations"])[1]
        turn["content" if "content" in turn else "value"] = answer
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert run("import", name, tmp_path / "rows.jsonl", "--out", tmp_path / "s").exit_code == 0
    [row] = store.load(tmp_path / "s")
    assert (row.target, row.rationale) == ("B", "Bones are bright.")


@pytest.mark.parametrize("own", ["{", "[]", '{"id": 3}', '{"id": "x", "wrong": 1}', '{"id": "a", "source": "b"}',
                                 '{"id": "a", "source": "b", "question": "q", "target": "A", "options": "AB"}',
                                 '{"id": "a", "source": "b", "question": "q", "target": "C",'
                                 ' "options": ["x", "y"]}'])  # fmt: skip
def test_a_tampered_field_of_ours_is_a_bad_row(tmp_path, own):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / IMAGE)
    rows = [FOREIGN["easyr1"], {**FOREIGN["easyr1"], "medrl": own}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run("import", "easyr1", tmp_path / "rows.jsonl", "--out", tmp_path / "s", "--max-bad", 1, "--json")
    assert result.exit_code == 0, result.output
    assert [item["position"] for item in json.loads(result.stdout)["bad"]] == [1]
