"""The monitors of a run: figures over its end, limits, and the worst completions."""

from pathlib import Path

import pytest

from medrl.report.monitors import RULES, Reading, read_monitors
from medrl.report.page import write_report
from medrl.report.tables import run_alarms
from medrl.runs import Run

SOUND = {
    "reward": 1.5, "think_agreement": 1.0, "parse_fail_rate": 0.0, "tags_off": 0.0, "completions/clipped_ratio": 0.0,
    "frac_reward_zero_std": 0.2, "completions/mean_length_right": 40.0, "completions/mean_length_wrong": 44.0,
    "entropy": 1.0, "kl": 0.01, "sampling_gap": 0.001, "pass@1": 0.5, "pass@8": 0.9,
    "answer_letters": {"A": 4, "B": 4}, "target_letters": {"A": 4, "B": 4},
}  # fmt: skip


def rollout(step: int, prompt: str, **changes) -> dict:
    row = {
        "step": step, "prompt_id": prompt, "images": [], "completion": f"<answer>A</answer> of {prompt}",
        "finish_reason": "stop", "reward": 2.0, "parts": {}, "answer": "A", "target": "A", "advantage": 0.5,
        "tokens": 9, "implied": "A", "tags_off": False, "entropy": 1.0, "kl": 0.01, "sampling_gap": 0.001,
    }  # fmt: skip
    return {**row, **changes}


@pytest.fixture
def make_run(tmp_path):
    def make(last: dict, rollouts: list[dict] = (), steps: int = 40) -> tuple[Run, dict[str, Reading]]:  # type: ignore[assignment]
        run = Run.create(tmp_path / "run", {"seed": 1}, {})
        for step in range(steps):
            run.append_metrics({"step": step, **SOUND, **(last if step >= steps - steps // 10 else {})})
        run.append_rollouts(rollouts)
        return run, {reading.title: reading for reading in read_monitors(run, run.metrics())}

    return make


def test_a_sound_run_has_every_monitor_within_its_limit(make_run):
    _, readings = make_run({})
    assert list(readings) == [rule.title for rule in RULES]
    assert not [title for title, reading in readings.items() if reading.beyond]
    assert run_alarms("ct", list(readings.values())) == []


BEYOND = [
    ("Reasoning agrees with answer", {"think_agreement": 0.7}, "70.0\u202f%", "at least 90.0\u202f%"),
    ("Unreadable answers", {"parse_fail_rate": 0.2}, "20.0\u202f%", "at most 5.0\u202f%"),
    ("Tags off", {"tags_off": 0.5}, "50.0\u202f%", "at most 5.0\u202f%"),
    ("Cut off", {"completions/clipped_ratio": 0.06}, "6.0\u202f%", "at most 5.0\u202f%"),
    ("Groups that teach nothing", {"frac_reward_zero_std": 0.95, "pass@1": 0.25}, "70.0\u202f%", "at most 50.0\u202f%"),
    ("Favored letter", {"answer_letters": {"A": 8, "B": 0}}, "50.0\u202f%", "at most 25.0\u202f%"),
    ("Length of wrong over right answers", {"completions/mean_length_wrong": 120.0}, "3", "at most 1.5"),
    ("Entropy left", {"entropy": 0.05}, "5.0\u202f%", "at least 10.0\u202f%"),
    ("KL to the reference", {"kl": 2.0}, "2", "at most 0.5"),
    ("Sampler against training pass", {"sampling_gap": 0.2}, "0.2", "at most 0.05"),
    ("Right at least once in a group", {"pass@8": 0.45}, "50.0\u202f%", "at least 95.0\u202f%"),
]


@pytest.mark.parametrize(("title", "last", "value", "limit"), BEYOND)
def test_each_monitor_alone_can_pass_its_limit_and_is_then_an_alarm(make_run, title, last, value, limit):
    _, readings = make_run(last)
    assert [name for name, reading in readings.items() if reading.beyond] == [title]
    assert (readings[title].value, readings[title].limit) == (value, limit)
    (alarm,) = run_alarms("ct", list(readings.values()))
    assert alarm.startswith(f"ct: at the end, {title.lower()}: {value}")


def test_every_monitor_is_tested_above():
    assert [rule.title for rule in RULES] == [title for title, *_ in BEYOND]


def test_the_worst_completions_are_the_worst_at_the_end_each_of_another_prompt(make_run):
    rows = [
        rollout(3, "early", answer=None, tokens=900),  # long over
        *(rollout(38, f"p{i}", answer=None, tokens=10 * i) for i in range(7)),
        rollout(38, "p6", answer=None, tokens=55),
        rollout(39, "fine"),
    ]
    _, readings = make_run({}, rows)
    worst = readings["Unreadable answers"].worst
    assert [(row["prompt_id"], row["tokens"]) for row in worst] == [
        ("p6", 60),
        ("p5", 50),
        ("p4", 40),
        ("p3", 30),
        ("p2", 20),
    ]


@pytest.mark.parametrize(
    ("title", "changes"),
    [
        ("Reasoning agrees with answer", {"implied": "B"}),
        ("Unreadable answers", {"answer": None}),
        ("Tags off", {"tags_off": True}),
        ("Cut off", {"finish_reason": "length"}),
        ("Groups that teach nothing", {"advantage": 0.0, "target": "B"}),
        ("Favored letter", {"target": "B"}),
        ("Length of wrong over right answers", {"target": "B"}),
        ("Entropy left", {"entropy": 0.0}),
        ("KL to the reference", {"kl": 3.0}),
        ("Sampler against training pass", {"sampling_gap": 3.0}),
        ("Right at least once in a group", {"target": "B"}),
    ],
)
def test_the_completion_that_is_a_case_comes_first(make_run, title, changes):
    letters = {"answer_letters": {"A": 8, "B": 0}}
    _, readings = make_run(letters, [rollout(39, "sound"), rollout(39, "case", **changes)])
    assert readings[title].worst[0]["prompt_id"] == "case"


def test_a_run_without_completions_or_monitors_has_none(tmp_path):
    run = Run.create(tmp_path / "run", {}, {})
    assert read_monitors(run, []) == []
    run.append_metrics({"step": 0, "loss": 1.0, "grad_norm": 2.0})
    assert read_monitors(run, run.metrics()) == []


def test_the_page_shows_figures_limits_and_completions_as_text(make_run, tmp_path):
    hostile = "<script>alert(1)</script>\u202e"
    run, _ = make_run({"parse_fail_rate": 0.5}, [rollout(39, "case", answer=None, completion=hostile)])
    page = Path(write_report([run.path], tmp_path / "report.html")).read_text(encoding="utf-8")
    assert "Unreadable answers: the 1 worst" in page and "at most 5.0\u202f%" in page and "✗ beyond" in page
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "⟦U+202E⟧" in page
