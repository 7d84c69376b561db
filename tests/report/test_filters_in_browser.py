"""The report as a reader uses it: filters by click, at phone and desk width; and 150 texts that mean harm."""

import dataclasses
import itertools
import shutil

import pytest
from hostile_texts import HOSTILE
from PIL import Image

from medrl.files import write_json_atomically
from medrl.report import gallery
from medrl.report.page import write_report
from medrl.runs import Run, append_records, read_records, read_summary

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
WIDTHS = (390, 1440)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


class Visit:
    """A page that is open, and whatever it complained about or asked for."""

    def __init__(self, browser, report, width, **options) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(report.as_uri())
        self.report = report

    def assert_calm(self, width) -> None:
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith("data:")] == [self.report.as_uri()]
        assert self.page.evaluate("document.documentElement.scrollWidth") == width

    def items(self) -> list[dict]:
        """What is shown of every visible item."""
        visible = "[...document.querySelectorAll('.item')].filter(item => item.checkVisibility())"
        return self.page.evaluate(f"{visible}.map(item => ({{...item.dataset}}))")


def choose(page, by: str, value: str) -> None:
    """Use one of the menus."""
    page.locator("select.order" if by == "order" else f"select[data-by={by}]").select_option(value)


@pytest.fixture(scope="module")
def report(finished_run, tmp_path_factory):
    """Three evaluations; the reasoning of the last has a different length everywhere."""
    out = tmp_path_factory.mktemp("three")
    for number, name in enumerate(("base", "sft", "grpo")):
        old = finished_run / "eval" / ("before" if number == 0 else "after")
        records = [
            dataclasses.replace(
                record, completion=f"<think>{'It is dark. ' * (1 + place * number % 23)}</think><answer>A</answer>"
            )
            for place, record in enumerate(read_records(old))
        ]
        append_records(out / name, records)
        write_json_atomically(out / name / "summary.json", {**read_summary(old), "name": name})
    return write_report([out / name for name in ("base", "sft", "grpo")], out / "report.html")


@pytest.mark.parametrize("width", WIDTHS)
def test_filters_work_by_click(browser, report, width):
    visit = Visit(browser, report, width)
    page = visit.page
    total = page.locator(".item").count()
    assert total > 30 and page.locator(".said").inner_text() == f"{total} items"

    choose(page, "modality", "CT")
    assert {item["modality"] for item in visit.items()} == {"CT"}
    choose(page, "verdict", "wrong")
    assert {(item["modality"], item["verdict"] != "right") for item in visit.items()} == {("CT", True)}
    few = len(visit.items())
    assert page.locator(".said").inner_text() == f"{few} of {total} items shown"
    assert 0 < few < total

    page.get_by_role("button", name="Reset").click()
    assert page.locator(".said").inner_text() == f"{total} items"
    choose(page, "kind", "fixed")
    assert {item["kind"] for item in visit.items()} == {"fixed"}
    choose(page, "question", "Disease diagnosis")
    assert {(item["kind"], item["question"]) for item in visit.items()} == {("fixed", "Disease diagnosis")}

    page.get_by_role("button", name="Reset").click()
    for order, sign in (("shortest", 1), ("longest", -1)):
        choose(page, "order", order)
        lengths = [int(item["length"]) for item in visit.items()]
        assert lengths == sorted(lengths, key=lambda length: sign * length) and len(lengths) == total
        assert len(set(lengths)) > 5
    page.get_by_role("button", name="Reset").click()
    assert page.locator(".found .item").count() == 0
    visit.assert_calm(width)
    page.close()


def test_after_any_filters_the_page_is_as_it_was(browser, report):
    visit = Visit(browser, report, 1440)
    order = "[...document.querySelectorAll('.groups .item .small')].map(line => line.textContent)"
    before = visit.page.evaluate(order)
    for modality, order_by in itertools.product(("CT", "X-ray", ""), ("longest", "shortest", "")):
        choose(visit.page, "modality", modality)
        choose(visit.page, "order", order_by)
    assert visit.page.evaluate(order) == before
    visit.page.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_without_scripts_all_can_be_read_and_no_dead_control_is_shown(browser, report, width):
    context = browser.new_context(java_script_enabled=False, viewport={"width": width, "height": 900})
    page = context.new_page()
    page.goto(report.as_uri())
    assert not page.locator(".filters").is_visible()
    for summary in page.locator("#items summary").all():
        summary.click()
    assert page.locator("#items .item:visible").count() == page.locator("#items .item").count() > 30
    context.close()


def test_base_sft_and_rl_stand_beside_each_other_and_the_image_on_a_desk_and_below_each_other_on_a_phone(
    browser, report
):
    boxes = """[...document.querySelector('.item').querySelectorAll('.images, .answer')].map(e => {
      const box = e.getBoundingClientRect(); return [box.left, box.top, box.width]; })"""
    visit = Visit(browser, report, 1440)
    image, *answers = visit.page.evaluate(boxes)
    assert len(answers) == 3
    assert all(left > image[0] + image[2] for left, _, _ in answers)
    assert len({top for _, top, _ in answers}) == 1
    visit.page.close()
    visit = Visit(browser, report, 390)
    image, *answers = visit.page.evaluate(boxes)
    assert all(top > image[1] for _, top, _ in answers) and len({left for left, _, _ in answers}) == 1
    visit.page.close()


def test_the_marks_of_a_chart_are_whole(browser, report):
    visit = Visit(browser, report, 1440)
    overflows = "[...document.querySelectorAll('svg.dot')].map(dot => getComputedStyle(dot).overflow)"
    assert set(visit.page.evaluate(overflows)) == {"visible"}
    visit.page.close()


def test_the_printed_page_has_no_controls_and_cuts_no_text_off(browser, report):
    visit = Visit(browser, report, 1440)
    visit.page.emulate_media(media="print")
    assert not visit.page.locator(".filters").is_visible()
    cut = "[...document.querySelectorAll('.completion')].filter(e => e.scrollHeight > e.clientHeight + 1).length"
    assert visit.page.evaluate(cut) == 0
    visit.page.close()


def test_there_are_150_of_them():
    assert len(set(HOSTILE)) == len(HOSTILE) >= 150


@pytest.fixture(scope="module")
def hostile_pages(finished_run, tmp_path_factory):
    """Every text as question, option, reasoning and modality of a test item that is shown, as the name of an
    evaluation, and, where a file system takes it, as the name of an image file and of a run folder."""
    out = tmp_path_factory.mktemp("hostile")
    base = read_records(finished_run / "eval" / "after")
    pages = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "N_ITEMS", 100)
        for number, texts in enumerate(batched(HOSTILE)):
            store = out / f"store-{number}"
            (store / "images").mkdir(parents=True)
            records = []
            for place, text in enumerate(texts):
                name = file_name(text, f"{place}.png")
                Image.new("L", (40, 30), 90).save(store / "images" / name)
                records.append(dataclasses.replace(
                    base[place], question=text, options=(text, "b", text), completion=f"<think>{text}</think>{text}",
                    modality=text, question_type=text, source=text, images=(f"images/{name}", f"images/gone-{name}"),
                ))  # fmt: skip
            folders = []
            for place, text in enumerate(texts[::10]):
                folders.append(out / f"eval-{number}-{place}")
                append_records(folders[-1], records)
                summary = {"name": text, "store": str(store), "model": text, text: {text: [text]}, "blind": []}
                write_json_atomically(folders[-1] / "summary.json", summary)
            for place, text in enumerate(texts):
                name = file_name(text, f"run{place}")
                run = Run.create(out / f"runs-{number}" / name, {"note": text}, {"from": text})
                run.append_metrics({"step": 0, "reward": 1.0})
                folders.append(run.path)
            pages.append(write_report(folders, out / f"report-{number}.html"))
    return pages


def batched(texts):
    return [texts[start : start + 30] for start in range(0, len(texts), 30)]


def file_name(text: str, end: str) -> str:
    """The text as the name of a file, as far as a file system takes it."""
    taken = text.replace("/", "∕").replace("\0", "").encode("utf-8", "replace")[:180].decode("utf-8", "ignore")
    return taken + end


@pytest.mark.parametrize("width", WIDTHS)
def test_150_hostile_texts_run_nothing_and_break_no_layout(browser, hostile_pages, width):
    shown = 0
    for report in hostile_pages:
        visit = Visit(browser, report, width)
        page = visit.page
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        visit.assert_calm(width)
        shown += page.locator(".item").count()
        inside = """[...document.querySelectorAll('.card, .answer, .tile, .filters, h1, li, img')].filter(e => {
          const {left, right, width} = e.getBoundingClientRect();
          return width && (left < 0 || right > innerWidth); }).length"""
        assert page.evaluate(inside) == 0
        assert page.evaluate("document.scripts.length") == 1
        names = "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
        assert page.evaluate(f"{names}.filter(name => name.startsWith('on')).length") == 0
        # Every modality of the page can be chosen, and is then what is shown.
        choice = page.locator("select[data-by=modality]").first
        values = choice.evaluate("select => [...select.options].map(option => option.value)")
        for place, value in list(enumerate(values))[1:6]:
            choice.select_option(index=place)
            assert {item["modality"] for item in visit.items()} == {value}
        visit.assert_calm(width)
        page.close()
    assert shown >= 150
