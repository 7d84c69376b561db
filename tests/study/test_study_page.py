"""The page of a study, with names that would like to be more than names, in a browser."""

import shutil
from pathlib import Path

import pytest
from test_figures import make_table

from medrl.settings import load_settings
from medrl.study.figures import study_figures
from medrl.study.page import write_study_page
from medrl.study.plan import make_plan
from medrl.study.settings import Study
from medrl.study.stores import Stores

CHROMIUM = shutil.which("chromium")
HOSTILE = "<script>document.title='x'</script>\u202egnol" + "W" * 120


@pytest.fixture(scope="module")
def page_file(mini, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page")
    study = load_settings(Study, mini / "study.yaml", [f"name={HOSTILE!r}"])
    plan = make_plan(study, Stores(mini / "train", mini / "test"))
    figures = study_figures([make_table()], draws=300)
    found = figures["modality"]
    figures["modality"] = {**found, "domains": [HOSTILE, "MRI"], "trained_on": [HOSTILE, "MRI"]}
    return write_study_page(plan, out, figures, out / "study.html")


def test_names_are_text_and_the_page_needs_nothing_else(page_file):
    page = page_file.read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "\u202e" not in page
    assert "Research use only" in page and "http" not in page.replace("http-equiv", "")
    assert "medrl train" in page and "medrl eval" in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_reads_well_without_scripts_network_or_sideways_scrolling(page_file, width):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        complaints, requests = [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_file.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        assert complaints == []
        assert [url for url in requests if not url.startswith("data:")] == [page_file.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("document.querySelectorAll('svg.heat').length") > 10
        browser.close()
