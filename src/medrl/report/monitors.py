"""The monitors of a run: a figure over its last steps, the limit it is held against, and the five worst completions
behind it.

A monitor beyond its limit is a reason to read completions, not a verdict: the limits are rules of thumb of ours.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from medrl.runs import Run
from medrl.training.monitors import letter_excess

N_WORST = 5
SHOWN_CHARACTERS = 700

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """A run's metrics at its beginning and at its end (a tenth of its steps each), and the completions of the end."""

    first: Sequence[Row]
    last: Sequence[Row]
    rollouts: Sequence[Row]

    def mean(self, name: str, rows: Sequence[Row] | None = None) -> float | None:
        """Of a metric over the last steps, or over ``rows``; None where no step has it."""
        values = [row[name] for row in (self.last if rows is None else rows) if row.get(name) is not None]
        return fmean(values) if values else None

    def left(self, name: str) -> float | None:
        """The last steps' mean as a share of the first steps'."""
        before, after = self.mean(name, self.first), self.mean(name)
        return after / before if before and after is not None else None

    def letters(self) -> tuple[str, float] | None:
        """The letter answered most beyond its due over the last steps."""
        answers: Counter[str] = Counter()
        targets: Counter[str] = Counter()
        for row in self.last:
            answers.update(row.get("answer_letters") or {})
            targets.update(row.get("target_letters") or {})
        return letter_excess(answers, targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One monitor."""

    title: str
    meaning: str
    figure: Callable[[History], float | None]
    alarm: Literal["above", "below"]
    limit: float
    badness: Callable[[Row, History], float | None]
    """Severity of a completion under this monitor; None where it does not apply."""
    share: bool = True
    """Shown in percent; otherwise as a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A monitor as the page shows it."""

    title: str
    meaning: str
    value: str
    limit: str
    beyond: bool
    worst: list[Row]


def _ratio_of_lengths(history: History) -> float | None:
    right, wrong = history.mean("completions/mean_length_right"), history.mean("completions/mean_length_wrong")
    return wrong / right if right and wrong is not None else None


def _widest(history: History) -> str:
    """The metric pass@k with the largest k."""
    names = {name for row in history.last for name in row if name.startswith("pass@")}
    return max(names, key=lambda name: int(name.removeprefix("pass@")), default="pass@1")


def _is_wrong(row: Row) -> bool:
    return not row.get("right", row["answer"] == row["target"])  # runs of before there were kinds do not say


def _stuck(history: History) -> float | None:
    """Share of groups with equal rewards beyond the share of right answers: those have nothing left to learn."""
    equal = history.mean("frac_reward_zero_std")
    return None if equal is None else max(0.0, equal - (history.mean("pass@1") or 0.0))


def _favored_letter(row: Row, history: History) -> float | None:
    favored = history.letters()
    return float(row["reward"]) if favored and row["answer"] == favored[0] and _is_wrong(row) else None


def _contradicts(row: Row, history: History) -> float | None:
    implied = row.get("implied")
    return float(row["reward"]) if implied and row["answer"] and implied != row["answer"] else None


def _if(condition: Callable[[Row], Any], badness: Callable[[Row], float]) -> Callable[[Row, History], float | None]:
    return lambda row, history: badness(row) if condition(row) else None


def _value(name: str, sign: float = 1.0) -> Callable[[Row, History], float | None]:
    return lambda row, history: None if row.get(name) is None else sign * row[name]


def _length(row: Row) -> float:
    return float(row["tokens"] if "tokens" in row else len(row["completion"]))


RULES: tuple[Rule, ...] = (
    Rule(
        title="Reasoning agrees with answer",
        meaning="share of completions whose reasoning comes down to the option that was answered, where it names one",
        figure=lambda h: h.mean("think_agreement"), alarm="below", limit=0.9, badness=_contradicts,
    ),
    Rule(
        title="Unreadable answers",
        meaning="share of completions without a readable answer; they count as wrong",
        figure=lambda h: h.mean("parse_fail_rate"), alarm="above", limit=0.05,
        badness=_if(lambda row: row["answer"] is None, _length),
    ),
    Rule(
        title="Tags off",
        meaning="share of completions in which a tag of the mode does not stand exactly once",
        figure=lambda h: h.mean("tags_off"), alarm="above", limit=0.05,
        badness=_if(lambda row: row.get("tags_off"), _length),
    ),
    Rule(
        title="Cut off",
        meaning="share of completions that the token limit ended",
        figure=lambda h: h.mean("completions/clipped_ratio"), alarm="above", limit=0.05,
        badness=_if(lambda row: row["finish_reason"] == "length", _length),
    ),
    Rule(
        title="Groups that teach nothing",
        meaning="share of groups with equal rewards, less the share of right answers, which leave nothing to learn",
        figure=_stuck, alarm="above", limit=0.5,
        badness=_if(lambda row: row["advantage"] == 0 and _is_wrong(row), lambda row: -row["reward"]),
    ),
    Rule(
        title="Favored letter",
        meaning="how much more often one letter is answered than it is right",
        figure=lambda h: (h.letters() or (None, None))[1], alarm="above", limit=0.25, badness=_favored_letter,
    ),
    Rule(
        title="Length of wrong over right answers",
        meaning="mean tokens of wrong completions divided by those of right ones",
        figure=_ratio_of_lengths, alarm="above", limit=1.5, badness=_if(_is_wrong, _length), share=False,
    ),
    Rule(
        title="Entropy left",
        meaning="entropy per token as a share of what it was in the first steps; little is left where one way of "
        "writing won",
        figure=lambda h: h.left("entropy"), alarm="below", limit=0.1, badness=_value("entropy", -1.0),
    ),
    Rule(
        title="KL to the reference",
        meaning="nats per token; left out where no reference was loaded",
        figure=lambda h: h.mean("kl") or None, alarm="above", limit=0.5, badness=_value("kl"), share=False,
    ),
    Rule(
        title="Sampler against training pass",
        meaning="mean absolute difference of their log-probabilities, nats per token",
        figure=lambda h: h.mean("sampling_gap"), alarm="above", limit=0.05, badness=_value("sampling_gap"), share=False,
    ),
    Rule(
        title="Right at least once in a group",
        meaning="pass@k for the largest k, as a share of what it was in the first steps: below 1 where sampling finds "
        "less than before",
        figure=lambda h: h.left(_widest(h)), alarm="below", limit=0.95,
        badness=_if(_is_wrong, lambda row: -row["reward"]),
    ),
)  # fmt: skip


def read_monitors(run: Run, metrics: Sequence[Row]) -> list[Reading]:
    """The monitors of a run, in the order of the table; those that nothing was logged for are left out."""
    tenth = max(1, len(metrics) // 10)
    last = metrics[-tenth:]
    since = last[0]["step"] if last else 0
    rollouts = [row for row in run.rollouts() if row["step"] >= since]
    history = History(first=metrics[:tenth], last=last, rollouts=rollouts)
    return [reading for rule in RULES if (reading := _read(rule, history))]


def _read(rule: Rule, history: History) -> Reading | None:
    figure = rule.figure(history)
    if figure is None:
        return None
    beyond = figure > rule.limit if rule.alarm == "above" else figure < rule.limit
    return Reading(
        title=rule.title,
        meaning=rule.meaning,
        value=_shown(figure, rule.share),
        limit=f"{'at most' if rule.alarm == 'above' else 'at least'} {_shown(rule.limit, rule.share)}",
        beyond=beyond,
        worst=_worst(rule, history),
    )


def _worst(rule: Rule, history: History) -> list[Row]:
    """Five completions of as many different prompts where there are that many; the newest of equally bad ones first."""
    cases = [(rule.badness(row, history), row["step"], row) for row in history.rollouts]
    ranked = sorted(((bad, step, row) for bad, step, row in cases if bad is not None), key=lambda c: (-c[0], -c[1]))
    chosen = _of_different_prompts(row for _, _, row in ranked)
    return [{**row, "shown": row["completion"][:SHOWN_CHARACTERS]} for row in chosen]


def _of_different_prompts(rows: Iterable[Row]) -> list[Row]:
    distinct: dict[str, Row] = {}
    for row in rows:
        distinct.setdefault(row["prompt_id"], row)
        if len(distinct) == N_WORST:
            break
    return list(distinct.values())


def _shown(figure: float, share: bool) -> str:
    return f"{100 * figure:.1f}\u202f%" if share else f"{figure:.3g}"
