import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from medrl.data.prompts import make_prompt
from medrl.data.store import load, read_info, write_store
from medrl.errors import DataError, RunError, SettingsError
from medrl.evaluation import answer as module
from medrl.evaluation import resume
from medrl.evaluation.evaluate import EvalSettings, evaluate, evaluate_store, make_record
from medrl.evaluation.metrics import summarize
from medrl.policy.policy import Policy
from medrl.runs import read_records, read_summary
from medrl.types import Completion, image_cluster

SETTINGS = EvalSettings(mode="no_think", template="plain-no-think", max_new_tokens=8, batch_size=2)


@pytest.fixture(scope="module")
def folder(make_policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies") / "tiny"
    make_policy(torch.float32).save(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(folder) -> Policy:
    return Policy.load(folder)


@pytest.fixture(scope="module")
def test_store(make_examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("stores") / "test"
    write_store(out, make_examples(out.parent / "images", 7), source="noise", license="none")
    return out


@pytest.fixture(scope="module")
def train_store(make_examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("stores") / "train"
    write_store(out, make_examples(out.parent / "images", 9, "train"), source="noise", license="none")
    return out


@pytest.fixture(scope="module")
def finished(tiny, test_store, train_store, tmp_path_factory):
    """An evaluation that nobody stopped, and its folder."""
    out = tmp_path_factory.mktemp("eval") / "after"
    options = {"model": "tiny", "train": train_store, "settings": SETTINGS, "quiet": True}
    return evaluate_store(tiny, test_store, out=out, **options), out


class Spy:
    """Records which prompts the policy completes; interrupts when so many batches have been handed over."""

    def __init__(self, monkeypatch, stop_at: int | None = None) -> None:
        self.asked: list[str] = []
        inner = module.complete

        def complete(policy, prompts, *rest, **options):
            for batches, finished in enumerate(inner(policy, prompts, *rest, **options), start=1):
                if batches == stop_at:
                    raise KeyboardInterrupt
                self.asked += [prompts[one.number].id for one in finished]
                yield finished

        monkeypatch.setattr(module, "complete", complete)


def test_records_stand_in_the_order_of_the_examples_and_hold_what_was_asked(finished, test_store):
    evaluation, out = finished
    examples = load(test_store)
    assert read_records(out) == evaluation.records
    assert [record.id for record in evaluation.records] == [example.id for example in examples]
    for record, example in zip(evaluation.records, examples, strict=True):
        prompt = make_prompt(example, "no_think", "plain-no-think")
        assert (record.prompt_hash, record.mode) == (prompt.hash, "no_think")
        assert (record.target, record.options, record.modality) == (example.target, example.options, example.modality)
        assert test_store / record.images[0] == example.images[0]
        assert not record.images[0].startswith("/")
    assert len({image_cluster(record.images) for record in evaluation.records}) == 7
    # Two rows write seven answers; none has to wait for the other.
    tokens = [record.tokens for record in evaluation.records]
    assert (
        max(tokens) - 1 <= evaluation.summary["decode_steps"] <= sum(max(tokens[n : n + 2]) - 1 for n in (0, 2, 4, 6))
    )


def test_the_summary_says_of_the_records_what_they_say(finished, test_store):
    evaluation, out = finished
    summary = read_summary(out)
    computed = summarize(read_records(out))
    assert {name: summary[name] for name in computed} == json.loads(json.dumps(computed))
    assert summary == json.loads(json.dumps(evaluation.summary))
    assert summary["accuracy"].keys() == {"value", "low", "high", "n"}
    assert summary["by_modality"].keys() == {"CT", "MRI"}
    assert summary["store_fingerprint"] == read_info(test_store).fingerprint
    assert (summary["name"], summary["model"], summary["template"]) == ("after", "tiny", "plain-no-think")
    assert summary["truncated_rate"] == sum(r.finish_reason == "length" for r in evaluation.records) / 7


def test_blind_baselines_stand_beside_the_accuracy(finished, tiny, test_store, tmp_path):
    evaluation, _ = finished
    assert [blind["name"] for blind in evaluation.summary["blind"]] == [
        "longest_option",
        "majority_letter",
        "option_prior",
        "question_option_prior",
    ]
    best = max(blind["accuracy"]["value"] for blind in evaluation.summary["blind"])
    difference = evaluation.summary["comparison_to_blind"]["difference"]["value"]
    assert difference == pytest.approx(evaluation.summary["accuracy"]["value"] - best)
    unfitted = evaluate(tiny, load(test_store)[:2], out=tmp_path / "eval", settings=SETTINGS, quiet=True)
    assert [blind["name"] for blind in unfitted.summary["blind"]] == ["longest_option"]


def test_the_recorded_answers_are_those_of_plain_transformers(finished, folder, test_store):
    evaluation, _ = finished
    from PIL import Image

    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    for record, example in zip(evaluation.records, load(test_store), strict=True):
        text = make_prompt(example, "no_think", "plain-no-think").text
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        chat = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        with Image.open(example.images[0]) as image:
            inputs = processor(text=[chat], images=[image], return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(written).removesuffix("<|im_end|>") == record.completion
        assert len(written) == record.tokens
    assert len({record.completion for record in evaluation.records}) > 1


def test_the_batch_size_changes_nothing(finished, tiny, test_store, tmp_path):
    evaluation, _ = finished
    for size in (1, 7):
        settings = EvalSettings(mode="no_think", template="plain-no-think", max_new_tokens=8, batch_size=size)
        out = tmp_path / str(size)
        found = evaluate(tiny, load(test_store), out=out, root=test_store, settings=settings, quiet=True)
        assert found.records == evaluation.records


def test_an_evaluation_that_was_stopped_continues_without_asking_twice(
    finished, tiny, test_store, train_store, tmp_path, monkeypatch
):
    options = {"model": "tiny", "train": train_store, "settings": SETTINGS, "quiet": True, "name": "after"}
    with monkeypatch.context() as patch:
        first = Spy(patch, stop_at=3)
        with pytest.raises(KeyboardInterrupt):
            evaluate_store(tiny, test_store, out=tmp_path / "eval", **options)
    assert len(first.asked) == 4
    assert not (tmp_path / "eval" / "summary.json").exists()
    # The process died in the middle of a line: that record is asked again.
    records = tmp_path / "eval" / "records.jsonl"
    records.write_bytes(records.read_bytes()[:-20])
    second = Spy(monkeypatch)
    evaluation = evaluate_store(tiny, test_store, out=tmp_path / "eval", **options)
    assert second.asked == [f"example-{i}" for i in (3, 4, 5, 6)]
    assert evaluation.records == finished[0].records
    assert sorted(read_records(tmp_path / "eval"), key=lambda r: r.id) == sorted(evaluation.records, key=lambda r: r.id)
    timed = {"seconds", "started", "decode_steps"}
    summary, whole = evaluation.summary, finished[0].summary
    assert {k: v for k, v in summary.items() if k not in timed} == {k: v for k, v in whole.items() if k not in timed}


def test_who_was_asked_is_written_once(tiny, test_store, tmp_path, monkeypatch):
    written = []
    inner = resume.write_json_atomically
    monkeypatch.setattr(resume, "write_json_atomically", lambda path, value: written.append(path) or inner(path, value))
    out = tmp_path / "eval"
    for _ in range(2):
        evaluate_store(tiny, test_store, out=out, model="tiny", settings=SETTINGS, quiet=True)
        (out / "records.jsonl").write_bytes((out / "records.jsonl").read_bytes()[:-20])
    assert written == [out / "asked.json", out / "progress.json", out / "progress.json"]


def test_a_finished_evaluation_asks_nothing(finished, tiny, test_store, train_store, monkeypatch):
    evaluation, out = finished
    before = (out / "records.jsonl").read_bytes()
    spy = Spy(monkeypatch)
    again = evaluate_store(tiny, test_store, out=out, model="tiny", train=train_store, settings=SETTINGS, quiet=True)
    assert (spy.asked, again.records) == ([], evaluation.records)
    assert again.summary == evaluation.summary  # its seconds too
    assert (out / "records.jsonl").read_bytes() == before


def test_records_of_other_prompts_are_refused_and_left_alone(finished, tiny, test_store, train_store, monkeypatch):
    _, out = finished
    before = (out / "records.jsonl").read_bytes()
    spy = Spy(monkeypatch)
    for examples, settings in (
        (load(test_store), EvalSettings(mode="think")),  # another mode
        (load(test_store), EvalSettings(mode="no_think")),  # another wording
        (load(train_store), SETTINGS),  # another data set
        (load(test_store)[:3], SETTINGS),  # fewer examples
    ):
        with pytest.raises(RunError, match="records of other prompts"):
            evaluate(tiny, examples, out=out, settings=settings, quiet=True)
    assert spy.asked == []
    assert (out / "records.jsonl").read_bytes() == before


def test_nothing_to_evaluate_and_unknown_templates_are_refused_before_anything_is_written(tiny, test_store, tmp_path):
    with pytest.raises(DataError, match="empty"):
        evaluate(tiny, [], out=tmp_path / "eval", quiet=True)
    with pytest.raises(SettingsError, match="plainer"):
        evaluate(tiny, load(test_store), out=tmp_path / "eval", template="plainer", quiet=True)
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize(
    ("text", "answer", "correct", "well_formed"),
    [
        ("<answer>A</answer>", "A", True, 1.0),
        ("<answer>B</answer>", "B", False, 1.0),
        ("It is A", "A", True, 0.0),
        ("It may be A", None, False, 0.0),
        ("no idea", None, False, 0.0),
    ],
)
def test_a_record_is_graded_like_a_rollout(make_examples, tmp_path, text, answer, correct, well_formed):
    example = make_examples(tmp_path, 1)[0]
    prompt = make_prompt(example, "no_think")
    completion = Completion(text=text, token_ids=(1, 2, 3), finish_reason="stop", mode="no_think")
    record = make_record(example, prompt, completion)
    assert (record.answer, record.correct, record.tokens) == (answer, correct, 3)
    assert record.parts == {"choice_correct": float(correct), "well_formed": well_formed}
    assert record.images == (str(example.images[0]),)


def test_a_folder_of_other_settings_is_refused(finished, tiny, test_store, make_policy, tmp_path):
    def start(**changes):
        settings = EvalSettings(**{**SETTINGS.model_dump(), **changes})
        evaluate_store(tiny, test_store, out=tmp_path / "eval", model="tiny", settings=settings, quiet=True)

    start()
    for changes, named in (
        ({"max_new_tokens": 9}, "max_new_tokens"),
        ({"option_probs": False}, "option_probs"),
        ({"samples": 2}, "sampling"),
        ({"temperature": 0.5}, "sampling"),
    ):
        with pytest.raises(RunError, match=f"answers given with other {named}"):
            start(**changes)
    other = make_policy(torch.float32, seed=1)
    with pytest.raises(RunError, match="other weights"):
        evaluate_store(other, test_store, out=tmp_path / "eval", model="tiny", settings=SETTINGS, quiet=True)
    start(batch_size=7)  # changes speed alone


def test_a_greedy_run_is_refused_in_a_folder_of_samples(tiny, test_store, tmp_path):
    warm = EvalSettings(**{**SETTINGS.model_dump(), "samples": 2})
    evaluate_store(tiny, test_store, out=tmp_path / "eval", model="tiny", settings=warm, quiet=True)
    with pytest.raises(RunError, match="other sampling"):
        evaluate_store(tiny, test_store, out=tmp_path / "eval", model="tiny", settings=SETTINGS, quiet=True)


def test_options_are_scored_without_a_second_look_at_the_images(folder, test_store, tmp_path, monkeypatch):
    fresh, looks = Policy.load(folder), []
    inner = fresh.family.vision.forward
    monkeypatch.setattr(
        fresh.family.vision, "forward", lambda pixels, **rest: looks.append(len(pixels)) or inner(pixels, **rest)
    )
    monkeypatch.setattr(module, "_elect", lambda example, group, *_: (answered(group[0]), ()))
    evaluation = evaluate(fresh, load(test_store), out=tmp_path / "eval", settings=SETTINGS, quiet=True)
    assert all(record.option_probs is not None for record in evaluation.records)
    assert looks == [32, 32, 32, 16]  # two images of 16 patches each per batch, and one in the last


def answered(completion: Completion) -> Completion:
    return Completion(text="<answer>A</answer>", token_ids=(), finish_reason="stop", mode=completion.mode)
