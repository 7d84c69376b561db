"""Whether a test set can say anything, asked before a model is trained.

train, test -> what they share, right answers the reward rejects, how far one gets without looking -> fit or not
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medrl.data.leaks import FLAGS, Leaks, find_leaks
from medrl.data.splits import slug
from medrl.errors import DataError, SettingsError, UnfitError
from medrl.evaluation.blind import BlindResult, fit_majority_letter, fit_option_prior, grade_blind, longest_option
from medrl.evaluation.intervals import Interval, wilson
from medrl.evaluation.metrics import chance
from medrl.evaluation.text_classifier import fit_text_classifier
from medrl.rewards import check_gold, default_weights, from_weights
from medrl.rewards.kinds import choices_in
from medrl.types import Example, Mode, Reward, relative_to

BLIND = ("random", "majority_letter", "longest_option", "option_prior", "text_classifier")
"""Rules that see no image; all but the first two read option texts, and only the last one reads the question."""
DEFAULT_FAIL_ON = ("images_exact", "near_duplicates", "patients", "gold_rejected")
"""What makes a test set unfit unless other rules are given. Blind accuracy is not among them: it is reported."""

_RULE = re.compile(r"(?P<name>\w+)\s*(?:>\s*(?P<limit>\d+(?:\.\d+)?)\s*(?P<percent>%?))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What an audit found."""

    n_train: int
    n_test: int
    leaks: Leaks
    gold_rejected: list[str]
    """Ids of test examples whose own right answer the reward does not reward."""
    gold_rejected_train: list[str]
    balance: dict[str, dict[str, dict[str, int]]]
    """Side -> ``letters`` and ``options``: how often each letter is right, how often there are so many options."""
    blind: dict[str, Interval]
    """Rule of ``BLIND`` -> accuracy on the test set, 95 % interval."""
    by_domain: dict[str, dict[str, Interval]]
    """Slug of each modality and each question type of the test set -> the same."""
    best_rule: str
    """The most accurate rule; an example it has right is blind-solvable."""
    solved: dict[str, tuple[str, ...]]
    """Test example id -> the rules that have it right, ``random`` aside."""
    before: dict[str, dict[str, Any]] | None = None
    """What the rules reached before options were resampled, as ``blind_summary``."""
    train_root: Path | None = None
    test_root: Path | None = None

    @property
    def blind_solvable_share(self) -> float:
        """Share of test examples that the best single rule solves; several rules together would solve more by luck."""
        return sum(self.best_rule in rules for rules in self.solved.values()) / self.n_test

    @property
    def overlap(self) -> dict[str, int]:
        """Test examples by kind of overlap."""
        return {flag: self.leaks.count(flag) for flag in FLAGS}

    def flags(self) -> dict[str, list[str]]:
        """Test example id -> what is to be known of it: kinds of overlap, ``gold_rejected``, ``blind_solvable``."""
        found: dict[str, list[str]] = defaultdict(list)
        for id, flags in self.leaks.items.items():
            found[id] += flags
        for id in self.gold_rejected:
            found[id].append("gold_rejected")
        for id, rules in self.solved.items():
            if self.best_rule in rules:
                found[id].append("blind_solvable")
        return dict(found)

    def reasons(self, fail_on: Sequence[str] = DEFAULT_FAIL_ON) -> list[str]:
        """Why the sets are unfit for each other, by rules such as ``near_duplicates>1%``; none: they are fit."""
        return [reason for rule in map(parse_rule, fail_on) if (reason := self._break(*rule))]

    def raise_if_unfit(self, fail_on: Sequence[str] = DEFAULT_FAIL_ON) -> None:
        """Raise UnfitError when a rule is broken; see ``reasons``."""
        reasons = self.reasons(fail_on)
        if reasons:
            raise UnfitError("unfit: " + "; ".join(reasons))

    def _break(self, name: str, limit: float, percent: bool) -> str:
        if name == "gold_rejected":
            # Either side can spoil a study: the reward trains on the one and grades the other.
            number, of = len(self.gold_rejected) + len(self.gold_rejected_train), self.n_test + self.n_train
            what = f"examples ({len(self.gold_rejected)} of test, {len(self.gold_rejected_train)} of training)"
        elif name in FLAGS:
            number, of, what = self.overlap[name], self.n_test, "test examples"
        else:
            share = self.blind_solvable_share if name == "blind_solvable_share" else self.blind[name].value or 0.0
            return f"{name} is {100 * share:.1f} %" * (share > (limit / 100 if percent else limit))
        broken = 100 * number / of > limit if percent else number > limit
        return f"{name} is {number} of {of} {what}" * broken

    def as_dict(self) -> dict[str, Any]:
        """As JSON: what ``medrl audit --json`` writes."""
        flags = self.flags()
        return {
            "n_train": self.n_train,
            "n_test": self.n_test,
            "overlap": self.overlap,
            "patients_unknown": self.leaks.patients_unknown,
            "same_wording": self.leaks.same_wording,
            "gold_rejected": len(self.gold_rejected),
            "gold_rejected_train": len(self.gold_rejected_train),
            "balance": self.balance,
            "blind": _table(self.blind),
            **({"blind_before_resampling": self.before} if self.before else {}),
            "by_domain": {domain: _table(blind) for domain, blind in self.by_domain.items()},
            "blind_solvable_share": self.blind_solvable_share,
            "blind_solvable_rule": self.best_rule,
            "image_pairs": [
                {
                    "train": relative_to(match.train, self.train_root),
                    "test": relative_to(match.test, self.test_root),
                    "kind": "exact" if match.exact else "near",
                    "agreement": round(match.agreement, 4),
                    "train_is": match.turn,
                }
                for match in self.leaks.matches
            ],
            "items": [
                {"id": id, "flags": flags.get(id, []), "solved_by": list(self.solved.get(id, ()))}
                for id in dict.fromkeys([*flags, *self.solved])
            ],
        }


def audit(
    train: Sequence[Example],
    test: Sequence[Example],
    reward: Reward | None = None,
    *,
    mode: Mode = "think",
    before: dict[str, dict[str, Any]] | None = None,
    train_root: Path | None = None,
    test_root: Path | None = None,
    quiet: bool = True,
) -> Audit:
    """What ``test`` shares with ``train``, and how far one gets on it without looking.

    Args:
        reward: what right answers are tried on; default: right answer and right form.
        mode: the form those answers are written in.
        before: ``blind_summary`` of the same examples before their options were resampled, to be shown beside.
        train_root, test_root: folders that image paths are reported relative to.
        quiet: show no progress while images are read and compared.

    Raises:
        DataError: one of the sets is empty. ImageError: an image is missing or cannot be decoded.
    """
    for name, rows in (("training", train), ("test", test)):
        if not rows:
            raise DataError(f"the {name} set is empty: there is nothing to audit")
    reward = reward or from_weights(default_weights(row.kind for row in (*train, *test)))
    leaks = find_leaks(train, test, quiet=quiet)
    results = blind_results(train, test)
    groups = {"all": list(range(len(test))), **_domains(test)}
    tables = {name: _blind_table(results, test, members) for name, members in groups.items()}
    blind = tables.pop("all")
    solved: dict[str, tuple[str, ...]] = {}
    for place, row in enumerate(test):
        rules = tuple(result.name for result in results if result.correct[place])
        if rules:
            solved[row.id] = rules
    return Audit(
        n_train=len(train),
        n_test=len(test),
        leaks=leaks,
        gold_rejected=[row.id for row, _ in check_gold(reward, test, mode)],
        gold_rejected_train=[row.id for row, _ in check_gold(reward, train, mode)],
        balance={"train": _balance(train), "test": _balance(test)},
        blind=blind,
        by_domain=tables,
        best_rule=max((result.name for result in results), key=lambda name: blind[name].value or 0.0),
        solved=solved,
        before=before,
        train_root=train_root,
        test_root=test_root,
    )


def blind_results(train: Sequence[Example], test: Sequence[Example]) -> list[BlindResult]:
    """Answers of every rule of ``BLIND`` but ``random``, fit on ``train``."""
    guesses = {
        "majority_letter": fit_majority_letter(train),
        "longest_option": longest_option,
        "option_prior": fit_option_prior(train),
    }
    answers = {name: [guess(row) for row in test] for name, guess in guesses.items()}
    answers["text_classifier"] = fit_text_classifier(train)(test)
    return [grade_blind(name, test, given) for name, given in answers.items()]


def blind_summary(train: Sequence[Example], test: Sequence[Example]) -> dict[str, dict[str, Any]]:
    """Rule of ``BLIND`` -> ``accuracy``, ``low``, ``high``, ``n`` on all of ``test``, as JSON."""
    return _table(_blind_table(blind_results(train, test), test, range(len(test))))


def parse_rule(text: str) -> tuple[str, float, bool]:
    """``near_duplicates>1%`` -> (name, limit, whether the limit is a percentage); without a limit, more than none.

    Raises SettingsError for anything else.
    """
    names = (*FLAGS, "gold_rejected", *BLIND, "blind_solvable_share")
    found = _RULE.fullmatch(text.strip())
    if not found or found["name"] not in names:
        raise SettingsError(
            f"{text!r} is no rule: write a name, or name>number, or name>number%, e.g. near_duplicates>1%; "
            f"names are {', '.join(names)}"
        )
    if found["limit"] is None and found["name"] in (*BLIND, "blind_solvable_share"):
        raise SettingsError(f"rule {text!r} needs a limit, e.g. {found['name']}>90%")
    return found["name"], float(found["limit"] or 0), bool(found["percent"])


def _domains(test: Sequence[Example]) -> dict[str, list[int]]:
    """Slug of each modality and question type -> places of its examples; ``unknown`` is no domain."""
    groups: dict[str, list[int]] = defaultdict(list)
    for name in ("modality", "question_type"):
        for place, row in enumerate(test):
            if (value := getattr(row, name)) != "unknown":
                groups[slug(value)].append(place)
    return dict(groups)


def _blind_table(
    results: Sequence[BlindResult], test: Sequence[Example], members: Sequence[int]
) -> dict[str, Interval]:
    table = {"random": _chance([chance(test[place].kind, len(test[place].options)) for place in members])}
    for result in results:
        table[result.name] = wilson(sum(result.correct[place] for place in members), len(members))
    return {name: table[name] for name in BLIND}


def _chance(shares: Sequence[float]) -> Interval:
    """Expected accuracy of drawing an answer at random, and where 95 % of such draws fall (normal approximation)."""
    n = len(shares)
    mean = sum(shares) / n
    spread = 1.96 * sum(share * (1 - share) for share in shares) ** 0.5 / n
    return Interval(mean, max(0.0, mean - spread), min(1.0, mean + spread), n)


def _balance(rows: Sequence[Example]) -> dict[str, dict[str, int]]:
    letters = Counter(letter for row in rows for letter in choices_in(row.kind, row.target))
    options = Counter(len(row.options) for row in rows)
    return {"letters": dict(sorted(letters.items())), "options": {str(k): n for k, n in sorted(options.items())}}


def _table(blind: dict[str, Interval]) -> dict[str, dict[str, float | int | None]]:
    return {
        name: {"accuracy": found.value, "low": found.low, "high": found.high, "n": found.n}
        for name, found in blind.items()
    }
