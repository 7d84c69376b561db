import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medrl.evaluation.intervals import Interval
from medrl.report import text


@pytest.mark.parametrize(
    ("hidden", "shown"),
    [
        ("\x1b[31mred", "␛[31mred"),
        ("a\u202eb", "a⟦U+202E⟧b"),
        ("\u200bzero", "⟦U+200B⟧zero"),
        ("tag\U000e0041", "tag⟦U+E0041⟧"),
        ("\ud800", "⟦U+D800⟧"),
        ("null\0", "null␀"),
        ("line\u2028end", "line⟦U+2028⟧end"),
        ("a\r\nb", "a␍\nb"),
    ],
)
def test_what_would_hide_is_spelled_out(hidden, shown):
    assert text.visible(hidden) == shown


@pytest.mark.parametrize("plain", ["", "two\nlines\tand a tab", "µm, 95 %, 肺炎, أشعة, é, 🩻"])
def test_ordinary_text_stays_as_it_is(plain):
    assert text.visible(plain) == plain


@given(st.text(st.characters()))
def test_nothing_invisible_is_left_and_nothing_more_changes_the_second_time(anything):
    shown = text.visible(anything)
    assert not {unicodedata.category(c) for c in shown if c not in "\n\t"} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert text.visible(shown) == shown
    shown.encode()


def test_numbers_as_words():
    assert text.percent(0.7134) == "71.3\u202f%"
    assert text.percent(None) == text.percent_range(Interval(None, None, None, 0)) == "–"
    assert text.percent_range(Interval(0.5, 0.401, 0.6, 9)) == "40.1 – 60.0"
    assert text.points(-0.041) == "−4.1" and text.points(0.041) == "+4.1"
    assert text.points_range(Interval(0.0, -0.01, 0.02, 9)) == "−1.0 to +2.0"
    assert [text.p_value(p) for p in (0.0001, 0.0213, 0.4)] == ["< 0.001", "0.021", "0.40"]
    assert [text.p_equals(p) for p in (0.0001, 0.0213)] == ["p < 0.001", "p = 0.021"]
    assert [text.with_sign(v, 0) for v in (-0.4, 0.0, 0.4, 1.0, -10.0)] == ["0", "0", "0", "+1", "−10"]
    assert [text.duration(s) for s in (81.2, 600, 7500)] == ["81 s", "10 min", "2 h 05 min"]
