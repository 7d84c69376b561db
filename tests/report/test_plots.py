import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medrl.evaluation.intervals import Interval, wilson
from medrl.report import plots


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def test_the_charts_follow_the_metrics_that_exist_with_the_reward_and_its_parts_first():
    rows = [{"step": 0, "kl": 0.1, "rewards/b/mean": 1, "time/x_s": 3, "reward": 1, "rewards/a/mean": 0, "lr": None}]
    assert plots.curve_names([rows, [{"loss": 2.0}]]) == ["reward", "rewards/a/mean", "rewards/b/mean", "loss", "kl"]
    assert "kl" not in plots.curve_names([[{"kl": 0.0, "reward": 1.0}]])
    assert plots.curve_title("rewards/choice_correct/mean")[0] == "Choice correct"


def test_a_rising_metric_is_drawn_rising_from_left_to_right():
    svg = plots.learning_curve("reward", [[{"step": step, "reward": float(step)} for step in range(5)]])
    line = next(e for e in parse(svg).iter("polyline") if e.get("class", "").startswith("raw"))
    points = [tuple(map(float, point.split(","))) for point in line.get("points", "").split()]
    assert points == [(0, 100), (25, 75), (50, 50), (75, 25), (100, 0)]


def test_every_run_has_a_line_of_its_own_color_and_axes_are_labeled():
    rows = [{"step": step, "reward": step % 3} for step in range(30)]
    svg = plots.learning_curve("reward", [rows, rows])
    assert {e.get("class") for e in parse(svg).iter("polyline")} == {"raw s1", "smooth s1", "raw s2", "smooth s2"}
    texts = [e.text for e in parse(svg).iter("text")]
    assert "step" in texts and "0" in texts and "2" in texts


def test_a_long_run_is_averaged_into_few_points():
    svg = plots.learning_curve("reward", [[{"step": step, "reward": 1.0} for step in range(50_000)]])
    assert len(svg) < 12_000


@given(st.lists(st.none() | st.floats(-1e9, 1e9), max_size=20))
def test_any_metric_gives_a_well_formed_chart_with_finite_places(values):
    svg = plots.learning_curve("kl", [[{"step": step, "kl": value} for step, value in enumerate(values)]])
    assert "nan" not in svg and "inf" not in svg
    assert bool(svg) == any(value is not None for value in values)
    if svg:
        parse(svg)


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [1e-6, 2e-6], [-5.0, -5.0]])
def test_flat_and_tiny_curves_have_at_least_two_ticks(values):
    svg = plots.learning_curve("lr", [[{"step": step, "lr": value} for step, value in enumerate(values)]])
    assert len(list(parse(svg).iter("line"))) >= 2


def test_dots_and_whiskers_stand_where_their_numbers_are():
    svg = plots.dot_chart([("CT", [("s0", Interval(0.5, 0.25, 0.75, 40))])], "Accuracy")
    (whisker,) = [e for e in parse(svg).iter("line") if e.get("class") == "whisker"]
    (dot,) = [e for e in parse(svg).iter("svg") if e.get("class") == "dot"]
    assert (whisker.get("x1"), dot.get("x"), whisker.get("x2")) == ("25.0%", "50.0%", "75.0%")
    assert "95\u202f% interval" in svg


def test_few_examples_are_pale_and_none_are_said_to_be_none():
    svg = plots.dot_chart([("CT", [("s0", wilson(9, 29)), ("s1", wilson(9, 30)), ("s2", wilson(0, 0))])], "Accuracy")
    assert re.findall(r'<g class="([^"]+)"', svg) == ["s0 few", "s1"]
    assert "no examples" in svg


def test_names_are_escaped_and_nothing_in_them_hides():
    hostile = '"><script>alert(1)</script>\u202e'
    svg = plots.dot_chart([(hostile, [("s0", wilson(1, 2))])], hostile) + plots.bar_chart(
        [(hostile, [("s0", 0.5)])], hostile
    )
    assert "<script" not in svg and "\u202e" not in svg and "U+202E" in svg
    parse(f"<div>{svg}</div>")


def test_the_longest_bar_is_the_largest_share():
    svg = plots.bar_chart([("A", [("s0", 0.2), ("s1", 0.8)]), ("B", [("s0", 0.0)])], "Letters")
    widths = [float(e.get("width", "").rstrip("%")) for e in parse(svg).iter("rect")]
    assert widths == [20.0, 80.0, 0.0]


def test_every_series_has_a_shape_of_its_own():
    classes = [*(f"s{index}" for index in range(plots.N_COLORS)), "blind"]
    charts = [plots.dot_chart([("CT", [(css, Interval(0.5, 0.25, 0.75, 40))])], "Accuracy") for css in classes]
    shapes = []
    for chart in charts:
        (dot,) = [e for e in parse(chart).iter("svg") if e.get("class") == "dot"]
        shapes.append((dot[0].tag, tuple(sorted(dot[0].attrib.items()))))
    assert len(set(shapes)) == len(classes)
