"""A classifier that reads the question and the options and never the image: how far words alone go.

Each option gets a score, linear in a bag of words; the scores of a question's options make a softmax (a conditional
logit). The bag holds the option's words, the option as a whole, its letter, and each word of the question joined with
the option, so that "modality" can speak for "MRI". Convex, so there is one best fit; its one setting is not tuned.
Of yes and no it chooses likewise; a question that asks for several options, or offers none, is answered as
`fit_question_option_prior` does.
Source: McFadden 1974, "Conditional logit analysis of qualitative choice behavior".
"""

import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from medrl.evaluation.blind import fit_question_option_prior, offered
from medrl.types import Example

_BUCKETS = 2**18
_RIDGE = 1.0
"""Weight of the squared norm against the summed log-loss, as scikit-learn's LogisticRegression(C=1)."""
_STEPS = 60
_WORD = re.compile(r"\w+")


def fit_text_classifier(train: Sequence[Example]) -> Callable[[Sequence[Example]], list[str]]:
    """Fit on questions, options and targets; returns examples -> answers, of which images and targets are not read."""
    from scipy.optimize import minimize

    otherwise = fit_question_option_prior(train)
    choices = [example for example in train if _is_one_of_several(example)]
    if not choices:
        return lambda examples: [otherwise(example) for example in examples]
    features, starts = _featurize(choices)
    right = starts + np.array([list(offered(example)).index(example.target) for example in choices])

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        log_probs = _log_softmax(features @ weights, starts)
        pull = np.exp(log_probs)
        pull[right] -= 1.0
        return _RIDGE / 2 * weights @ weights - log_probs[right].sum(), _RIDGE * weights + features.T @ pull

    fit = minimize(loss, np.zeros(_BUCKETS), jac=True, method="L-BFGS-B", options={"maxiter": _STEPS})

    def choose(examples: Sequence[Example]) -> list[str]:
        tested, begins = _featurize(examples)
        scores = np.split(tested @ fit.x, begins[1:])
        return [list(offered(row))[int(np.argmax(own))] for row, own in zip(examples, scores, strict=True)]

    def answer(examples: Sequence[Example]) -> list[str]:
        asked = [example for example in examples if _is_one_of_several(example)]
        chosen = iter(choose(asked) if asked else ())
        return [next(chosen) if _is_one_of_several(row) else otherwise(row) for row in examples]

    return answer


def _is_one_of_several(example: Example) -> bool:
    return example.kind != "multi_select" and bool(offered(example))


def _log_softmax(scores: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(options,) log-probability of each option among those of its question; ``starts``: first option of each."""
    sizes = np.diff(np.append(starts, len(scores)))
    scores = scores - np.repeat(np.maximum.reduceat(scores, starts), sizes)
    return scores - np.repeat(np.log(np.add.reduceat(np.exp(scores), starts)), sizes)


def _featurize(examples: Sequence[Example]):
    """Sparse (options, _BUCKETS) matrix over all options of all examples, and the first row of each example."""
    from scipy.sparse import csr_array

    known: dict[tuple[str, str], np.ndarray] = {}
    rows, starts = [], []
    for example in examples:
        starts.append(len(rows))
        for letter, option in offered(example).items():
            pair = example.question, option
            if pair not in known:
                known[pair] = _bag(*pair)
            rows.append(np.append(known[pair], _bucket(f"letter {letter}")))
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    columns = np.concatenate(rows)
    shape = (len(rows), _BUCKETS)
    return csr_array((np.ones(len(columns)), columns, offsets), shape=shape), np.array(starts)


def _bag(question: str, option: str) -> np.ndarray:
    words = dict.fromkeys(_WORD.findall(option.casefold()))
    whole = " ".join(words)
    asked = dict.fromkeys(_WORD.findall(question.casefold()))
    names = [f"option {whole}", *(f"word {word}" for word in words), *(f"asked {word} {whole}" for word in asked)]
    return np.array([_bucket(name) for name in names], dtype=np.int32)


def _bucket(name: str) -> int:
    return zlib.crc32(name.encode()) % _BUCKETS
