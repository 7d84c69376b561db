import dataclasses
import shutil

import pytest

from medrl.files import write_json_atomically
from medrl.report.page import write_report
from medrl.runs import Run, append_records, read_records, read_summary

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1440])
def test_the_report_reads_well_without_scripts_network_or_sideways_scrolling(
    browser, finished_run, tmp_path, width, scheme
):
    report = write_report([finished_run], tmp_path / "report.html")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [report.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    too_small = (
        "[...document.querySelectorAll('main *')].filter(e => parseFloat(getComputedStyle(e).fontSize) < 11).length"
    )
    assert page.evaluate(too_small) == 0
    page.close()


OUTSIDE = """[...document.querySelectorAll('.plot')].flatMap(plot => [...plot.querySelectorAll('text')]
  .filter(text => { const t = text.getBoundingClientRect(), p = plot.getBoundingClientRect();
                    return t.left < p.left || t.right > p.right || t.bottom > p.bottom; })
  .map(text => text.textContent))"""


def test_no_number_of_a_learning_curve_is_cut_off(browser, tmp_path):
    run = Run.create(tmp_path / "run", {"seed": 1}, {})
    for step in range(0, 300_000, 1000):
        share = step / 300_000
        run.append_metrics({
            "step": step, "reward": -0.001125 * share, "loss": -2.4e-10 * share, "lr": 1.125e-4 * share,
            "grad_norm": 123456 * share, "kl": 0.01125 * share, "completions/mean_length": 4096 * share,
        })  # fmt: skip
    report = write_report([tmp_path / "run"], tmp_path / "report.html")
    for width in (390, 1440):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.goto(report.as_uri())
        assert len(page.query_selector_all(".plot text")) > 30
        assert page.evaluate(OUTSIDE) == []
        page.close()


def test_names_and_texts_without_a_break_do_not_push_the_page_sideways(browser, finished_run, tmp_path):
    word = "W" * 300
    names = {"modality": word, "question_type": word, "source": word, "question": word, "completion": word}
    old = finished_run / "eval" / "after"
    options = (word, word, word, word)
    records = [dataclasses.replace(record, **names, options=options) for record in read_records(old)]
    for name in ("first", "second"):
        append_records(tmp_path / name, records)
        blind = [{**entry, "name": word} for entry in read_summary(old)["blind"][:1]]
        summary = {"name": f"{name}{word}", word: word, "nested": {word: [word] * 3}, "blind": blind}
        write_json_atomically(tmp_path / name / "summary.json", summary)
    report = write_report([tmp_path / "first", tmp_path / "second"], tmp_path / "report.html")
    for width in (375, 1440):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.goto(report.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.close()
