"""The public Python interface: what a reader of the README types."""

import dataclasses

import pytest
from PIL import Image

import medrl
from medrl.policy.tiny import build_model, train_processor
from medrl.rewards import choice_correct, weighted, well_formed


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A store of six examples and a tiny model folder."""
    home = tmp_path_factory.mktemp("api")
    examples = []
    for number in range(6):
        image = home / f"{number}.png"
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(image)
        options = ("CT", "MRI")
        text = {"source": "made up", "question": "Which modality?", "options": options, "target": "AB"[number % 2]}
        examples.append(medrl.Example(id=f"r{number}", images=(image,), **text))
    medrl.write_store(home / "store", examples, source="made up", license="CC0")
    processor = train_processor([medrl.make_prompt(examples[0], "think", "plain").text], vocab_size=300)
    sizes = {"layers": 1, "heads": 2, "kv_heads": 1, "vision_layers": 1, "vision_heads": 2}
    model = build_model(processor, hidden=32, intermediate=64, vision_hidden=32, **sizes)
    medrl.Policy(model, processor).save(home / "model")
    return home


def test_the_readme_s_program_runs(home, tmp_path):
    examples = medrl.load(home / "store")
    reward = weighted((1.0, choice_correct), (1.0, well_formed))
    policy = medrl.Policy.load(home / "model")
    short = {"sampling": medrl.Sampling(max_new_tokens=4), "prompts_per_step": 2, "quiet": True}
    run = medrl.train(policy, examples, reward, medrl.GRPO(group_size=2), steps=2, out=tmp_path / "run", **short)
    images = [image for row in run.rollouts() for image in row["images"]]
    assert images and all((home / "store" / image).is_file() and image.startswith("images/") for image in images)
    ask = {"max_new_tokens": 4, "quiet": True}
    before = medrl.evaluate(policy.reference, examples, out=run.path / "eval" / "before", **ask)
    after = medrl.evaluate(policy, examples, out=run.path / "eval" / "after", **ask)
    comparison = medrl.compare(before, after)
    assert (comparison.a_name, comparison.b_name, comparison.n) == ("before", "after", 6)
    assert medrl.compare(run.path / "eval" / "before", after.records).difference == comparison.difference
    page = medrl.write_report(run)
    assert page == run.path / "report.html" and "data:image/" in page.read_text()


def test_an_audit_of_a_set_against_itself_is_unfit(home):
    examples = medrl.load(home / "store")
    audit = medrl.audit(examples, examples, weighted((1.0, choice_correct), (1.0, well_formed)))
    assert audit.overlap == {"images_exact": 6, "near_duplicates": 0, "patients": 0, "question_answer": 6}
    with pytest.raises(medrl.MedrlError, match="unfit: images_exact is 6 of 6 test examples"):
        audit.raise_if_unfit()


def test_examples_that_are_in_no_store_keep_their_image_paths(home, tmp_path):
    loose = [dataclasses.replace(row, images=(home / "0.png",)) for row in medrl.load(home / "store")]
    policy = medrl.Policy.load(home / "model")
    evaluation = medrl.evaluate(policy, loose, out=tmp_path / "e", max_new_tokens=2, quiet=True)
    assert "store" not in evaluation.summary
    assert evaluation.records[0].images == (str(home / "0.png"),)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'adit'"):
        _ = medrl.adit
