from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medrl.data.store import load, write_store
from medrl.errors import SettingsError
from medrl.evaluation.evaluate import EvalSettings, evaluate
from medrl.evaluation.rescore import rescore
from medrl.evaluation.samples import majority, pass_at_k, summarize_samples
from medrl.rewards.scorers import find_scorer
from medrl.rollout.engine import generate
from medrl.runs import read_records
from medrl.types import Sample

WARM = EvalSettings(mode="no_think", template="plain-no-think", max_new_tokens=8, batch_size=3, samples=4, seed=1)


def sample(answer: str | None, correct: bool = False, text: str = "") -> Sample:
    return Sample(completion=text, finish_reason="stop", answer=answer, correct=correct, parts={}, tokens=1)


@pytest.mark.parametrize(
    ("answers", "elected"),
    [
        ("AABB", 0),  # a tie goes to what was said first
        ("BAAB", 0),
        ("BAAC", 1),
        ((None, None, "C"), 2),  # who cannot be read has no vote
        ((None, None), 0),
        (("effusion", "Pleural effusion", "Effusion"), 0),  # words are compared without case
    ],
)
def test_the_majority_is_the_most_frequent_answer(answers, elected):
    samples = [sample(answer, text=str(place)) for place, answer in enumerate(answers)]
    assert majority(samples) is samples[elected]


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(right, data):
    k = data.draw(st.integers(1, len(right)))
    draws = list(combinations(right, k))
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_refuses_what_cannot_be():
    for n, right, k in ((3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)):
        with pytest.raises(ValueError, match=f"{k} drawn from {n} samples"):
            pass_at_k(n, right, k)


@pytest.fixture(scope="module")
def tiny(make_policy):
    return make_policy(torch.float32)


@pytest.fixture(scope="module")
def test_store(make_examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("stores") / "test"
    write_store(out, make_examples(out.parent / "images", 7), source="noise", license="none")
    return out


@pytest.fixture(scope="module")
def finished(tiny, test_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval") / "sampled"
    return evaluate(tiny, load(test_store), out=out, root=test_store, settings=WARM, quiet=True), out


def test_every_question_keeps_all_its_samples_and_its_record_is_the_majority(finished):
    evaluation, out = finished
    assert read_records(out) == evaluation.records
    for record in evaluation.records:
        assert len(record.samples) == 4
        elected = majority(record.samples)
        assert (record.completion, record.answer, record.correct) == (
            elected.completion,
            elected.answer,
            elected.correct,
        )
        assert (record.tokens, record.finish_reason) == (elected.tokens, elected.finish_reason)
    assert len({one.completion for record in evaluation.records for one in record.samples}) > 7


def test_the_samples_are_the_rollout_engines_draws_whatever_the_batch(finished, tiny, test_store, tmp_path):
    from medrl.data.prompts import make_prompt

    examples = load(test_store)
    prompts = [make_prompt(example, "no_think", "plain-no-think") for example in examples]
    drawn = generate(tiny, prompts, WARM.sampling, group_size=4, seed=1)
    texts = [[completion.text for completion in group] for group in drawn]
    assert [[one.completion for one in record.samples] for record in finished[0].records] == texts
    again = WARM.model_copy(update={"batch_size": 7})
    found = evaluate(tiny, examples, out=tmp_path / "eval", root=test_store, settings=again, quiet=True)
    assert found.records == finished[0].records


def test_the_summary_holds_pass_at_k_and_the_majoritys_accuracy(finished):
    evaluation, _ = finished
    summary, records = evaluation.summary, evaluation.records
    assert summary["samples"] == 4
    assert summary["sampling"] == {"samples": 4, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 1}
    shares = [sum(one.correct for one in record.samples) / 4 for record in records]
    assert summary["pass@k"]["1"]["value"] == pytest.approx(sum(shares) / 7)
    assert summary["pass@k"]["4"]["value"] == pytest.approx(sum(share > 0 for share in shares) / 7)
    assert summary["pass@k"].keys() == {"1", "2", "4"}
    assert summary["accuracy"]["value"] == pytest.approx(sum(record.correct for record in records) / 7)


def test_records_without_samples_have_no_such_figures():
    assert summarize_samples([]) == {}


def test_samples_are_graded_again_and_vote_again(finished):
    records = rescore(finished[0].records, find_scorer("strict"))
    assert [(r.answer, r.correct) for r in records] == [(r.answer, r.correct) for r in finished[0].records]

    def all_c(example, completion):
        from medrl.types import Score

        last = completion.text == completions[-1]
        return Score(value=float(last), parts={}, answer="C" if last else None)

    completions = [one.completion for one in finished[0].records[0].samples]
    (voted,) = rescore(finished[0].records[:1], all_c)
    assert (voted.answer, voted.correct, voted.completion) == ("C", True, completions[-1])


def test_greedy_samples_are_refused():
    with pytest.raises(SettingsError, match="all the same"):
        EvalSettings(samples=2, temperature=0)
    assert EvalSettings().sampling.temperature == 0 and EvalSettings(samples=2).sampling.temperature == 1
