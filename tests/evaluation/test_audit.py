"""An audit finds what was planted, counts right, and says no when it should."""

import dataclasses
import hashlib
import json

import pytest
from phantoms import LEAKS, phantom

from medrl.data.splits import split_examples
from medrl.data.store import load, write_store
from medrl.errors import DataError, SettingsError, UnfitError
from medrl.evaluation.audit import BLIND, audit, blind_summary, parse_rule
from medrl.evaluation.intervals import wilson
from medrl.report.audit_page import write_audit_page
from medrl.rewards import choice_correct, weighted
from medrl.types import Example

N = 24


def row(number, image, **changes) -> Example:
    facts = {
        "id": f"q{number}", "source": "made up", "images": (image,), "question": f"What is in picture {number % 5}?",
        "options": ("cyst", "tumor", "normal", "something longer")[: 2 + number % 3], "target": "AB"[number % 2],
        "modality": ("CT", "X-Ray")[number % 2], "question_type": "Disease Diagnosis", "patient": f"p{number}",
    }  # fmt: skip
    return Example(**{**facts, **changes})


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("audit")
    rows = []
    for number in range(N):
        phantom(number).save(root / f"{number}.png")
        rows.append(row(number, root / f"{number}.png"))
    return rows


@pytest.fixture(scope="module")
def planted(clean, tmp_path_factory):
    """Six leaks of every kind, and three rows of a training patient; the train rows they come from."""
    root, rows = tmp_path_factory.mktemp("planted"), []
    for place, (kind, leak) in enumerate(LEAKS.items()):
        number = 100 + place
        leak(phantom(place)).save(root / f"{kind}.png")
        rows.append(row(number, root / f"{kind}.png"))
    phantom(200).save(root / "patient.png")
    return [*rows, row(200, root / "patient.png", patient="p3")]


def test_sets_that_share_nothing_are_fit(clean):
    found = audit(clean[:16], clean[16:])
    assert set(found.overlap.values()) == {0} and found.reasons() == [] and found.leaks.matches == []
    found.raise_if_unfit()


def test_what_was_planted_is_found_and_nothing_else(clean, planted):
    found = audit(clean[:16], clean[16:] + planted)
    assert found.overlap == {"images_exact": 1, "near_duplicates": 5, "patients": 1, "question_answer": 6}
    flags = {id: tuple(f for f in own if f != "blind_solvable") for id, own in found.flags().items()}
    assert {id: own for id, own in flags.items() if own} == {
        "q100": ("images_exact", "question_answer"), "q200": ("patients",),
        **{f"q{n}": ("near_duplicates", "question_answer") for n in range(101, 106)},
    }  # fmt: skip
    assert [match.exact for match in found.leaks.matches] == [True] + [False] * 5
    assert {match.train.name: match.test.stem for match in found.leaks.matches} == {
        f"{place}.png": kind for place, kind in enumerate(LEAKS)
    }
    with pytest.raises(UnfitError, match=r"images_exact is 1 of 15.*near_duplicates is 5.*patients is 1"):
        found.raise_if_unfit()


def test_a_question_is_a_duplicate_only_about_the_same_picture(clean):
    other = dataclasses.replace(clean[0], id="other", images=clean[20].images, patient=None)
    same = dataclasses.replace(clean[0], id="same", question=clean[0].question.upper() + "  ", patient=None)
    found = audit(clean[:16], [other, same])
    assert found.leaks.items == {"same": ("images_exact", "question_answer")}
    assert found.leaks.same_wording == 2 and found.leaks.patients_unknown == 2


def test_a_split_with_images_kept_together_is_clean_by_our_count_and_by_file_digests(clean, planted):
    (train, test) = split_examples([*clean, *planted], test_fraction=0.4, seed=1)["all"]
    assert audit(train, test).overlap["images_exact"] == audit(train, test).overlap["near_duplicates"] == 0
    digests = [{hashlib.sha256(e.images[0].read_bytes()).digest() for e in side} for side in (train, test)]
    assert not digests[0] & digests[1]


def test_right_answers_that_the_reward_rejects_are_counted(clean):
    def never_b(example, completion):
        return choice_correct(example, completion) * (example.target != "B")

    found = audit(clean[:16], clean[16:], weighted((1.0, never_b)))
    assert found.gold_rejected == [e.id for e in clean[16:] if e.target == "B"]
    n = len(found.gold_rejected)
    assert found.reasons(["gold_rejected"]) == [
        f"gold_rejected is 12 of 24 examples ({n} of test, {12 - n} of training)"
    ]
    assert found.reasons(["gold_rejected>49%"]) and not found.reasons(["gold_rejected>50%"])
    assert found.reasons(["gold_rejected>11"]) and not found.reasons(["gold_rejected>12"])


def test_blind_rules_are_counted_by_hand(clean):
    found = audit(clean[:16], clean[16:])
    assert tuple(found.blind) == BLIND and set(found.by_domain) == {"ct", "x-ray", "disease-diagnosis"}
    # options of q16..q23: 3, 4, 2, 3, 4, 2, 3, 4; the chance to hit is their inverse
    assert found.blind["random"].value == pytest.approx((3 / 3 + 3 / 4 + 2 / 2) / 8)
    assert found.blind["majority_letter"] == wilson(4, 8)  # A and B are right equally often; ties go to A
    assert found.blind["longest_option"] == wilson(1, 8)  # two options: tumor; three: normal; four: something longer
    assert found.blind["option_prior"] == wilson(4, 8)  # cyst and tumor were right equally often; ties go first
    assert found.by_domain["ct"]["option_prior"] == wilson(4, 4)
    assert found.by_domain["x-ray"]["option_prior"] == wilson(0, 4)
    best = max(interval.value for name, interval in found.blind.items() if name != "random")
    assert found.blind_solvable_share == best
    assert found.balance["test"] == {"letters": {"A": 4, "B": 4}, "options": {"2": 2, "3": 3, "4": 3}}


def test_the_json_has_what_programs_rely_on(clean, planted):
    given = json.loads(json.dumps(audit(clean[:16], planted, before=blind_summary(clean[:16], planted)).as_dict()))
    assert set(given["overlap"]) == {"images_exact", "near_duplicates", "patients", "question_answer"}
    assert isinstance(given["gold_rejected"], int) and 0 <= given["blind_solvable_share"] <= 1
    for table in (given["blind"], *given["by_domain"].values(), given["blind_before_resampling"]):
        assert set(table) == set(BLIND)
        assert all(set(entry) == {"accuracy", "low", "high", "n"} for entry in table.values())
    assert {pair["kind"] for pair in given["image_pairs"]} == {"exact", "near"}


@pytest.mark.parametrize(
    ("rule", "parsed"),
    [("patients", ("patients", 0.0, False)), ("near_duplicates>1%", ("near_duplicates", 1.0, True)),
     ("option_prior > 0.9", ("option_prior", 0.9, False)), ("images_exact>3", ("images_exact", 3.0, False))],
)  # fmt: skip
def test_rules_are_read(rule, parsed):
    assert parse_rule(rule) == parsed


@pytest.mark.parametrize("rule", ["", "leaks", "patients<3", "patients>x", "option_prior", "random"])
def test_what_is_no_rule_is_refused(rule):
    with pytest.raises(SettingsError, match="rule"):
        parse_rule(rule)


def test_shares_and_counts_have_their_limits(clean, planted):
    found = audit(clean[:16], planted)  # 7 test examples, 1 exact
    assert found.reasons(["images_exact>14.2%"]) and not found.reasons(["images_exact>14.3%"])
    assert not found.reasons(["images_exact>1"]) and found.reasons(["blind_solvable_share>1%"])


def test_empty_sets_are_refused(clean):
    with pytest.raises(DataError, match="training set is empty"):
        audit([], clean)
    with pytest.raises(DataError, match="test set is empty"):
        audit(clean, [])


def test_the_page_shows_pairs_side_by_side_and_nothing_runs_in_it(clean, planted, tmp_path):
    nasty = [dataclasses.replace(e, modality="<script>alert(1)</script>") for e in planted]
    write_store(tmp_path / "train", clean[:16], source="s", license="l")
    write_store(tmp_path / "test", nasty, source="s", license="l")
    roots = {"train_root": tmp_path / "train", "test_root": tmp_path / "test"}
    found = audit(load(tmp_path / "train"), load(tmp_path / "test"), **roots)
    page = write_audit_page(found, tmp_path / "out" / "audit.html").read_text()
    assert page.count('<article class="card">') == 6 and page.count('src="data:image/jpeg;base64,') == 12
    assert "<script" not in page and "images/mirrored.png" in page and "the training image mirrored" in page
    assert "images_exact is 1 of 7 test examples" in page and "Research use only" in page
    assert str(tmp_path) not in page
