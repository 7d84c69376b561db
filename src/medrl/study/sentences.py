"""The answer of a study in three sentences. They claim no more than interval and corrected test allow."""

from collections.abc import Mapping
from typing import Any

from medrl.evaluation.intervals import Interval
from medrl.report import text
from medrl.study.figures import by_name


def answer(found: Mapping[str, Any]) -> list[str]:
    """Three sentences: the best off the diagonal against zero-shot, against supervised training, and against rules that
    see no image."""
    scope = "off_diagonal" if found["trained_on"] != ["all"] else "overall"
    trained = {name: matrix for name, matrix in found["methods"].items() if matrix["seeds"]}
    means = {name: found["means"][name][scope]["value"] for name in trained}
    known = {name: value for name, value in means.items() if value is not None}
    if not known:
        return ["No method has all its specialists yet, so nothing is compared."]
    best = max(known, key=known.__getitem__)
    reinforced = {name: value for name, value in known.items() if trained[name]["objective"] != "sft"}
    supervised = next((name for name in known if trained[name]["objective"] == "sft"), None)
    hero = max(reinforced, key=reinforced.__getitem__) if reinforced else best
    zero_shot = next(name for name, matrix in found["methods"].items() if not matrix["seeds"])
    sentences = [_sentence(found, hero, zero_shot, scope)]
    if supervised and supervised != hero:
        sentences.append(_sentence(found, hero, supervised, scope))
    sentences.append(_sentence(found, hero, f"blind: {found['best_blind']}", "overall"))
    return sentences


def _sentence(found: Mapping[str, Any], a: str, b: str, scope: str) -> str:
    claim = by_name(found["claims"], a, b, scope) or _turned(by_name(found["claims"], b, a, scope))
    if claim is None or claim["difference"] is None:
        return f"{a} and {b} cannot be compared: an evaluation is missing."
    where = {
        "off_diagonal": "outside the trained domain", "diagonal": "in the trained domain", "overall": "overall"
    }[scope]  # fmt: skip
    ends = "no interval"
    if claim["low"] is not None:
        ends = f"95\u202f% interval {text.points(claim['low'])} to {text.points(claim['high'])}"
    evidence = f"{text.points(claim['difference'])} points ({ends}, {text.p_equals(claim['p_holm'])} after Holm"
    shares = f"{a} has {_mean(found, a, scope)} right on average and {b} {_mean(found, b, scope)}"
    if claim["shown"]:
        return f"{where.capitalize()}, {shares}: {evidence})."
    power = f"; the test can see {100 * claim['detectable']:.1f} points" if claim["detectable"] is not None else ""
    return f"{where.capitalize()}, {shares}: no difference is shown, {evidence}{power})."


def _mean(found: Mapping[str, Any], name: str, scope: str) -> str:
    """``60.2 % (55.2 – 65.4)``"""
    mean = found["means"][name][scope]
    mean = Interval(mean["value"], mean["low"], mean["high"], 0)
    return f"{text.percent(mean.value)} ({text.percent_range(mean)})"


def _turned(claim: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The same claim with its sides exchanged."""
    if claim is None or claim["difference"] is None or claim["low"] is None:
        return claim
    return {**claim, "difference": -claim["difference"], "low": -claim["high"], "high": -claim["low"]}
