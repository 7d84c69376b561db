import base64
import dataclasses
import hashlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from medrl import report
from medrl.errors import RunError
from medrl.files import write_json_atomically
from medrl.report.page import write_report
from medrl.runs import Run, append_records, read_records, read_summary

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)><a href='javascript:alert(3)'>x</a>\u202e\x1b[31m'\"&"
FILTERS = (Path(report.__file__).parent / "templates" / "filters.js").read_text()
VOID = {"meta", "link", "img", "br", "line", "circle", "polyline", "rect"}


class Page(HTMLParser):
    """Collects elements, attributes and text, and checks that elements nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag != "li" or self.open[-1:] == ["li"]:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.text += data


def assert_is_inert(page: Page) -> None:
    """No script but ours, no handler, no reference to anything outside the page."""
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts in ([], [{}]) and page.scripts == [FILTERS] * len(scripts)
    for tag, attributes in page.tags:
        assert tag not in {"iframe", "object", "embed", "form", "base", "foreignobject", "use", "image"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"href", "src", "xlink:href", "srcset", "action"}:
                assert value is not None and re.match(r"#|data:", value), (tag, name, value)


@pytest.fixture(scope="module")
def page(finished_run, tmp_path_factory) -> Page:
    out = write_report([finished_run], tmp_path_factory.mktemp("out") / "report.html")
    return Page(out.read_text(encoding="utf-8"))


def test_the_page_says_what_it_is_not(page):
    assert "Research use only" in page.text
    assert "Model-generated reasoning is not an explanation of the model" in page.text


def test_the_page_holds_results_curves_domains_items_and_provenance(page):
    for expected in (
        "after is better than before by 41.2 points", "83.1\u202f%", "majority_letter", "95\u202f% interval",
        "Completion length", "KL to the reference", "Accuracy by modality", "Magnetic resonance imaging",
        "Wrong before, right after", "Right before, wrong after", "group_size: 8", "step-000120", "f" * 64, "67 min",
        "2.13.0", "Read this first",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert sum(tag == "img" for tag, _ in page.tags) == 24 + 4 + 4


def test_evaluations_stand_in_the_order_they_were_made(page):
    assert page.text.index("before") < page.text.index("after minus before")


def test_without_a_start_time_the_evaluation_whose_summary_is_older_comes_first(finished_run, tmp_path):
    run = Run.create(tmp_path / "run", {"seed": 1}, {})
    for age, (name, skill) in enumerate({"a-later": "after", "z-first": "before"}.items()):
        evaluation = rewrite_evaluation(finished_run / "eval" / skill, run.path / "eval" / name)
        summary = {**read_summary(evaluation), "name": name, "started": None}
        write_json_atomically(evaluation / "summary.json", summary)
        os.utime(evaluation / "summary.json", (1_700_000_000 - age, 1_700_000_000 - age))
    page = Page(write_report([run.path], tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "a-later is better than z-first" in page.text


def test_the_page_needs_nothing_from_outside(page):
    assert_is_inert(page)
    policies = [a.get("content") for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies[0] is not None and policies[0].startswith("default-src 'none'; img-src data:; style-src")
    digest = base64.b64encode(hashlib.sha256(FILTERS.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policies[0]
    assert not re.search(r"url\(|@import", (Path(report.__file__).parent / "templates" / "style.css").read_text())


def test_a_title_of_ones_own_takes_the_place_of_the_runs_names_and_is_escaped(finished_run, tmp_path):
    source = write_report([finished_run], tmp_path / "a.html", title=f"CT {HOSTILE}").read_text(encoding="utf-8")
    page = Page(source)
    assert_is_inert(page)
    assert page.text.count("CT <script>alert(1)</script>") == 2  # of the window and of the page
    assert "<h1>CT &lt;script&gt;" in source


def test_the_same_folders_give_the_same_page(finished_run, tmp_path):
    first, second = (write_report([finished_run], tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def rewrite_evaluation(old: Path, new: Path, **changes) -> Path:
    new.mkdir(parents=True)
    append_records(new, (dataclasses.replace(record, **changes) for record in read_records(old)))
    write_json_atomically(new / "summary.json", read_summary(old))
    return new


def test_hostile_text_is_shown_and_does_nothing(finished_run, tmp_path):
    evaluation = rewrite_evaluation(
        finished_run / "eval" / "after",
        tmp_path / "evil",
        completion=HOSTILE,
        question=HOSTILE,
        options=(HOSTILE, "b", "c", "d"),
        modality=HOSTILE,
        question_type=HOSTILE,
        source=HOSTILE,
    )
    summary = read_summary(evaluation) | {"name": HOSTILE, "model": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}}
    write_json_atomically(evaluation / "summary.json", summary)
    run = Run.create(tmp_path / "run", {"note": HOSTILE}, {HOSTILE: HOSTILE})
    run.append_metrics({"step": 0, "reward": 1.0, f"rewards/{HOSTILE}/mean": 1.0})
    source = write_report([run.path, evaluation], tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert_is_inert(page)
    assert "\u202e" not in source and "\x1b" not in source
    assert page.text.count("<script>alert(1)</script>") > 24
    assert "⟦U+202E⟧" in page.text and "␛[31m" in page.text


def test_lone_surrogates_and_very_long_completions_do_not_break_the_page(finished_run, tmp_path):
    evaluation = rewrite_evaluation(
        finished_run / "eval" / "after", tmp_path / "odd", completion="\ud83d" + "x" * 100_000
    )
    source = write_report([evaluation], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "⟦U+D83D⟧" in source and "94001 more characters" in source
    assert len(source) < 600_000


def test_missing_images_become_a_note(finished_run, tmp_path):
    evaluation = rewrite_evaluation(finished_run / "eval" / "after", tmp_path / "bare", images=("images/gone.png",))
    page = Page(write_report([evaluation], tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.text.count("No image: the image is no longer in its store") == 24 + 4 + 4
    assert not any(tag == "img" for tag, _ in page.tags)


def test_a_run_without_evaluations_and_an_evaluation_without_a_run_are_reported(finished_run, tmp_path):
    run = Run.create(tmp_path / "fresh", {"seed": 1}, {})
    run.append_metrics({"step": 0, "loss": 2.0})
    alone = Page(write_report([run.path], tmp_path / "a.html").read_text(encoding="utf-8")).text
    assert "Loss" in alone and "By domain" not in alone
    evaluation = Page(write_report([finished_run / "eval" / "after"], tmp_path / "b.html").read_text(encoding="utf-8"))
    assert "Learning curves" not in evaluation.text and "By domain" in evaluation.text


def test_a_folder_given_twice_is_reported_once_and_equal_names_are_told_apart(finished_run, tmp_path):
    inside = finished_run / "eval" / "after"
    other = rewrite_evaluation(inside, tmp_path / "other" / "after")
    page = Page(write_report([finished_run, inside, other], tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Evaluation ct-demo/after" in page.text and "Evaluation other/after" in page.text
    assert page.text.count("Evaluation ct-demo/after") == 1


def test_evaluations_over_other_examples_are_not_compared(finished_run, tmp_path):
    other = rewrite_evaluation(finished_run / "eval" / "after", tmp_path / "other", target="A")
    page = Page(write_report([finished_run / "eval" / "before", other], tmp_path / "r.html").read_text())
    assert "Evaluations over other examples stand apart" in page.text
    assert "better than before" not in page.text


def test_what_is_neither_run_nor_evaluation_is_refused(tmp_path):
    with pytest.raises(RunError, match="neither a run folder"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(RunError, match="nothing to report in no folder"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(RunError, match="nothing to report"):
        write_report([Run.create(tmp_path / "run", {"seed": 1}, {}).path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_reporting_does_not_load_torch():
    code = "import sys, medrl.report.page; sys.exit(bool({'torch', 'scipy', 'matplotlib'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
