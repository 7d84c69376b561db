"""An audit as one HTML file, made like the report: no network, no script, no other file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medrl.data.leaks import ImageMatch
from medrl.evaluation.audit import BLIND, DEFAULT_FAIL_ON, Audit
from medrl.files import write_text_atomically
from medrl.report import plots
from medrl.report.environment import page_environment
from medrl.report.gallery import Picture, embed_image
from medrl.types import relative_to

MAX_PAIRS = 60
"""Pairs of pictures shown; the JSON file has all."""

TITLES = {
    "images_exact": "show a training image",
    "near_duplicates": "show a near-duplicate of one",
    "patients": "are of a training patient",
    "question_answer": "were asked in training about that image",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two pictures side by side."""

    match: ImageMatch
    train_name: str
    test_name: str
    train: Picture
    test: Picture


def write_audit_page(
    audit: Audit, out: Path, *, title: str = "audit", fail_on: Sequence[str] = DEFAULT_FAIL_ON
) -> Path:
    """Write the page of an audit to ``out``; ``fail_on`` as ``Audit.reasons``."""
    colors = {name: "blind" if name == "random" else f"s{index % plots.N_COLORS}" for index, name in enumerate(BLIND)}
    charts = [
        (domain, [(colors[name], table[name]) for name in BLIND])
        for domain, table in {"all": audit.blind, **audit.by_domain}.items()
    ]
    page = (
        page_environment()
        .get_template("audit.html.jinja")
        .render(
            title=title,
            audit=audit,
            reasons=audit.reasons(fail_on),
            fail_on=", ".join(fail_on) or "nothing",
            overlap=[(TITLES[name], count, count / audit.n_test) for name, count in audit.overlap.items()],
            # A green 0 would claim that no patient is on both sides where nobody can tell.
            unknown=TITLES["patients"] if audit.leaks.patients_unknown == audit.n_test else None,
            series=[(name, colors[name]) for name in BLIND],
            overall=plots.dot_chart(charts[:1], "Accuracy of rules that see no image"),
            domains=plots.dot_chart(charts[1:], "Accuracy of rules that see no image, by domain"),
            letters=_balance(audit, "letters", "Share of each letter among the right answers"),
            options=_balance(audit, "options", "Share of questions by number of options"),
            pairs=[_pair(audit, match) for match in audit.leaks.matches[:MAX_PAIRS]],
            rules=BLIND,
        )
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out, page)
    return out


def _balance(audit: Audit, what: str, label: str) -> str:
    names = sorted({name for side in audit.balance.values() for name in side[what]}, key=lambda name: (len(name), name))
    sides = [("s0", audit.balance["train"][what], audit.n_train), ("s1", audit.balance["test"][what], audit.n_test)]
    groups = [(name, [(css, counts.get(name, 0) / n) for css, counts, n in sides]) for name in names]
    return plots.bar_chart(groups, label) if groups else ""


def _pair(audit: Audit, match: ImageMatch) -> Pair:
    return Pair(
        match=match,
        train_name=relative_to(match.train, audit.train_root),
        test_name=relative_to(match.test, audit.test_root),
        train=embed_image(match.train.parent, match.train.name),
        test=embed_image(match.test.parent, match.test.name),
    )
