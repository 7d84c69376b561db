"""Grading saved completions again, from the function and from the command line."""

import dataclasses
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from medrl.cli import app
from medrl.errors import RunError
from medrl.evaluation.rescore import rescore, rescore_lines
from medrl.evaluation.resume import check_asked
from medrl.files import write_json_atomically
from medrl.rewards import SCORERS
from medrl.rewards.judge import Judge, JudgeError
from medrl.runs import append_records, read_records, read_summary
from medrl.types import EvalRecord

TEXTS = (
    "<think>x</think><answer>C</answer>",
    "<think>say <answer>C</answer></think><answer>B</answer>",
    "<think>x</think><answer>C.</answer>",
    "<think>x</think><answer>none</answer>",
    "<think>so the answer is C</think> I wonder about C",
)


def record(number: int, text: str, **changes) -> EvalRecord:
    base = EvalRecord(
        id=f"q{number}",
        source="s",
        modality="CT" if number % 2 else "MRI",
        question_type="t",
        patient=None,
        images=("images/a.png",),
        question="Which?",
        options=("MRI", "X-ray", "CT", "Ultrasound"),
        mode="think",
        prompt_hash="0" * 16,
        completion=text,
        finish_reason="stop",
        answer=None,
        target="C",
        correct=False,
        parts={},
        tokens=5,
    )
    return dataclasses.replace(base, **changes)


RECORDS = [record(number, text) for number, text in enumerate(TEXTS)]


def run(*words: object, input: str | None = None):
    return CliRunner().invoke(app, ["rescore", *map(str, words)], input=input)


@pytest.fixture
def folder(tmp_path):
    append_records(tmp_path / "after", RECORDS)
    write_json_atomically(tmp_path / "after" / "summary.json", {"name": "after"})
    return tmp_path / "after"


@pytest.mark.parametrize(
    ("scorer", "right", "unreadable", "mean"),
    [
        ("strict", 2, 2, 0.4),  # the letter, and the letter with a stop; "none" and a sentence are unreadable
        ("lenient", 3, 1, 0.6),
        ("med-r1", 2, 3, 0.4),  # the letter, and the one that stands only in the reasoning
        ("med-r1-eval", 2, 3, 0.4),
        ("medvlm-r1", 2, 2, 0.5),  # the same two, and half for the stop
        ("raw", 0, 5, 0.0),
    ],
)
def test_each_scorer_s_figures_by_hand(folder, scorer, right, unreadable, mean):
    found = json.loads(run(folder, "--scorer", scorer, "--json").stdout)
    assert found["accuracy"]["value"] == right / 5 and found["accuracy"]["n"] == 5
    assert found["accuracy"]["low"] <= right / 5 <= found["accuracy"]["high"]
    assert found["parse_fail_rate"] == unreadable / 5
    assert found["mean_score"] == pytest.approx(mean)
    assert found["recorded_accuracy"]["value"] == 0.0 and found["changed"] == right
    assert found["scorer"] == scorer


def test_strict_repeats_what_an_evaluation_recorded():
    pytest.importorskip("torch")
    from pathlib import Path

    from medrl.data.prompts import make_prompt
    from medrl.evaluation.evaluate import make_record
    from medrl.types import KINDS, Completion, Example

    targets = {
        "choice": "B",
        "multi_select": "A, B",
        "yes_no": "yes",
        "numeric": "3 cm",
        "short": "lung",
        "box": "1,2,3,4",
    }
    said = {
        "choice": "b",
        "multi_select": "B, A",
        "yes_no": "Yes.",
        "numeric": "29 mm",
        "short": "Lung",
        "box": "1 2 3 4",
    }
    for kind in KINDS:
        example = Example(
            id=kind, source="s", images=(Path("a.png"),), question="?", target=targets[kind], kind=kind,
            options=("CT", "MRI") if kind in ("choice", "multi_select") else (),
            tolerance="2 mm" if kind == "numeric" else "",
        )  # fmt: skip
        completion = Completion(
            text=f"<think>x</think><answer>{said[kind]}</answer>", token_ids=(), finish_reason="stop"
        )
        written = make_record(example, make_prompt(example), completion)
        (again,) = rescore([written], SCORERS["strict"])
        assert (written.correct, written.answer) == (again.correct, again.answer) and written.correct
        assert again.kind == kind


def test_a_table_is_printed_for_people(folder):
    text = run(folder, "--scorer", "medvlm-r1").stdout
    assert "medvlm-r1" in text and "40.0 %" in text and "mean score 50.0 %" in text and "changed on 2 of 5" in text


ROWS = [
    {"completion": "<think>x</think><answer>C</answer>", "options": ["a", "b", "c"], "target": "C", "kind": "choice",
     "mode": "think"},
    {"completion": "<answer>B</answer>", "options": ["a", "b"], "target": "A", "kind": "choice", "mode": "no_think"},
    {"completion": "C", "options": ["a", "b", "c"], "target": "C", "kind": "choice", "mode": "no_think"},
    {"id": "m", "completion": "<answer>A, C</answer>", "options": ["x", "y", "z"], "target": ["C", "A"],
     "kind": "multi-select", "mode": "no_think"},
    {"completion": "<answer>yes</answer><think>x</think>", "target": "Yes", "kind": "yes/no", "mode": "think_after"},
    {"completion": "<answer>35 mm</answer>", "target": "3.6 cm", "kind": "numeric", "tolerance": "5%",
     "mode": "no_think"},
    {"completion": "<answer>4</answer>", "target": 3, "kind": "numeric", "mode": "no_think"},
    {"completion": "<answer>Left lung.</answer>", "target": "lung", "references": ["left lung"], "kind": "open"},
    {"completion": "<answer>[0,0,9,9]</answer>", "target": [0, 0, 10, 10], "kind": "box"},
    {"completion": "<answer>none</answer>", "options": ["a", "b", "c", "d", "e"], "target": "e"},
    {"completion": "<answer>ct</answer>", "options": ["CT", "MRI"], "target": "CT"},
    {"completion": "<answer>AC</answer>", "options": ["x", "y", "z"], "target": "AC", "kind": "multi_select"},
    {"completion": "<answer>No</answer>", "options": ["Yes", "No"], "target": "B", "kind": "yes_no"},
    {"completion": "<answer>yes</answer>", "target": True, "kind": "yes_no"},
]  # fmt: skip
VERDICTS = [
    ("C", True, True), ("B", False, True), ("C", True, False), ("A, C", True, True), ("yes", True, True),
    ("35 mm", True, True), ("4", False, True), ("Left lung", True, False), ("0, 0, 9, 9", True, False),
    (None, False, False), ("A", True, False), ("A, C", True, False), ("no", True, False), ("yes", True, False),
]  # fmt: skip


def test_the_new_verdicts_can_be_kept_as_an_evaluation_to_compare_and_to_report(folder, tmp_path):
    summary = {"name": "after", "model": "tiny", "store": "/s", "blind": [{"name": "prior", "correct": {}}]}
    summary["blind"][0]["correct"] = {row.id: row.id == "q1" for row in RECORDS}
    write_json_atomically(folder / "summary.json", summary)
    out = tmp_path / "lenient"
    printed = run(folder, "--scorer", "lenient", "--out", out, "--json")
    assert printed.exit_code == 0, printed.output
    assert read_records(out) == rescore(RECORDS, SCORERS["lenient"])
    kept = read_summary(out)
    assert kept["accuracy"] == json.loads(printed.stdout)["accuracy"]
    assert (kept["name"], kept["model"], kept["scorer"]) == ("after (lenient)", "tiny", "lenient")
    assert kept["comparison_to_blind"]["a_accuracy"]["value"] == 1 / len(RECORDS)
    page = CliRunner().invoke(app, ["report", str(out), str(folder), "--out", str(tmp_path / "r.html")])
    assert page.exit_code == 0 and "after (lenient)" in (tmp_path / "r.html").read_text()
    assert CliRunner().invoke(app, ["compare", str(folder), str(out)]).exit_code in (0, 3)
    again = run(folder, "--scorer", "lenient", "--out", out)
    assert again.exit_code == 1 and "choose another --out" in again.stderr
    assert read_records(folder) == RECORDS


def test_an_evaluation_does_not_go_on_where_another_scorer_graded(folder, tmp_path):
    assert run(folder, "--out", tmp_path / "strict").exit_code == 0
    assert json.loads((tmp_path / "strict" / "asked.json").read_text())["rescored_by"] == "strict"
    with pytest.raises(RunError, match="holds answers given with other"):
        check_asked(tmp_path / "strict", {"weights": "abc"})


def test_rows_of_completions_can_go_to_a_file(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"completion": "C", "options": ["x", "y", "z"], "target": "C"}) + "\n")
    assert run("--completions", rows, "--out", tmp_path / "graded.jsonl").stdout == ""
    assert json.loads((tmp_path / "graded.jsonl").read_text())["correct"] is True


def test_completions_in_a_file_give_one_json_row_each(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "\n", encoding="utf-8")
    result = run("--completions", file)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["answer"], row["correct"], row["well_formed"]) for row in rows] == VERDICTS
    assert rows[0]["explanation"] == "Answered C, which is right." and rows[3]["id"] == "m"
    assert rows[9]["explanation"] == "No answer could be read (abstained); not well formed."


def test_completions_come_from_standard_input_too_and_another_scorer_may_grade_them():
    line = json.dumps(ROWS[0] | {"completion": "<answer>C.</answer>"})
    result = run("--completions", "-", "--scorer", "medvlm-r1", input=line + "\n")
    (row,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert (row["answer"], row["score"], row["correct"]) == ("C", 0.5, False)


ODD_LINES = {
    "{": "is not JSON",
    "[" * 100_000: "is not JSON",
    "[1]": "is no object",
    '{"completion": "x"}': "has no target",
    '{"target": "A"}': "has no completion",
    '{"completion": "x", "target": null}': "target that is null",
    '{"completion": "x", "target": "A", "mode": "loud"}': "mode 'loud'; the modes are think",
    '{"completion": "x", "target": "A", "kind": "essay"}': "kind 'essay'; the kinds are choice",
    '{"completion": 3, "target": "A"}': "completion that is no text",
    '{"completion": "x", "target": "A", "options": "AB"}': "options that are no list",
    '{"completion": "x", "target": "A", "options": {"x": "CT", "y": "MRI"}}': "options called x, y; call them A, B",
    '{"completion": "x", "target": "A", "kind": "open", "references": 3}': "references that are no list",
    '{"completion": "x", "target": "D", "options": ["CT", "MRI"]}': "the letters of its options are A, B",
    '{"completion": "x", "target": "big", "kind": "numeric"}': "numeric target 'big'",
    '{"completion": "x", "target": "2", "kind": "numeric", "tolerance": "some"}': "tolerance 'some'",
}


@pytest.mark.parametrize("line", ODD_LINES, ids=ODD_LINES.values())
def test_a_row_that_makes_no_sense_says_so_and_ends_nothing(line):
    good = json.dumps(ROWS[0])
    before, odd, after = rescore_lines([good, line, good], SCORERS["strict"], "answers")
    assert before == after and before["correct"] is True
    assert ODD_LINES[line] in odd["error"] and odd["error"] in odd["explanation"] and "answers line 2" in odd["error"]
    assert [odd[name] for name in ("answer", "correct", "well_formed", "score")] == [None] * 4


def test_rows_that_cannot_be_graded_end_the_command_with_1_and_a_count(tmp_path):
    file = tmp_path / "answers.jsonl"
    lines = [json.dumps(ROWS[0]), *ODD_LINES, json.dumps({"id": "last", **ROWS[0]}), '{"completion": "\xff"}']
    file.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode("latin-1"))
    result = run("--completions", file)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 1 and f"{len(ODD_LINES) + 1} of {len(ODD_LINES) + 3} rows" in result.stderr
    assert len(rows) == len(lines) and rows[0]["correct"] and rows[-2]["id"] == "last" and rows[-2]["correct"]
    kept = tmp_path / "graded.jsonl"
    assert run("--completions", file, "--out", kept).exit_code == 1
    assert [json.loads(line) for line in kept.read_text().splitlines()] == rows


def test_a_kind_that_a_paper_s_grader_refuses_is_one_row_s_error():
    first, box, last = rescore_lines([json.dumps(ROWS[n]) for n in (0, 8, 0)], SCORERS["med-r1"], "answers")
    assert first == last and first["correct"] and "of kind box" in box["error"] and box["correct"] is None


def test_a_file_without_rows_says_so(tmp_path):
    for content in ("", "\n \n", "\ufeff"):
        (tmp_path / "rows.jsonl").write_text(content, encoding="utf-8")
        result = run("--completions", tmp_path / "rows.jsonl")
        assert (result.exit_code, result.stdout) == (1, "") and "has no rows" in result.stderr


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        ({"completion": None}, (None, False, False)),  # nothing was written
        ({"options": {"C": "CT", "A": "MRI", "B": "X-ray"}}, ("C", True, True)),
        ({"options": {"(a)": "MRI", "(b)": "X-ray", "(c)": "CT"}}, ("C", True, True)),
        ({"options": [1, 2, 3], "target": "3"}, ("C", True, True)),
        ({"target": "c"}, ("C", True, True)),
        ({"target": "C) ct"}, ("C", True, True)),
        ({"target": "CT"}, ("C", True, True)),
        ({"mode": "no-think", "completion": "<answer>C</answer>"}, ("C", True, True)),
        ({"mode": "Think-After", "completion": "<answer>B</answer><think>x</think>"}, ("B", False, True)),
        ({"kind": "multi-select", "target": "MRI and CT", "completion": "A, C"}, ("A, C", True, False)),
        ({"kind": "multi-select", "target": ["ct", "A"], "completion": "A, C"}, ("A, C", True, False)),
        ({"kind": "yes/no", "target": "True", "completion": "yes", "options": None}, ("yes", True, False)),
        ({"kind": "numeric", "target": 3, "tolerance": 1, "completion": "4", "options": []}, ("4", True, False)),
    ],
)
def test_rows_are_read_in_the_ways_other_programs_write_them(row, verdict):
    plain = {"completion": ROWS[0]["completion"], "options": ["MRI", "X-ray", "CT"], "target": "C", "mode": "think"}
    (found,) = rescore_lines([json.dumps(plain | row)], SCORERS["strict"], "answers")
    assert (found["answer"], found["correct"], found["well_formed"]) == verdict


def test_a_judge_is_not_asked_about_a_row_without_a_question_and_its_silence_ends_the_rows():
    asked = []
    judge = Judge("http://localhost:1", "m", tries=1, sleep=asked.append)
    silent = json.dumps({"completion": "<answer>lung</answer>", "target": "left lung", "kind": "short"})
    (row,) = rescore_lines([silent], judge, "answers")
    assert "has no question" in row["error"] and row["correct"] is None
    with pytest.raises(JudgeError, match="could not be reached"):
        list(rescore_lines([silent.replace("}", ', "question": "Where?"}')], judge, "answers"))


def test_wrong_words_end_with_2_and_wrong_folders_with_1(folder, tmp_path):
    for words in ((), (folder, "--completions", folder), (folder, "--scorer", "medr1"), (folder, "--scorer", "judge")):
        result = run(*words)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ")
    assert run(tmp_path / "nowhere").exit_code == 1
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("method: grpo\n")
    append_records(tmp_path / "run" / "eval" / "after", RECORDS)
    result = run(tmp_path / "run")
    assert result.exit_code == 1 and str(tmp_path / "run" / "eval" / "after") in result.stderr


def test_rescore_has_help_with_an_example_and_imports_nothing_heavy(folder):
    assert "medrl rescore runs/ct/eval/after --scorer med-r1" in run("--help").stdout
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom medrl.cli import app\n"
        f"assert CliRunner().invoke(app, ['rescore', {str(folder)!r}, '--scorer', 'med-r1', '--json']).exit_code == 0\n"
        "heavy = ('torch', 'transformers', 'scipy', 'datasets', 'pandas', 'sympy', 'sacrebleu')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
