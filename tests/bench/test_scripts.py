"""The scripts in benchmarks/: what a call printed is found whatever stands around it, and nothing ends the rest."""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu
    import tables

    monkeypatch.setattr(tables, "ROOT", Path.cwd())
    return gpu, tables


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        (json.dumps({"a": {"b": 1}}, indent=2), {"a": {"b": 1}}),
        ('a warning\n{"a": 1}\nand {"b": 2}\n', {"a": 1}),
        ('{"a": 1}\n{"a": 2}\n', {"a": 2}),
        ('{"a": 1}\n{"a": 2', {"a": 1}),
        ("{not json\n[1]", None),
        ("", None),
    ],
)
def test_the_last_result_is_found_among_other_lines(scripts, printed, found):
    assert scripts[1].found_in(printed) == found


def test_what_was_measured_before_a_baseline_that_never_ends_is_kept(scripts, monkeypatch, tmp_path):
    _, tables = scripts
    inner = tables.call
    slow = (
        "import sys, time; print('measured: {\"seconds_per_step\": 2.5}', file=sys.stderr, flush=True); time.sleep(60)"
    )
    monkeypatch.setattr(tables, "call", lambda words, limit_s, log: inner(["-c", slow], 5.0, log))
    outcome = tables.run(tables.Case("slow", ("step",)), 5.0, tmp_path / "log")
    assert outcome.found == {"seconds_per_step": 2.5} and outcome.problem == "not finished in 5 s"
    monkeypatch.setattr(tables, "call", lambda words, limit_s, log: inner(["-c", "print('hello')"], 60.0, log))
    assert tables.run(tables.Case("mute", ("step",)), 5.0, tmp_path / "log").problem == "printed no result"


def test_packages_are_those_of_the_project_and_a_missing_one_is_named(scripts, monkeypatch):
    _, tables = scripts
    monkeypatch.setattr(tables, "ROOT", FOLDER.parent)
    asked = []
    monkeypatch.setattr(tables, "is_installed", lambda name: asked.append(name) or name != "rapidfuzz")
    assert tables.missing_packages() == ["rapidfuzz"]
    assert {"torch", "transformers", "threadpoolctl", "jinja2", "hypothesis"} <= set(asked)
    monkeypatch.undo()
    assert tables.is_installed("torch") and not tables.is_installed("a-package-that-is-not-there")


@pytest.mark.parametrize("readme", ["before\n<!-- gpu: begin -->\nold\n", "no marks at all\n"])
def test_a_page_without_a_place_for_the_tables_is_left_alone(scripts, monkeypatch, tmp_path, readme):
    gpu, _ = scripts
    page = tmp_path / "README.md"
    page.write_text(readme)
    monkeypatch.setattr(gpu, "README", page)
    gpu.write_tables("new\n", tmp_path / "tables.md", into_readme=True)
    assert page.read_text() == readme and (tmp_path / "tables.md").read_text() == "new\n"
    page.write_text("before\n<!-- gpu: begin -->\nold\n<!-- gpu: end -->\nafter\n")
    gpu.write_tables("new\n", tmp_path / "tables.md", into_readme=True)
    assert page.read_text() == "before\n<!-- gpu: begin -->\nnew\n<!-- gpu: end -->\nafter\n"


def test_a_test_file_that_dies_is_named_and_the_others_go_on(scripts, monkeypatch, tmp_path):
    gpu, tables = scripts
    tests = tmp_path / "tests"
    tests.mkdir()
    for name, body in (
        ("dies", "import os; os._exit(9)"),
        ("fails", "assert False"),
        ("hangs", "import time; time.sleep(60)"),
        ("passes", "pass"),
    ):
        marked = f"import pytest\n@pytest.mark.gpu\ndef test_{name}():\n    {body}\n"
        (tests / f"test_{name}.py").write_text(marked)
    (tests / "test_other.py").write_text("def test_other(): assert 'pytest.mark.gpu' == 'written in a string'\n")
    for script in (gpu, tables):
        monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "FILE_S", 10.0)
    said = gpu.exactness(tmp_path, tmp_path / "log", 120.0)
    assert said.startswith("FAILED (1 passed, 1 failed)") and "test_dies.py failed with exit code 9" in said
    assert "test_hangs.py not finished in 10 s" in said and "test_fails.py::test_fails" in said
    assert "test_passes.py" in (tmp_path / "log.txt").read_text()
    assert "test_other.py" not in (tmp_path / "log.txt").read_text()


def test_every_section_has_time_if_those_before_it_take_all_of_theirs(scripts, monkeypatch, tmp_path):
    gpu, tables = scripts
    now, ran = [0.0], []
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu, "README", tmp_path / "README.md")

    def takes(seconds: float, what: str) -> str:
        now[0] += seconds
        ran.append(what)
        return f"not finished in {seconds:.0f} s"

    def case(case, limit_s, log):
        return tables.Outcome(case, None, takes(min(limit_s, case.limit_s), case.words[0]))

    monkeypatch.setattr(gpu, "exactness", lambda out, log, limit_s: takes(limit_s, "exactness"))
    monkeypatch.setattr(gpu, "run", case)
    monkeypatch.setattr(gpu, "call", lambda words, limit_s, log: takes(limit_s, "profile"))
    monkeypatch.setattr(gpu, "keep", lambda *_, **__: None)
    assert gpu.measure(tmp_path, tmp_path, 490.0, tiny=False) == 1
    assert ran == ["exactness", "step", "step", "eval"] and now[0] <= 490.0
    assert "--baseline" in gpu.CASES[0].words and "1008" in gpu.CASES[1].words
    assert json.loads((tmp_path / "results.json").read_text())[-1]["problem"] == "not run: no time left"


def test_a_page_that_cannot_be_written_is_left_whole(scripts, monkeypatch, tmp_path, capsys):
    gpu, _ = scripts
    page = tmp_path / "folder" / "README.md"
    monkeypatch.setattr(gpu, "README", page)
    gpu.write_tables("new\n", tmp_path / "tables.md", into_readme=True)  # there is none
    page.parent.mkdir()
    text = "<!-- gpu: begin -->\nold\n<!-- gpu: end -->\n"
    page.write_text(text)

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    (tmp_path / "tables.md").unlink()
    write = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda self, *a: write(self, *a) if self.name == "tables.md" else full())
    gpu.write_tables("new\n", tmp_path / "tables.md", into_readme=True)
    assert page.read_text() == text and (tmp_path / "tables.md").read_text() == "new\n"
    assert "No space left on device" in capsys.readouterr().err


def whatever_was_measured(line: str) -> str:
    """A line whatever its numbers are: figures are measured anew."""
    return re.sub(r"\d+", "0", line)


def test_the_cpu_tables_are_those_that_readme_shows(scripts):
    """Calls, headings and the form of every number: what is printed can stand in README.md as it is."""
    import cpu

    _, tables = scripts
    step = {"seconds_per_step": 2.78, "speedup": 6.4, "fraction_of_limit": 0.46}
    answers = {"items_per_s": 10.0, "speedup": 0.82, "cpu_seconds": 9.8, "same_tokens": 1.0}
    base = {"name": "trl", "seconds_per_step": 17.9, "items_per_s": 12.2, "cpu_seconds": 10.3}
    cases = [tables.Case(f"`medrl bench {call}`", ()) for call in (*cpu.STEPS, *cpu.EVALUATIONS)]
    printed = cpu.step_table([tables.Outcome(case, {**step, "baseline": base}) for case in cases[:-1]])
    asked = cpu.eval_table([tables.Outcome(cases[-1], {**answers, "baseline": base})])
    shown = (FOLDER / "README.md").read_text().splitlines()
    forms = [whatever_was_measured(line) for line in shown]
    for line in [*printed.splitlines()[:2], printed.splitlines()[2].replace("naive`", "trl`"), *asked.splitlines()]:
        assert whatever_was_measured(line) in forms
    assert any(line.startswith(f"| {cases[1].name} | ") for line in shown)
    problem = tables.Outcome(cases[0], {**step, "baseline": None}, "not finished in 5 s")
    assert "| 2.78 | not finished in 5 s |  | 46 % |" in cpu.step_table([problem])
    assert "| no message |" in cpu.eval_table([tables.Outcome(cases[-1], None, "no message")])
