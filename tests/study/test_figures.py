"""Matrices of a few answers, whose figures can be had with a pencil."""

import csv
import io
import json
import re

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from medrl.study.answers import Method, Table, unsolvable
from medrl.study.figures import AxisFigures, study_figures
from medrl.study.sentences import answer
from medrl.study.tables import latex, markdown, write_tables

# Ten questions: six of CT, four of MRI; each on an image of its own.
PLACE = np.array([0] * 6 + [1] * 4)
ZERO_SHOT = [1, 0, 0, 0, 0, 0, 1, 0, 0, 0]  # 1/6, 1/4
ON_CT = [1, 1, 1, 1, 1, 0, 1, 1, 0, 0]  # 5/6, 2/4
ON_MRI = [1, 1, 1, 0, 0, 0, 1, 1, 1, 1]  # 3/6, 4/4
SFT_CT = [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]  # 6/6, 0/4
SFT_MRI = [0, 0, 0, 0, 0, 1, 1, 1, 1, 0]  # 1/6, 3/4
BLIND = [1, 1, 0, 0, 0, 0, 1, 0, 0, 0]  # 2/6, 1/4


def make_table(clusters=None, grpo=None) -> Table:
    right = lambda *rows: np.array([rows], dtype=float)  # noqa: E731
    return Table(
        axis="modality",
        rows=["CT", "MRI"],
        columns=["CT", "MRI"],
        place=PLACE,
        clusters=np.arange(10) if clusters is None else clusters,
        methods=[
            Method("zero-shot", "zero_shot", right(ZERO_SHOT), mode="think"),
            Method("sft", "trained", right(SFT_CT, SFT_MRI), (0,), "sft", "no_think"),
            Method("grpo", "trained", right(ON_CT, ON_MRI) if grpo is None else grpo, (0,), "grpo", "think"),
            Method("grpo-no", "trained", right(ON_CT, ON_CT), (0,), "grpo", "no_think"),
        ],
        blind=[Method("option_prior", "blind", right(BLIND))],
        blind_specialists=[Method("option_prior", "blind", right(BLIND, BLIND))],
        best_blind="option_prior",
    )


@pytest.fixture(scope="module")
def found():
    return study_figures([make_table()], draws=2000)["modality"]


def test_cells_are_shares_of_right_answers_with_wilson_intervals(found):
    assert found["methods"]["grpo"]["accuracy"] == [[5 / 6, 0.5], [0.5, 1.0]]
    assert found["methods"]["zero-shot"]["accuracy"] == [[1 / 6, 0.25]]
    assert found["methods"]["grpo"]["n"] == [[6, 4], [6, 4]]
    low, high = proportion_confint(5, 6, method="wilson")
    assert (found["methods"]["grpo"]["low"][0][0], found["methods"]["grpo"]["high"][0][0]) == pytest.approx((low, high))
    assert found["blind"]["option_prior"] == [2 / 6, 0.25]


def test_means_by_hand(found):
    means = found["means"]["grpo"]
    assert means["diagonal"]["value"] == pytest.approx((5 / 6 + 1) / 2)
    assert means["off_diagonal"]["value"] == pytest.approx(0.5)
    assert means["overall"]["value"] == pytest.approx((5 / 6 + 0.5 + 0.5 + 1) / 4)
    assert means["overall"]["micro"]["value"] == pytest.approx((5 + 2 + 3 + 4) / 20)
    assert means["off_diagonal"]["micro"]["value"] == pytest.approx((2 + 3) / 10)
    assert [mean["value"] for mean in means["rows"]] == pytest.approx([(5 / 6 + 0.5) / 2, 0.75])
    assert [mean["value"] for mean in means["columns"]] == pytest.approx([(5 / 6 + 0.5) / 2, 0.75])
    assert found["means"]["zero-shot"]["off_diagonal"]["value"] == pytest.approx((1 / 6 + 1 / 4) / 2)


def test_gains_are_cell_by_cell_over_zero_shot_over_supervised_and_of_thinking(found):
    gains = {(gain["a"], gain["b"]): gain for gain in found["gains"]}
    assert set(gains) == {
        ("sft", "zero-shot"), ("grpo", "zero-shot"), ("grpo-no", "zero-shot"), ("grpo", "sft"), ("grpo-no", "sft"),
        ("grpo", "grpo-no"),
    }  # fmt: skip
    assert gains["grpo", "zero-shot"]["difference"][0] == pytest.approx([4 / 6, 0.25])
    assert gains["grpo", "sft"]["difference"][1] == pytest.approx([2 / 6, 0.25])
    thinking = gains["grpo", "grpo-no"]
    assert thinking["difference"][0] == [0, 0] and (thinking["low"][0], thinking["high"][0]) == ([0, 0], [0, 0])


def test_claims_are_all_pairs_and_corrected_together(found):
    claims = found["claims"]
    pairs = {(claim["a"], claim["b"]) for claim in claims}
    assert ("grpo", "zero-shot") in pairs and ("grpo", "sft") in pairs and ("grpo", "blind: option_prior") in pairs
    assert len(claims) == (2 + 3 + 4) * 3
    one = next(c for c in claims if (c["a"], c["b"], c["scope"]) == ("grpo", "sft", "off_diagonal"))
    assert one["difference"] == pytest.approx(0.5 - (0 + 1 / 6) / 2)
    assert one["low"] <= one["difference"] <= one["high"]
    smallest = min(claims, key=lambda claim: claim["p"])
    assert smallest["p_holm"] == pytest.approx(min(1.0, smallest["p"] * len(claims)))
    assert all(claim["p_holm"] >= claim["p"] for claim in claims)
    assert all(not claim["shown"] or claim["p_holm"] < 0.05 for claim in claims)


def test_the_blind_unsolvable_questions_are_those_the_best_rule_has_wrong(found):
    assert unsolvable(make_table()).tolist() == [not right for right in BLIND]
    part = found["blind_unsolvable"]
    assert part["rule"] == "option_prior" and part["share"] == 0.7 and part["n"] == [4, 3]
    assert part["methods"]["grpo"]["accuracy"] == [[3 / 4, 1 / 3], [1 / 4, 1.0]]
    assert part["means"]["blind: option_prior"]["overall"]["value"] == 0.0


def test_questions_about_one_image_count_as_one_cluster():
    apart = AxisFigures(make_table(), draws=2000).means("grpo")["overall"]
    together = AxisFigures(make_table(clusters=np.array([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])), draws=2000)
    assert together.layout.n_clusters == 4
    wide = together.means("grpo")["overall"]
    assert wide["value"] == apart["value"]
    assert wide["high"] - wide["low"] > 1.2 * (apart["high"] - apart["low"])


def test_a_mean_of_right_answers_alone_leaves_room_for_doubt():
    every = np.ones((1, 2, 10))
    means = study_figures([make_table(grpo=every)], draws=300)["modality"]["means"]["grpo"]
    low, high = proportion_confint(10, 10, method="wilson")
    assert (means["overall"]["value"], means["overall"]["high"]) == (1.0, 1.0)
    assert means["overall"]["low"] == pytest.approx(low) and high == 1.0
    assert means["columns"][1]["low"] == pytest.approx(proportion_confint(4, 4, method="wilson")[0])
    two_images = study_figures([make_table(clusters=PLACE, grpo=every)], draws=300)["modality"]["means"]["grpo"]
    assert two_images["overall"]["low"] == pytest.approx(proportion_confint(2, 2, method="wilson")[0])
    assert two_images["columns"][1]["low"] is None  # one image knows no doubt and no certainty


def test_seeds_are_averaged_and_widen_means_and_differences():
    once = np.array([[ON_CT, ON_MRI]], dtype=float)
    worse = np.array([[SFT_CT, SFT_MRI]], dtype=float)
    same = AxisFigures(make_table(grpo=np.concatenate([once, once, once])), draws=2000)
    mixed = AxisFigures(make_table(grpo=np.concatenate([once, worse, once])), draws=2000)
    single = AxisFigures(make_table(), draws=2000)
    ours, theirs = (figures.means("grpo")["overall"] for figures in (same, single))
    assert [ours[key] for key in ("value", "low", "high")] == pytest.approx(
        [theirs[key] for key in ("value", "low", "high")]
    )
    cell = mixed.matrix(mixed.table.methods[2])["accuracy"][0][0]
    assert cell == pytest.approx((5 / 6 + 1 + 5 / 6) / 3)
    width = {name: f.means("grpo")["overall"]["high"] - f.means("grpo")["overall"]["low"] for name, f in
             (("same", same), ("mixed", mixed))}  # fmt: skip
    assert width["mixed"] > 2 * width["same"]


def test_a_missing_specialist_leaves_holes_and_no_invented_means():
    answers = np.array([[ON_CT, [np.nan] * 10]], dtype=float)
    found = study_figures([make_table(grpo=answers)], draws=500)["modality"]
    assert found["methods"]["grpo"]["accuracy"] == [[5 / 6, 0.5], [None, None]]
    assert found["means"]["grpo"]["overall"] == {
        "value": None, "low": None, "high": None, "micro": {"value": None, "low": None, "high": None},
    }  # fmt: skip
    assert found["means"]["grpo"]["rows"][0]["value"] is not None
    assert all(c["p_holm"] is None for c in found["claims"] if "grpo" in (c["a"], c["b"]))
    assert all(c["p_holm"] is not None for c in found["claims"] if (c["a"], c["b"]) == ("sft", "zero-shot"))
    assert all("grpo-no has" in sentence and "grpo has" not in sentence for sentence in answer(found))  # that is whole


def test_a_missing_evaluation_of_the_base_is_said_and_the_rest_is_compared():
    table = make_table()
    table.methods[0] = Method("zero-shot", "zero_shot", np.full((1, 1, 10), np.nan), mode="think")
    first, *others = answer(study_figures([table], draws=500)["modality"])
    assert first == "grpo-no and zero-shot cannot be compared: an evaluation is missing."
    assert len(others) == 2 and all("cannot be compared" not in sentence for sentence in others)


def test_where_no_method_is_whole_nothing_is_compared():
    table = make_table()
    for method in table.methods[1:]:
        method.right[0, 1] = np.nan
    found = study_figures([table], draws=500)["modality"]
    assert answer(found) == ["No method has all its specialists yet, so nothing is compared."]


def test_one_domain_for_all_has_an_overall_mean_and_no_off_diagonal():
    table = make_table()
    one = Table("all", ["all"], ["all"], np.zeros(10, dtype=int), table.clusters,
                [Method(m.name, m.kind, m.right[:, :1], m.seeds, m.objective, m.mode) for m in table.methods],
                table.blind, [Method("option_prior", "blind", table.blind[0].right)], "option_prior")  # fmt: skip
    found = study_figures([one], draws=500)["all"]
    assert found["means"]["grpo"]["overall"]["value"] == 0.7
    assert found["means"]["grpo"]["off_diagonal"]["value"] is None
    assert {claim["scope"] for claim in found["claims"]} == {"overall"}
    assert answer(found)[0].startswith("Overall, ")


def test_the_answer_claims_no_more_than_test_and_interval_allow(found):
    for sentence in answer(found):
        assert "no difference is shown" in sentence  # ten questions show nothing after Holm
    sure = {**found, "claims": [{**c, "difference": 0.3, "low": 0.2, "high": 0.4, "p_holm": 0.001, "shown": True}
                                for c in found["claims"]]}  # fmt: skip
    first = answer(sure)[0]  # off the diagonal: (2/4 + 5/6) / 2 against (1/4 + 1/6) / 2
    assert first.startswith("Outside the trained domain, grpo-no has 66.7\u202f% (")
    assert ") right on average and zero-shot 20.8\u202f% (" in first
    assert first.endswith("): +30.0 points (95\u202f% interval +20.0 to +40.0, p = 0.001 after Holm).")


def test_what_is_not_shown_says_what_the_test_could_have_seen(found):
    assert all("; the test can see " in sentence and sentence.endswith(" points).") for sentence in answer(found))


def test_tables_say_what_the_matrices_say(found, tmp_path):
    files = write_tables({"modality": found}, tmp_path)
    assert {file.name for file in files} >= {"matrices.json", "cells.csv", "claims.csv", "tables.md", "tables.tex"}
    assert json.loads((tmp_path / "matrices.json").read_text())["modality"]["domains"] == ["CT", "MRI"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "tables" / "cells.csv").read_text())))
    one = next(
        row
        for row in rows
        if (row["questions"], row["method"], row["trained_on"], row["tested_on"]) == ("all", "grpo", "CT", "CT")
    )
    assert float(one["value"]) == 5 / 6 and one["n"] == "6"
    assert len(list(csv.DictReader((tmp_path / "tables" / "claims.csv").open()))) == 2 * 27
    assert "| CT | 83.3 [43.6, 97.0] | 50.0 [15.0, 85.0] | 66.7 [" in (tmp_path / "tables" / "tables.md").read_text()
    assert "| option\\_prior | 33.3 [9.7, 70.0] | 25.0 [4.6, 69.9] |" in (tmp_path / "tables" / "tables.md").read_text()
    assert r"CT & 83.3 [43.6, 97.0] & 50.0 [15.0, 85.0] & 66.7 [" in (tmp_path / "tables" / "tables.tex").read_text()
    # Means of rows 66.7 and 75.0, of columns 66.7 and 75.0, of all 70.8; micro of the diagonal (5 + 4) / 10.
    assert re.search(r"\| mean \| 66\.7 \[.*?\] \| 75\.0 \[.*?\] \| 70\.8 \[", markdown({"modality": found}))
    assert re.search(r"\| grpo \| 91\.7 \[.*?\] \| 90\.0 \[", markdown({"modality": found}))


def test_names_from_data_are_no_markup_in_any_table(found, tmp_path):
    hostile = {**found, "domains": ["=cmd|'/c'!A1", "50 % & \\input{x} <b>"], "trained_on": ["a_b", "| c |"]}
    hostile["methods"] = {
        name: {**matrix, "trained_on": matrix["trained_on"] and ["a_b", "| c |"]}
        for name, matrix in found["methods"].items()
    }
    text = latex({"modality": hostile})
    assert r"50 \% \& \textbackslash{}input\{x\}" in text and "\\input{" not in text
    assert "\\| c \\|" in markdown({"modality": hostile}) and "<b>" not in markdown({"modality": hostile})
    write_tables({"modality": hostile}, tmp_path)
    assert "'=cmd" in (tmp_path / "tables" / "cells.csv").read_text()
