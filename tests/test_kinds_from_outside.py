"""One table of every kind of question, from import to report on the command line, with a model that learns them."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from medrl.cli import app
from medrl.data.prompts import make_prompt
from medrl.data.store import load
from medrl.runs import read_records

ROWS = (
    {"kind": "choice", "question": "Which modality?", "options": ["CT", "MRI", "X-Ray"], "answer": "MRI"},
    {"kind": "multi_select", "question": "Which findings?", "options": ["edema", "mass", "cyst"], "answer": ["A", "C"]},
    {"kind": "yes_no", "question": "Is there a fracture?", "answer": True},
    {"kind": "numeric", "question": "How wide is the mass?", "answer": "3.5 cm", "tolerance": "5 %"},
    {"kind": "short", "question": "Which organ is shown?", "answer": "left kidney", "references": ["kidney"]},
    {"kind": "box", "question": "Where is the mass?", "answer": [10, 10, 30, 40]},
)


def run(*words: object):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code in (0, 3), result.output
    return result


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The store that ``medrl import`` made of the table, a tiny model, and what it was taught."""
    from medrl.policy.policy import Policy
    from medrl.policy.tiny import build_model, train_processor

    home = tmp_path_factory.mktemp("kinds")
    for number in range(len(ROWS)):
        Image.new("RGB", (56, 56), (40 * number, 60, 90)).save(home / f"{number}.png")
    rows = [{"id": row["kind"], "image": f"{n}.png", "modality": "CT", **row} for n, row in enumerate(ROWS)]
    (home / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("import", "table", home / "table.jsonl", "--out", home / "store")
    texts = [make_prompt(row, "no_think", "plain-no-think").text for row in load(home / "store")]
    processor = train_processor([*texts, *(row.target for row in load(home / "store"))], vocab_size=420, image_px=56)
    sizes = {"layers": 1, "heads": 2, "kv_heads": 1, "vision_layers": 1, "vision_heads": 2}
    model = build_model(processor, hidden=32, intermediate=64, vision_hidden=32, context_tokens=256, **sizes)
    Policy(model, processor).save(home / "model")
    recipe = {
        "method": "sft",
        "policy": {"model": str(home / "model"), "dtype": "float32"},
        "data": {"train": str(home / "store")},
        "training": {
            "steps": 60, "prompts_per_step": 6, "mode": "no_think", "template": "plain-no-think", "save_every": 60,
            "sampling": {"max_new_tokens": 24}, "optim": {"lr": 1e-2},
        },
    }  # fmt: skip
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "reward" not in run("train", home / "recipe.yaml", "--out", home / "run").stdout  # it imitates
    ask = ("--mode", "no_think", "--template", "plain-no-think", "--train", home / "store")
    run("eval", home / "model", home / "store", "--out", home / "run" / "eval" / "before", "--max-new-tokens", 8, *ask)
    run("eval", home / "run", home / "store", "--out", home / "run" / "eval" / "after")
    return home


def test_every_kind_is_learned_asked_and_graded(home):
    records = {record.kind: record for record in read_records(home / "run" / "eval" / "after")}
    assert {kind: record.correct for kind, record in records.items()} == {row["kind"]: True for row in ROWS}
    assert {kind: record.answer for kind, record in records.items()} == {
        "choice": "B", "multi_select": "A, C", "yes_no": "yes", "numeric": "3.5 cm", "short": "left kidney",
        "box": "10, 10, 30, 40",
    }  # fmt: skip
    assert records["choice"].option_probs and not records["multi_select"].option_probs


def test_the_evaluation_is_compared_rescored_and_reported(home):
    evals = home / "run" / "eval"
    assert json.loads(run("compare", evals / "before", evals / "after", "--json").stdout)["only_b"] == 6
    found = json.loads(run("rescore", evals / "after", "--scorer", "lenient", "--json").stdout)
    assert (found["accuracy"]["value"], found["changed"]) == (1.0, 0)
    run("report", home / "run", "--out", home / "report.html")
    page = (home / "report.html").read_text()
    assert '<li class="right">3.5 cm ✓' in page and "± 5 %" in page and '<li class="right">kidney ✓</li>' in page
    assert '<li class="right">C&ensp;cyst ✓</li>' in page


@pytest.mark.parametrize("method", ["grpo", "rft"])
def test_reinforcement_goes_on_from_there_with_the_reward_of_the_kinds(home, tmp_path, method):
    start = f"policy.model={next((home / 'run' / 'checkpoints').iterdir())}"
    steps = ("training.steps=2", f"{method}.group_size=2", "training.optim.lr=1e-4", "training.curriculum.use=order")
    printed = run("train", home / "recipe.yaml", f"method={method}", start, *steps, "--out", tmp_path / "run")
    assert "reward: {answer_correct: 1.0, well_formed: 1.0}" in printed.stdout
    assert "curriculum: 6 of 6 questions kept, the easy first" in printed.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert all(row["right"] == (row["parts"]["answer_correct"] == 1.0) for row in rows)
    assert sum(row["right"] for row in rows) > len(rows) / 2
    rates = (json.loads(line) for line in (tmp_path / "run" / "pass_rates.jsonl").read_text().splitlines())
    assert sum(row["right"] for row in rates) > 6 * 8 / 2
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["answer_letters"].keys() <= {"A", "B", "C", "yes", "no"}


def test_an_audit_of_every_kind_says_what_is_reached_blind(home, tmp_path):
    run("audit", home / "store", home / "store", "--json", tmp_path / "a.json", "--html", tmp_path / "a.html")
    audit = json.loads((tmp_path / "a.json").read_text())
    assert audit["gold_rejected"] == 0 and audit["blind"]["option_prior"]["accuracy"] == 1.0
