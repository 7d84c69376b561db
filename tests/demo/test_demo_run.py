"""The demo end to end at a small size, and what is promised of the base model it starts from."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nilearn")
pytest.importorskip("skimage")
pytest.importorskip("pydicom")

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from medrl.data import demo, store
from medrl.data.images import open_image
from medrl.data.prompts import make_prompt
from medrl.demo import base as demo_base
from medrl.demo.base import build_base, by_fact, match_turn
from medrl.demo.run import run_demo
from medrl.errors import SettingsError
from medrl.policy.loading import resolve_model
from medrl.policy.policy import Policy
from medrl.runs import read_records


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "run"
    run_demo(out, seed=3, steps=3, images=(40, 16), quiet=True)
    return out


def test_the_summary_holds_what_programs_rely_on(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("base", "sft", "grpo"):
        assert set(summary[name]) >= {"accuracy", "low", "high", "n", "well_formed"}
        assert summary[name]["low"] <= summary[name]["accuracy"] <= summary[name]["high"]
    assert set(summary["blind"]) == {"name", "accuracy"}
    for gain in ("gain_over_base", "gain_over_blind"):
        assert set(summary[gain]) == {"value", "low", "high"}
    assert summary["gain_over_base"]["value"] == pytest.approx(
        summary["grpo"]["accuracy"] - summary["base"]["accuracy"]
    )
    assert summary["gain_over_blind"]["value"] == pytest.approx(
        summary["grpo"]["accuracy"] - summary["blind"]["accuracy"]
    )
    assert summary["seconds"] > 0


def test_the_figures_follow_from_the_records(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    records = read_records(finished / "eval" / "grpo")
    assert summary["grpo"]["n"] == len(records) == store.read_info(finished / "data" / "test").rows
    assert summary["grpo"]["accuracy"] == pytest.approx(np.mean([record.correct for record in records]))


def test_the_report_is_one_file_with_the_images_inside(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert "data:image/" in page
    assert "esearch use only" in page
    assert "<script" not in page


def test_the_same_command_again_trains_nothing_twice(finished: Path) -> None:
    metrics = (finished / "grpo" / "metrics.jsonl").read_bytes()
    records = (finished / "eval" / "sft" / "records.jsonl").read_bytes()
    before = json.loads((finished / "summary.json").read_text())
    again = run_demo(finished, seed=3, steps=3, images=(40, 16), quiet=True)
    assert (finished / "grpo" / "metrics.jsonl").read_bytes() == metrics
    assert (finished / "eval" / "sft" / "records.jsonl").read_bytes() == records
    assert again["grpo"] == before["grpo"]


def test_another_seed_in_the_same_folder_is_refused(finished: Path) -> None:
    with pytest.raises(SettingsError, match="another seed"):
        run_demo(finished, seed=4, steps=3, images=(40, 16), quiet=True)


def test_plain_transformers_gives_the_recorded_greedy_answers(finished: Path) -> None:
    folder = max((finished / "grpo" / "checkpoints").glob("step-*"))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    recorded = {record.id: record.completion for record in read_records(finished / "eval" / "grpo")}
    for example in store.load(finished / "data" / "test")[:8]:
        prompt = make_prompt(example, "think", "plain")
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt.text}]}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], images=[open_image(example.images[0])], return_tensors="pt")
        written = model.generate(**inputs, do_sample=False, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :]
        answer = processor.tokenizer.decode(written.tolist()).split("<|im_end|>")[0]
        assert answer == recorded[example.id]


def test_the_shipped_base_is_small_and_says_what_it_is() -> None:
    folder = Path(resolve_model("demo-base"))
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8 * 2**20
    card = (folder / "README.md").read_text()
    assert "never seen an image together with a question" in card
    assert "--rebuild-base" in card
    assert "esearch use only" in card
    policy = Policy.load(folder)
    assert policy.model.config.model_type == "qwen2_vl"
    assert policy.model.config.architectures == ["Qwen2VLForConditionalGeneration"]


def test_the_base_is_never_shown_an_image_with_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    imitate = demo_base.imitate

    def spy(policy, encoded, texts, **options):
        seen.extend(
            (policy.processor.tokenizer.decode(prompt.token_ids), prompt.pixels is not None) for prompt in encoded
        )
        return imitate(policy, encoded, texts, **options)

    monkeypatch.setattr(demo_base, "imitate", spy)
    monkeypatch.setattr(demo_base, "VIEWS", 6)
    build_base(tmp_path / "base", steps=2, quiet=True)
    assert {has_image for _, has_image in seen} == {True, False}
    for text, has_image in seen:
        assert has_image == ("Describe the image" in text)
        assert has_image != ("A)" in text)


def test_a_rebuilt_base_depends_on_nothing_but_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_base, "VIEWS", 6)
    first, second = (build_base(tmp_path / name, steps=2, quiet=True) for name in ("a", "b"))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()


def test_a_matching_turn_names_the_letter_of_the_remembered_fact() -> None:
    rng = np.random.default_rng(0)
    known = by_fact([demo.draw("train", rng)[0] for _ in range(8)])
    for _ in range(50):
        question, answer = match_turn(known, rng)
        letter = answer.removesuffix("</answer>")[-1]
        (option,) = [line[3:] for line in question.splitlines() if line.startswith(f"{letter}) ")]
        remembered = answer.split("<think>")[1].split("</think>")[0]
        assert option in remembered.removeprefix("seen: ").split(", ")
