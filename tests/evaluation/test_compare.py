import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import medrl
from medrl.cli import app
from medrl.errors import RunError
from medrl.evaluation.asked import differing, read_how
from medrl.evaluation.blind import blind_baselines
from medrl.evaluation.compare import compare, compare_to_blind
from medrl.evaluation.intervals import mcnemar_exact, wilson
from medrl.files import write_json_atomically
from medrl.runs import append_records
from medrl.types import EvalRecord, Example


def records(correct: str, *, per_image: int = 1, patient: str | None = None) -> list[EvalRecord]:
    """One record per character, right where it is '1'."""
    return [
        EvalRecord(
            id=f"q{i:03}", source="s", modality="CT", question_type="D", patient=patient,
            images=(f"images/{i // per_image}.png",), question="?", options=("a", "b"), mode="think", prompt_hash="",
            completion="", finish_reason="stop", answer="A" if bit == "1" else "B", target="A", correct=bit == "1",
            parts={}, tokens=1,
        )
        for i, bit in enumerate(correct)
    ]  # fmt: skip


def test_the_difference_is_b_minus_a_paired_by_id_in_any_order():
    a, b = records("1100" * 10), records("1011" * 10)
    random.Random(0).shuffle(b)
    comparison = compare(a, b)
    assert comparison.difference.value == pytest.approx(0.25)
    assert (comparison.only_a, comparison.only_b) == (10, 20)
    assert comparison.mcnemar_p == mcnemar_exact(10, 20)
    assert comparison.a_accuracy == wilson(20, 40) and comparison.b_accuracy == wilson(30, 40)
    back = compare(b, a)
    assert (back.difference.low, back.difference.high) == pytest.approx(
        (-comparison.difference.high, -comparison.difference.low), abs=0.03
    )


def test_a_clear_gain_is_called_better_and_its_reverse_worse():
    a, b = records("0" * 60 + "1" * 40), records("0" * 20 + "1" * 80)
    gain, loss = compare(a, b, a_name="before", b_name="after"), compare(b, a, a_name="after", b_name="before")
    assert gain.better and not gain.worse
    assert gain.verdict.startswith("after is better than before by 40.0 points (95 % interval +")
    assert loss.worse and loss.verdict.startswith("before is worse than after by 40.0 points")


@pytest.mark.parametrize(("a", "b"), [("01" * 20, "10" * 19 + "11"), ("0" * 5, "1" * 5), ("1" * 9, "1" * 9)])
def test_no_gain_is_claimed_on_thin_evidence(a, b):
    comparison = compare(records(a), records(b))
    assert not comparison.better and not comparison.worse
    assert comparison.verdict.startswith("No difference shown: B minus A is +")
    assert "better" not in comparison.verdict


def test_questions_about_one_image_count_together():
    a, b = "0" * 40, "1" * 8 + "0" * 32
    alone = compare(records(a), records(b))
    together = compare(records(a, per_image=8), records(b, per_image=8))
    assert together.n_clusters == 5 and together.n == 40
    assert alone.better and not together.better


def test_one_image_only_gives_no_interval_and_no_claim():
    comparison = compare(records("0" * 30, per_image=30), records("1" * 30, per_image=30))
    assert comparison.difference.low is None and not comparison.better
    assert "no interval" in comparison.verdict


def test_questions_without_images_are_each_their_own_cluster():
    a, b = ([dataclasses.replace(r, images=()) for r in records(bits)] for bits in ("0011", "0111"))
    assert compare(a, b).n_clusters == 4


ASKED = {
    "weights": "0f", "dtype": "torch.bfloat16", "image_size": {"shortest_edge": 784, "longest_edge": 401408},
    "max_new_tokens": 256, "option_probs": True, "sampling": None, "store_fingerprint": "ab" * 32,
    "started": "2026-01-01", "questions": 4,
}  # fmt: skip


def write_evaluation(folder: Path, rows: list[EvalRecord], **asked) -> Path:
    folder.mkdir()
    append_records(folder, rows)
    write_json_atomically(folder / "asked.json", {**ASKED, **asked})
    return folder


def test_evaluations_that_were_asked_alike_have_no_note(tmp_path):
    folders = [
        write_evaluation(tmp_path / name, records("0101"), weights=name, started=name, option_probs=name == "a")
        for name in ("a", "b")
    ]
    assert medrl.compare(*folders).note == ""
    assert compare(records("01"), records("11")).asked_differently == ()


def test_what_differs_besides_the_weights_is_said_by_the_command_the_report_and_python(tmp_path):
    write_evaluation(tmp_path / "a", records("0101"))
    small = {"shortest_edge": 784, "longest_edge": 50176}
    sampled = {"samples": 5, "temperature": 0.7}
    write_evaluation(
        tmp_path / "b", records("0111"), dtype="torch.float32", image_size=small, max_new_tokens=40, sampling=sampled
    )
    note = (
        "Besides their weights, a and b differ in dtype (bfloat16, float32), max_pixels (401408, 50176), "
        "max_new_tokens (256, 40), sampling (greedy, samples 5, temperature 0.7)."
    )
    assert medrl.compare(tmp_path / "a", tmp_path / "b").note == note
    said = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b")]).stdout
    assert said.rstrip().endswith(note)
    found = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]).stdout
    assert json.loads(found)["asked_differently"][0] == "dtype (bfloat16, float32)"
    for name in ("a", "b"):
        write_json_atomically(tmp_path / name / "summary.json", {"name": name})
    assert note in medrl.write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "r.html").read_text()


def test_only_what_is_known_of_both_is_said_to_differ(tmp_path):
    write_evaluation(tmp_path / "a", records("0101"))
    behind = dict.fromkeys(("dtype", "image_size", "weights", "store_fingerprint"))
    write_evaluation(tmp_path / "b", records("0111"), **behind, endpoint="http://x", max_new_tokens=40)
    assert differing(read_how(tmp_path / "a"), read_how(tmp_path / "b")) == ("max_new_tokens (256, 40)",)
    append_records(tmp_path / "old", records("0111"))  # of before there was asked.json
    assert read_how(tmp_path / "old") == {} and read_how(tmp_path / "b" / "records.jsonl")["max_new_tokens"] == "40"
    write_evaluation(tmp_path / "again", records("0111"))
    write_json_atomically(tmp_path / "again" / "asked.json", {"rescored_by": "lenient", "started": None})
    assert differing(read_how(tmp_path / "a"), read_how(tmp_path / "again")) == ("scorer (strict, lenient)",)


def test_other_prompts_are_named_by_mode_or_as_another_wording():
    a = records("0101")
    direct = [dataclasses.replace(row, mode="no_think", prompt_hash="n") for row in a]
    assert compare(a, direct).asked_differently == ("mode (think, no_think)",)
    reworded = [dataclasses.replace(row, prompt_hash="n") for row in a]
    assert compare(a, reworded).note == "Besides their weights, A and B differ in the wording of the prompt."


def test_patients_can_be_the_clusters_when_they_are_known():
    a, b = records("0011", patient="p1"), records("0111", patient="p1")
    assert compare(a, b, cluster="patient").n_clusters == 1
    with pytest.raises(RunError, match="q000 names no patient; compare by image"):
        compare(records("01"), records("11"), cluster="patient")


def test_different_examples_are_refused_with_how_many_and_which():
    with pytest.raises(RunError, match=r"before and after are over different examples: 5 of 7 .*\(q002, q003, q004, …"):
        compare(records("1" * 7), records("11"), a_name="before", b_name="after")
    with pytest.raises(RunError, match=r"1 of 2 examples \(q001\) only in B"):
        compare(records("1"), records("11"))


@pytest.mark.parametrize("change", [{"target": "B"}, {"question": "Other?"}, {"options": ("a", "c")}])
def test_the_same_ids_over_other_contents_are_refused(change):
    b = records("111")
    b[1] = dataclasses.replace(b[1], **change)
    with pytest.raises(RunError, match=r"differ in question, options or target of 1 of 3 examples \(q001\)"):
        compare(records("111"), b)


def test_other_prompts_and_modes_can_be_compared():
    b = [dataclasses.replace(r, mode="no_think", prompt_hash="f" * 16) for r in records("111")]
    assert compare(records("111"), b).n == 3


def test_a_repeated_record_is_refused():
    with pytest.raises(RunError, match=r"A holds 1 of 3 examples \(q000\) more than once"):
        compare([*records("11"), *records("1")], records("11"))


def test_no_records_are_no_error():
    comparison = compare([], [])
    assert comparison.verdict == "Nothing to compare: there are no examples."
    json.dumps(comparison.as_dict(), allow_nan=False)


def test_the_model_is_compared_with_a_baseline_that_saw_nothing():
    test = [
        Example(id=f"q{i:03}", source="s", images=(), question="?", options=("long one", "b"), target="AB"[i % 2])
        for i in range(60)
    ]
    (longest,) = blind_baselines(None, test)
    comparison = compare_to_blind(records("1" * 60), longest)
    assert comparison.difference.value == pytest.approx(0.5)
    assert comparison.a_accuracy == longest.accuracy
    assert comparison.verdict.startswith("the model is better than longest_option by 50.0 points")
    as_kept = compare_to_blind(records("1" * 60), longest.as_dict()["correct"])
    assert as_kept.difference == comparison.difference
    with pytest.raises(RunError, match="different examples"):
        compare_to_blind(records("111"), longest)


def test_the_json_form_holds_what_the_contract_names():
    value = compare(records("0011"), records("0111")).as_dict()
    assert value["difference"].keys() == {"value", "low", "high", "n"}
    assert value["n"] == 4 and value["only_b"] == 1 and value["mcnemar_p"] == 1.0
    json.dumps(value, allow_nan=False)


def test_comparing_loads_neither_torch_nor_scipy():
    code = (
        "import sys, medrl.evaluation.compare, medrl.evaluation.metrics\n"
        "sys.exit(bool({'torch', 'scipy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
