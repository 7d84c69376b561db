"""Records in other programs' formats, read back by those programs."""

import json
from dataclasses import replace
from datetime import datetime
from importlib.util import find_spec

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from typer.testing import CliRunner

from medrl.cli import app
from medrl.errors import RunError, SettingsError
from medrl.files import write_json_atomically
from medrl.report.interchange import FORMATS, export_records
from medrl.runs import append_records, read_records, read_summary
from medrl.types import Sample

HOSTILE = "</script><script>alert(1)</script>\x1b[31m\u202e\ud800: - 'x' \"y\" ---\n---"

NEEDS_INSPECT = (
    pytest.mark.interop,
    pytest.mark.skipif(find_spec("inspect_ai") is None, reason="needs pip install 'medrl[inspect]'"),
)
WITH_INSPECT = [pytest.param(to, marks=NEEDS_INSPECT if to == "inspect" else ()) for to in FORMATS]


@pytest.fixture(scope="module")
def folder(finished_run):
    return finished_run / "eval" / "after"


@pytest.fixture(scope="module")
def hostile(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("hostile") / "eval"
    changes = {"question": HOSTILE, "completion": HOSTILE, "modality": HOSTILE, "answer": HOSTILE}
    append_records(out, [replace(record, **changes) for record in read_records(folder)[:5]])
    write_json_atomically(out / "summary.json", {**read_summary(folder), "name": HOSTILE})
    return out


@pytest.fixture(scope="module")
def sampled(folder, tmp_path_factory):
    """Three samples per question."""
    out = tmp_path_factory.mktemp("sampled") / "eval"
    records = read_records(folder)[:4]
    kept = [
        Sample(completion=f"<answer>{a}</answer>", finish_reason="stop", answer=a, correct=a == "A", parts={}, tokens=5)
        for a in "ABB"
    ]
    append_records(out, [replace(record, samples=tuple(kept)) for record in records])
    write_json_atomically(out / "summary.json", read_summary(folder))
    return out


@pytest.mark.interop
def test_lmms_evals_own_loader_reads_the_samples_and_finds_the_results(folder, hostile, sampled, tmp_path):
    loader = pytest.importorskip("lmms_eval.baselines.loader")
    for name, given in (("plain", folder), ("hostile", hostile), ("sampled", sampled)):
        out = tmp_path / f"{name}_samples_scans.jsonl"
        export_records(given, "lmms-eval", out)
        scores, results = loader.load_baseline(str(out), "scans")
        records = read_records(given)
        assert scores == {number: float(record.correct) for number, record in enumerate(records)}
        share = sum(record.correct for record in records) / len(records)
        assert results["results"]["scans"]["acc,none"] == pytest.approx(share)


def test_the_samples_hold_what_was_asked_and_written(folder, sampled, tmp_path):
    written = export_records(folder, "lmms-eval", tmp_path / "20260101_samples_scans.jsonl")
    assert [file.name for file in written] == ["20260101_samples_scans.jsonl", "20260101_results.json"]
    rows = [json.loads(line) for line in written[0].read_text().splitlines()]
    for row, record in zip(rows, read_records(folder), strict=True):
        assert (row["id"], row["target"], row["resps"]) == (record.id, record.target, [record.completion])
        assert row["filtered_resps"] == (record.answer or "")
        assert row["input"].startswith(record.question) and "\nB) Adenocarcinoma" in row["input"]
    export_records(sampled, "lmms-eval", tmp_path / "s.jsonl")
    row = json.loads((tmp_path / "s.jsonl").read_text().splitlines()[0])
    assert row["resps"] == ["<answer>A</answer>", "<answer>B</answer>", "<answer>B</answer>"]


@pytest.mark.interop
def test_inspect_opens_the_log(folder, tmp_path):
    log = pytest.importorskip("inspect_ai.log")
    for name in ("after.eval", "after.json"):
        export_records(folder, "inspect", tmp_path / name)
        opened = log.read_eval_log(str(tmp_path / name), resolve_attachments=True)
        records = read_records(folder)
        assert opened.status == "success" and len(opened.samples) == len(records) == 160
        for sample, record in zip(opened.samples, records, strict=True):
            score = sample.scores["medrl"]
            assert (sample.id, sample.target, sample.choices) == (record.id, record.target, list(record.options))
            assert (score.value, score.answer) == ("C" if record.correct else "I", record.answer)
            assert sample.metadata["completion"] == record.completion
            image, question = sample.input[0].content
            assert image.image.startswith("data:image/jpeg;base64,")
            assert question.text.startswith(f"{record.question}\nA) {record.options[0]}\nB) ")
        started, ended = (
            datetime.fromisoformat(getattr(opened.stats, f"{end}_at")) for end in ("started", "completed")
        )
        assert (ended - started).total_seconds() == pytest.approx(read_summary(folder)["seconds"], abs=1e-5)
        reasoned = next(s for s in opened.samples if s.scores["medrl"].answer)
        assert reasoned.messages[1].content[0].type == "reasoning"
        value = opened.results.scores[0].metrics["accuracy"].value
        assert value == pytest.approx(sum(record.correct for record in records) / 160)


@pytest.mark.interop
def test_inspect_has_an_epoch_for_every_sample_and_opens_hostile_text(sampled, hostile, tmp_path):
    log = pytest.importorskip("inspect_ai.log")
    export_records(sampled, "inspect", tmp_path / "sampled.eval")
    opened = log.read_eval_log(str(tmp_path / "sampled.eval"))
    found = {(sample.id, sample.epoch): sample.scores["medrl"].answer for sample in opened.samples}
    assert found == {(r.id, n): answer for r in read_records(sampled) for n, answer in enumerate("ABB", start=1)}
    assert opened.eval.config.epochs == 3
    export_records(hostile, "inspect", tmp_path / "hostile.eval")
    assert len(log.read_eval_log(str(tmp_path / "hostile.eval")).samples) == 5


@pytest.mark.interop
def test_inspects_own_data_frames_read_the_log(folder, tmp_path):
    analysis = pytest.importorskip("inspect_ai.analysis")
    export_records(folder, "inspect", tmp_path / "after.eval")
    frame = analysis.samples_df(str(tmp_path / "after.eval"))
    assert len(frame) == 160 and set(frame["score_medrl"]) == {"C", "I"}


@pytest.mark.interop
def test_inspects_viewer_makes_a_site_of_the_log(folder, tmp_path):
    log = pytest.importorskip("inspect_ai.log")
    (tmp_path / "logs").mkdir()
    export_records(folder, "inspect", tmp_path / "logs" / "after.eval")
    log.bundle_log_dir(str(tmp_path / "logs"), str(tmp_path / "site"))
    (listed,) = json.loads((tmp_path / "site" / "logs" / "listing.json").read_text()).values()
    accuracy = sum(record.correct for record in read_records(folder)) / 160
    assert listed["status"] == "success" and listed["primary_metric"]["value"] == pytest.approx(accuracy)
    assert (tmp_path / "site" / "index.html").exists() and (tmp_path / "site" / "logs" / "after.eval").exists()


def test_the_hub_reads_the_card(folder, hostile, tmp_path):
    export_records(folder, "model-index", tmp_path / "README.md", dataset="me/scans")
    card = ModelCard.load(tmp_path / "README.md")
    results = card.data.eval_results
    summary = read_summary(folder)
    assert card.data.model_name == "after"
    assert [result.dataset_config for result in results] == [None, *summary["by_modality"]]
    assert results[0].metric_value == pytest.approx(100 * summary["accuracy"]["value"], abs=0.005)
    assert results[0].dataset_type == "me/scans" and "n = 160" in results[0].metric_name
    assert "Research use only" in card.text
    export_records(hostile, "model-index", tmp_path / "HOSTILE.md")
    hostile_card = ModelCard.load(tmp_path / "HOSTILE.md")
    assert "alert(1)" in hostile_card.data.eval_results[1].dataset_config
    assert hostile_card.text == card.text


def test_the_hub_reads_the_eval_results(folder, tmp_path):
    export_records(folder, "eval-results", tmp_path / "scans.yaml", dataset="me/scans", task="ct")
    (entry,) = parse_eval_result_entries(yaml.safe_load((tmp_path / "scans.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id) == ("me/scans", "ct")
    assert entry.value == pytest.approx(100 * read_summary(folder)["accuracy"]["value"], abs=0.005)
    assert "95 % interval" in entry.notes and "mode think" in entry.notes
    with pytest.raises(SettingsError, match="--dataset OWNER/NAME"):
        export_records(folder, "eval-results", tmp_path / "scans.yaml")


@pytest.mark.parametrize("to", WITH_INSPECT)
def test_no_format_tells_who_the_patient_is(folder, tmp_path, to):
    given, endings = tmp_path / "eval", {"inspect": "json", "lmms-eval": "jsonl", "model-index": "md"}
    append_records(given, [replace(record, patient="patient-4711") for record in read_records(folder)[:3]])
    write_json_atomically(given / "summary.json", read_summary(folder))
    files = export_records(given, to, tmp_path / f"out.{endings.get(to, 'yaml')}", dataset="me/scans")
    assert all(b"4711" not in file.read_bytes() for file in files)


@pytest.mark.parametrize("to", WITH_INSPECT)
def test_a_file_of_another_ending_and_an_unfinished_evaluation_are_refused(folder, tmp_path, to):
    with pytest.raises(SettingsError, match=r"ends in '\.txt'"):
        export_records(folder, to, tmp_path / "out.txt", dataset="me/scans")
    append_records(tmp_path / "eval", read_records(folder)[:3])
    with pytest.raises(RunError, match="not a finished evaluation"):
        export_records(tmp_path / "eval", to, tmp_path / "out.txt")


def test_the_command_says_what_it_wrote(folder, tmp_path):
    words = ["export-records", folder, "--to", "lmms-eval", "--out", tmp_path / "new" / "a_samples_b.jsonl"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert "a_samples_b.jsonl" in result.stdout and (tmp_path / "new" / "a_results.json").is_file()
