"""Words alone: what they give away is found, what they do not is not."""

import numpy as np
import pytest

from medrl.evaluation.text_classifier import _featurize, _log_softmax, fit_text_classifier
from medrl.types import LETTERS, Example


def example(number: int, question: str, options: tuple[str, ...], target: str) -> Example:
    return Example(
        id=str(number), source="s", images=(), question=question, options=options, target=LETTERS[options.index(target)]
    )


def accuracy(train, test):
    return np.mean([letter == row.target for letter, row in zip(fit_text_classifier(train)(test), test, strict=True)])


def draw(n: int, seed: int, answer) -> list[Example]:
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(n):
        options = tuple(generator.permutation(["lesion", "cyst", "normal"]).tolist())
        question = str(generator.choice(["Name the modality.", "Which organ?", "Is there disease?"]))
        rows.append(example(number, question, options, answer(question, options, generator)))
    return rows


def test_an_answer_that_hangs_on_the_question_s_words_is_learned():
    meant = {"Name the modality.": "cyst", "Which organ?": "normal", "Is there disease?": "lesion"}
    rows = draw(260, 0, lambda question, options, _: meant[question])
    assert accuracy(rows[:200], rows[200:]) == 1.0


def test_answers_that_are_drawn_at_random_are_not():
    rows = draw(2200, 1, lambda question, options, generator: str(generator.choice(options)))
    assert abs(accuracy(rows[:200], rows[200:]) - 1 / 3) < 0.05


def test_a_letter_that_is_always_right_is_learned():
    rows = draw(60, 2, lambda question, options, _: options[1])
    assert fit_text_classifier(rows)(draw(20, 3, lambda q, options, _: options[0])) == ["B"] * 20


def test_the_softmax_is_over_the_options_of_each_question():
    import scipy.special

    scores, starts = np.array([1.0, 2.0, -700.0, 0.5, 0.5]), np.array([0, 3])
    expected = np.concatenate([scipy.special.log_softmax(scores[:3]), scipy.special.log_softmax(scores[3:])])
    assert _log_softmax(scores, starts) == pytest.approx(expected)


def test_two_options_make_it_the_logistic_regression_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(4)
    words = [f"w{i}" for i in range(12)]
    rows = []
    for number in range(80):
        options = tuple(" ".join(generator.choice(words, 3, replace=False).tolist()) for _ in range(2))
        better = max(options, key=lambda option: ("w0" in option.split()) + generator.normal(0, 0.5))
        rows.append(example(number, "?", options, better))
    features, _ = _featurize(rows)
    difference = features.tocsr()[::2] - features.tocsr()[1::2]
    oracle = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-8, max_iter=1000).fit(
        difference, [row.target == "A" for row in rows]
    )
    theirs = ["A" if right else "B" for right in oracle.predict(difference)]
    assert fit_text_classifier(rows)(rows) == theirs


def test_nothing_asked_nothing_answered():
    rows = draw(6, 5, lambda question, options, _: options[0])
    assert fit_text_classifier(rows)([]) == []
