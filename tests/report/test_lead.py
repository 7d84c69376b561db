"""What a page begins and ends with: what was asked, the answer in sentences, the commands."""

import dataclasses
import shlex

import pytest
import typer.main

from medrl.cli import app
from medrl.evaluation.metrics import summarize
from medrl.report import lead
from medrl.report.tables import Evaluation, compare_evaluations, read_evaluation
from medrl.runs import ASKED, Run, write_json_atomically


@pytest.fixture(scope="module")
def evaluations(finished_run) -> list[Evaluation]:
    return [read_evaluation(finished_run / "eval" / name) for name in ("before", "after")]


def with_right(evaluation: Evaluation, name: str, n: int) -> Evaluation:
    """The same evaluation under another name, with the first ``n`` questions right and no others."""
    records = [dataclasses.replace(record, correct=place < n) for place, record in enumerate(evaluation.records)]
    return dataclasses.replace(evaluation, name=name, records=records, figures=summarize(records))


def test_the_most_accurate_is_told_against_the_first_the_next_and_the_best_rule(evaluations):
    before = evaluations[0]
    base, sft, grpo = (with_right(before, name, n) for name, n in (("base", 40), ("sft", 56), ("grpo", 120)))
    sentences = lead.answer([base, grpo, sft])
    assert len(sentences) == 3
    assert sentences[0].startswith(
        "grpo has 75.0\u202f% (67.8 – 81.1) right and base 25.0\u202f% (18.9 – 32.2): +50.0 points (95"
    )
    assert "exact McNemar p < 0.001" in sentences[0]
    assert sentences[1].startswith(
        "grpo has 75.0\u202f% (67.8 – 81.1) right and sft 35.0\u202f% (28.0 – 42.7): +40.0 points (95"
    )
    assert "and the best rule that sees no image (" in sentences[2]


def test_what_is_not_shown_is_said_to_be_so(evaluations):
    one, other = with_right(evaluations[0], "one", 80), with_right(evaluations[0], "other", 81)
    assert not compare_evaluations(one, other).better
    assert "no difference is shown, +0.6 points (95" in lead.answer([one, other])[0]


def test_one_evaluation_alone_has_its_share_and_the_best_rule(evaluations):
    first, second = lead.answer([with_right(evaluations[0], "alone", 80)])
    assert first == "alone has 50.0\u202f% (42.3 – 57.7) of 160 questions right."
    assert second.startswith("alone has 50.0") and "sees no image" in second


def test_what_was_asked_names_runs_models_and_the_test_set(evaluations, finished_run):
    said = dict(lead.asked([("ct-demo", Run.open(finished_run), 120)], [evaluations]))
    assert said["trained: ct-demo"] == "trained, 120 steps, from tiny-vlm"
    assert said["test set store"] == "160 questions about 80 images: CT, Magnetic resonance imaging, X-ray"
    assert said["asked: after"] == "tiny-vlm, greedily, mode think, template think"


def test_every_command_is_one_that_medrl_reads(evaluations, finished_run, tmp_path):
    sampling = {"samples": 4, "temperature": 1.0, "top_p": 0.9, "top_k": 5, "seed": 3}
    asked = {
        "sampled": {"dtype": "torch.bfloat16", "max_new_tokens": 40, "sampling": sampling},
        "served": {"endpoint": "http://localhost:8000/v1", "served_model": "a model", "sampling": None},
    }
    others = []
    for name, how in asked.items():
        write_json_atomically(tmp_path / name / ASKED, how)
        others.append(dataclasses.replace(evaluations[1], name=name, path=tmp_path / name))
    graded = {**evaluations[1].summary, "scorer": "med-r1", "rescored_from": "runs/a b"}
    others.append(dataclasses.replace(evaluations[1], name="graded", summary=graded))
    runs = [("ct-demo", Run.open(finished_run))]
    found = dict(lead.commands(runs, [[*evaluations, *others]]))
    command = typer.main.get_command(app)
    for words in map(shlex.split, found.values()):
        assert words[0] == "medrl"
        command.commands[words[1]].make_context(words[1], words[2:])  # raises UsageError for what it cannot read
    assert {shlex.split(words)[1] for words in found.values()} == {"train", "eval", "rescore", "compare", "report"}
    assert "--samples 4 --temperature 1.0 --top-p 0.9 --top-k 5 --seed 3" in found["all figures of sampled"]
    assert "--dtype bfloat16" in found["all figures of sampled"]
    assert "--endpoint http://localhost:8000/v1 --model 'a model'" in found["all figures of served"]
    assert found["all figures of graded"].startswith("medrl rescore 'runs/a b' --scorer med-r1")
