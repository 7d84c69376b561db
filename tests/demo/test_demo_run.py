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
from medrl.data.demo_images import View
from medrl.data.images import open_image
from medrl.data.prompts import make_prompt
from medrl.demo import base as demo_base
from medrl.demo.base import all_facts, build_base, by_fact, match_turn
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
    card = " ".join((folder / "README.md").read_text().split())
    assert "never seen an image together with a question" in card
    assert "--rebuild-base" in card
    assert "esearch use only" in card
    policy = Policy.load(folder)
    assert policy.model.config.model_type == "qwen2_vl"
    assert policy.model.config.architectures == ["Qwen2VLForConditionalGeneration"]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_base, "VIEWS_PER_STEP", 4)
    monkeypatch.setattr(demo_base, "INVENTED_PER_STEP", 2)
    monkeypatch.setattr(demo_base, "DESCRIBED_IN_TAGS_PER_STEP", 1)
    monkeypatch.setattr(demo_base, "MATCHED_PER_STEP", 4)


@pytest.mark.usefixtures("small_batches")
def test_the_base_is_never_shown_an_image_with_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    logprobs = Policy.logprobs

    def spy(policy, encoded, groups):
        seen.extend(
            (policy.processor.tokenizer.decode(prompt.token_ids), prompt.pixels is not None) for prompt in encoded
        )
        return logprobs(policy, encoded, groups)

    monkeypatch.setattr(Policy, "logprobs", spy)
    build_base(tmp_path / "base", steps=(1, 1), quiet=True)
    assert {has_image for _, has_image in seen} == {True, False}
    assert sum("<think>" in text and has_image for text, has_image in seen) == 3
    questions = [wording for question in demo.QUESTIONS.values() for wording in question.wordings]
    for text, has_image in seen:
        assert has_image != ("A)" in text)
        assert has_image != any(wording in text for wording in questions)


@pytest.mark.usefixtures("small_batches")
def test_a_base_whose_making_was_cut_off_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_base, "SAVE_EVERY", 1)
    whole = build_base(tmp_path / "whole", steps=(2, 1), quiet=True)

    draw_view = demo_base.draw_view
    drawn = 0

    def cut_off(rng: np.random.Generator) -> View:
        nonlocal drawn
        drawn += 1
        if drawn > 6:
            raise KeyboardInterrupt
        return draw_view(rng)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo_base, "draw_view", cut_off)
        build_base(tmp_path / "cut", steps=(2, 1), quiet=True)
    assert drawn == 7
    assert not (tmp_path / "cut").exists()
    cut = build_base(tmp_path / "cut", steps=(2, 1), quiet=True)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def test_a_matching_turn_names_each_letter_for_a_remembered_fact_of_its_option() -> None:
    rng = np.random.default_rng(0)
    known = by_fact(all_facts())
    for _ in range(50):
        question, answers = match_turn(known, rng)
        letters = [answer.removesuffix("</answer>")[-1] for answer in answers]
        assert letters == [line[0] for line in question.splitlines() if line[1:3] == ") "]
        for letter, answer in zip(letters, answers, strict=True):
            (option,) = [line[3:] for line in question.splitlines() if line.startswith(f"{letter}) ")]
            remembered = answer.split("<think>")[1].split("</think>")[0]
            assert option in remembered.removeprefix("seen: ").split(", ")


def test_every_right_answer_of_every_question_can_be_matched() -> None:
    known = by_fact(all_facts())
    for question in demo.QUESTIONS.values():
        for answer in question.answers:
            assert known[question.fact, answer]
