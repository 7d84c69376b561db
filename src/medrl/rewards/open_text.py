"""How near a short open answer comes to its reference: exact, token F1, ROUGE-L, BLEU, embedding similarity.

All take texts and give 0 to 1; of several references the nearest counts.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from rapidfuzz.distance import LCSseq

from medrl.errors import MissingExtraError, SettingsError
from medrl.rewards.option_text import ARTICLE, clean, same_text, words_of
from medrl.types import Example

Embed = Callable[[Sequence[str]], Sequence[Sequence[float]]]
"""Texts -> one vector each."""


def references_of(example: Example) -> tuple[str, ...]:
    """All texts that are right answers of ``example``."""
    return (example.target, *example.references)


def exact(answer: str, references: Sequence[str]) -> float:
    """1.0 if the answer is a reference up to case, punctuation, hyphenation and a leading article; 0.0 otherwise."""
    return float(any(same_text(answer, reference) for reference in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of the shares of words that answer and reference have in common, repeated words counted.

    Source: SQuAD, Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1. Two texts without words do not match.
    """
    return max(_f1(_words(answer), _words(reference)) for reference in references)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """The same for the longest common subsequence of words: ROUGE-L with equal weights, order counted.

    Source: Lin 2004, ROUGE, section 3.1, beta = 1.
    """
    return max(_lcs_f1(_words(answer), _words(reference)) for reference in references)


def bleu(answer: str, references: Sequence[str]) -> float:
    """Sentence BLEU of sacrebleu over its shorter n-grams where a text has no longer ones; 0 to 1.

    Source: Post 2018, arXiv 1804.08771, with effective order and its default smoothing. Raises `MissingExtraError`.
    """
    score = _sacrebleu().sentence_score(" ".join(_words(answer)), [" ".join(_words(r)) for r in references])
    return min(1.0, score.score / 100)


def cosine(answer: str, references: Sequence[str], embed: Embed) -> float:
    """Largest cosine of the angle between the vectors of answer and reference; 0.0 where it is negative."""
    mine, *theirs = embed([answer, *references])
    return max(0.0, *(_cosine(mine, vector) for vector in theirs))


@lru_cache(maxsize=2)
def text_encoder(model: str) -> Embed:
    """Mean of a transformers encoder's last hidden states, for `cosine`; ``model`` is a folder or a hub id."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    if tokenizer.pad_token is None:
        raise SettingsError(f"the tokenizer of {model} has no padding token, so it is no encoder of sentences")

    def embed(texts: Sequence[str]) -> list[list[float]]:
        batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            states = encoder(**batch).last_hidden_state  # (B, T, D)
        mask = batch["attention_mask"].unsqueeze(-1)
        return ((states * mask).sum(1) / mask.sum(1)).tolist()

    return embed


def _words(text: str) -> tuple[str, ...]:
    cleaned = clean(text)
    return words_of(ARTICLE.sub("", cleaned, count=1) if ARTICLE.match(cleaned) else cleaned)


def _f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    return _harmonic(sum((Counter(answer) & Counter(reference)).values()), len(answer), len(reference))


def _lcs_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    return _harmonic(LCSseq.similarity(answer, reference), len(answer), len(reference))


def _harmonic(common: int, n_answer: int, n_reference: int) -> float:
    return 2 * common / (n_answer + n_reference) if common else 0.0


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    product = sum(x * y for x, y in zip(a, b, strict=True))
    size = (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
    return product / size if size else 0.0


@lru_cache(maxsize=1)
def _sacrebleu() -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise MissingExtraError("sacrebleu", "rewards") from error
    return BLEU(effective_order=True, tokenize="none")
