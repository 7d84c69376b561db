"""Charts as SVG text: no script, no fonts, no fixed colors.

Positions are percentages and text keeps its size, so a chart fits a phone and a wide screen alike; colors come from
the page's style sheet (classes ``s0`` to ``s5``, ``blind``), so it is right on a light and on a dark page.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from medrl.evaluation.intervals import Interval
from medrl.report.text import percent, percent_range, visible

N_COLORS = 6
MAX_POINTS = 240
"""A curve of more steps is averaged into this many points."""

MARKS = {
    "s0": '<circle r="5"/>',
    "s1": '<path d="M-5-5h10v10h-10z"/>',
    "s2": '<path d="M0-6.5 6.5 0 0 6.5-6.5 0z"/>',
    "s3": '<path d="M0-6 6 5H-6z"/>',
    "s4": '<path d="M0 6 6-5H-6z"/>',
    "s5": '<path d="M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z"/>',
    "blind": '<circle r="4" style="fill:none;stroke:var(--c);stroke-width:2;stroke-dasharray:2 2"/>',
}
"""Shapes of the series, so that nobody has to tell colors apart; the legend shows the same."""

MAX_HEADING_CHARACTERS = 60

CURVES: dict[str, tuple[str, str]] = {
    "reward": ("Reward", "mean per completion"),
    "loss": ("Loss", "per step"),
    "completions/mean_length": ("Completion length", "mean, tokens"),
    "completions/clipped_ratio": ("Cut-off completions", "share"),
    "parse_fail_rate": ("Unreadable answers", "share"),
    "frac_reward_zero_std": ("Groups that teach nothing", "share with equal rewards"),
    "think_agreement": ("Reasoning agrees with answer", "share, where it names an option"),
    "tags_off": ("Tags off", "share"),
    "completions/mean_length_right": ("Length of right answers", "mean, tokens"),
    "completions/mean_length_wrong": ("Length of wrong answers", "mean, tokens"),
    "pass@1": ("Right answers", "pass@1"),
    "pass@8": ("Right at least once in 8", "pass@8"),
    "sampling_gap": ("Sampler against training pass", "nats per token"),
    "reward_std": ("Spread of rewards", "standard deviation in a group"),
    "kl": ("KL to the reference", "nats per token"),
    "entropy": ("Entropy", "nats per token"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "lr": ("Learning rate", "per step"),
}
"""Metric -> title and unit; the order of the charts. Reward parts follow the reward."""


def run_color(index: int) -> int:
    """Color class number of a run: the first run looks like the second evaluation, which is usually its result."""
    return (index + 1) % N_COLORS


def curve_names(metrics: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """The metrics worth a chart that at least one run has, in the order to show them."""
    present = {name for rows in metrics for row in rows for name, value in row.items() if value is not None}
    parts = sorted(name for name in present if name.startswith("rewards/") and name.endswith("/mean"))
    order = ["reward", *parts, *(name for name in CURVES if name != "reward")]
    if not any(row.get("kl") for rows in metrics for row in rows):
        present.discard("kl")  # it is 0 throughout where no reference was loaded: nothing was measured
    return [name for name in order if name in present]


def curve_title(name: str) -> tuple[str, str]:
    """Title and unit of a metric."""
    if name.startswith("rewards/"):
        return name.removeprefix("rewards/").removesuffix("/mean").replace("_", " ").capitalize(), "mean reward part"
    return CURVES[name]


def learning_curve(name: str, runs: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """One metric over steps, one line per run: what was measured, faint, and its running mean over a tenth of it."""
    lines = [_points(rows, name) for rows in runs]
    steps = [step for line in lines for step, _ in line]
    values = [value for line in lines for _, value in line]
    if not values:
        return ""
    x_ticks, y_ticks = _ticks(min(steps), max(steps), 4, whole=True), _ticks(min(values), max(values), 4)
    x_low, x_high = min(steps), max(max(steps), min(steps) + 1)
    y_low, y_high = min(y_ticks[0], min(values)), max(y_ticks[-1], max(values))
    title, unit = curve_title(name)
    body = []
    for tick in y_ticks:
        y = _position(tick, y_high, y_low)
        body.append(f'<line class="grid" x1="0" x2="100%" y1="{y}%" y2="{y}%"/>')
        body.append(f'<text x="-8" y="{y}%" dy="4" class="end">{_number(tick)}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            body.append(
                f'<text x="{_position(tick, x_low, x_high)}%" y="100%" dy="18" class="middle">{_number(tick)}</text>'
            )
    body.append('<text x="100%" y="100%" dy="34" class="end axis">step</text>')
    body.append('<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%">')
    for index, line in enumerate(lines):
        if not line:
            continue
        for css, shown in (("raw", line), ("smooth", _running_mean(line))):
            coordinates = " ".join(
                f"{_position(step, x_low, x_high)},{_position(value, y_high, y_low)}" for step, value in shown
            )
            body.append(f'<polyline class="{css} s{run_color(index)}" points="{coordinates}"/>')
    body.append("</svg>")
    for index, line in enumerate(lines):
        if len(line) == 1:  # a line of one point has no length
            x, y = _position(line[0][0], x_low, x_high), _position(line[0][1], y_high, y_low)
            body.append(f'<circle class="dot s{run_color(index)}" cx="{x}%" cy="{y}%" r="4"/>')
    label = f"{title}, {unit}, over {len(set(steps))} steps, from {_number(values[0])} to {_number(values[-1])}"
    return _svg(body, label, height=150)


def dot_chart(groups: Sequence[tuple[str, Sequence[tuple[str, Interval]]]], label: str) -> str:
    """Accuracies with their intervals: per group a heading and one dot with whiskers per series.

    ``groups``: heading and (CSS class, interval) of each series. The axis runs from 0 to 100 %.
    """
    body, y = [], 0
    rows = []
    for heading, series in groups:
        if heading:
            rows.append(f'<text class="heading" x="0" y="{y + 14}">{_heading(heading)}</text>')
            y += 22
        for css, interval in series:
            rows.append(_whisker(interval, css, y + 9))
            y += 18
        y += 10
    for tick in (0, 25, 50, 75, 100):
        anchor = "start" if tick == 0 else "end" if tick == 100 else "middle"
        body.append(f'<line class="grid" x1="{tick}%" x2="{tick}%" y1="0" y2="{y}"/>')
        body.append(f'<text x="{tick}%" y="{y + 16}" class="{anchor}">{tick}\u202f%</text>')
    body += rows
    body.append(f'<text x="100%" y="{y + 32}" class="end axis">accuracy, 95\u202f% interval</text>')
    return _svg(body, label, height=y + 36)


def bar_chart(groups: Sequence[tuple[str, Sequence[tuple[str, float]]]], label: str) -> str:
    """Shares as bars from the left, per group a heading: ``(heading, [(CSS class, share), ...])``."""
    body, y = [], 0
    scale = max((share for _, series in groups for _, share in series), default=0.0) or 1.0
    for heading, series in groups:
        middle = y + len(series) * 7 + 4
        body.append(f'<text x="0" y="{middle}" class="heading">{_heading(heading)}</text>')
        for css, share in series:
            width = round(80 * share / scale, 2)
            body.append(f'<rect class="bar {css}" x="6%" y="{y}" width="{width}%" height="11" rx="2"/>')
            body.append(f'<text x="{round(6 + width, 2)}%" dx="6" y="{y + 10}">{percent(share, 0)}</text>')
            y += 14
        y += 10
    return _svg(body, label, height=y)


def _whisker(interval: Interval, css: str, y: int) -> str:
    if interval.value is None:
        return f'<text x="0" y="{y + 4}">no examples</text>'
    low, high = interval.low or 0.0, interval.high if interval.high is not None else 1.0
    x, mark = _position(interval.value, 0, 1), MARKS.get(css, MARKS["s0"])
    title = f"{percent(interval.value)} ({percent_range(interval)}), n = {interval.n}"
    pale = " few" if interval.n < 30 else ""
    return (
        f'<g class="{css}{pale}"><title>{_text(title)}</title>'
        f'<line class="whisker" x1="{_position(low, 0, 1)}%" x2="{_position(high, 0, 1)}%" y1="{y}" y2="{y}"/>'
        f'<svg class="dot" overflow="visible" x="{x}%" y="{y}">{mark}</svg></g>'
    )


def _svg(body: Iterable[str], label: str, height: int) -> str:
    # Everything put in is a number of ours or has been through _text, so the whole is safe to place in the page.
    return Markup(
        f'<svg class="chart" role="img" aria-label="{_text(label)}" width="100%" height="{height}">'
    ) + Markup("".join(body) + "</svg>")


def _heading(text: str) -> str:
    """A name in one line, which a chart cannot break; cut where it is longer than a phone is wide, whole on hover."""
    shown = visible(text)
    if len(shown) <= MAX_HEADING_CHARACTERS:
        return str(escape(shown))
    return f"{escape(shown[: MAX_HEADING_CHARACTERS - 1])}…<title>{escape(shown)}</title>"


def _text(text: str) -> str:
    return str(escape(visible(text)))


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    points = [
        (float(row.get("step", index)), float(row[name]))
        for index, row in enumerate(rows)
        if row.get(name) is not None and math.isfinite(row[name])
    ]
    size = math.ceil(len(points) / MAX_POINTS)
    return [_mean_point(points[start : start + size]) for start in range(0, len(points), size)] if size > 1 else points


def _running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    reach = len(points) // 20
    return [
        (step, _mean_point(points[max(0, index - reach) : index + reach + 1])[1])
        for index, (step, _) in enumerate(points)
    ]


def _mean_point(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(step for step, _ in points) / len(points), sum(value for _, value in points) / len(points)


def _position(value: float, start: float, end: float) -> float:
    """Percent of the way from start to end."""
    return round(100 * (value - start) / (end - start), 2)


def _ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Round numbers that span low to high."""
    size = max(abs(low), abs(high))
    if high - low <= 1e-12 * max(size, 1e-290):  # equal, but for rounding
        margin = 0.1 * (size if size > 1e-290 else 1.0)
        low, high = low - margin, high + margin
    rough = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999)
    if whole:
        step = max(1.0, float(round(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")
    return f"{value:.5g}".replace("-", "−")
