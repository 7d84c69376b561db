"""Whether a text is an option's text: what is forgiven in writing it, and what is not.

Forgiven: case, white space, Unicode form, surrounding and inner punctuation, a leading article, hyphenation, and one
slip late in one long word. Not forgiven: a missing or added word, and any other number or sign.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from rapidfuzz.distance import OSA

ARTICLE = re.compile(r"(?:an?|the) (?=\S{2})")
LABEL = re.compile(r"[\W_]*[a-z](?:\s?[)\].:,;=|*\n]|\s-\s)")
"""A letter set off as a label, as in ``C) CT``, at the start of a cleaned text."""

_ENTITIES = {"lt": "<", "gt": ">", "amp": "&", "nbsp": " ", "quot": '"', "#39": "'"}
_ENTITY = re.compile(r"(?ai)&(lt|gt|amp|nbsp|quot|#39);")
_MARKUP = re.compile(r"(?ai)</?(?:b|i|u|p|br|em|strong|span|code|div|sub|sup|mark)/?>")
_DASHES = re.compile(r"[\u2010-\u2015\u2212\ufe58\ufe63\uff0d]")
_SPACES = re.compile(r"\s+")
# Signs and decimal points carry meaning ("HER2-", "-5", "> 5 mm", "1.5 T"); other punctuation does not.
_WORD = re.compile(
    r"(?:(?<![^\W_])[-.](?=\d))?[^\W_]+(?:(?<=\d)[-.,:/](?=\d)[^\W_]+)*(?:-(?![^\W_]))?|[<>=±≤≥+%]",
)
_JOINT = re.compile(r"(?<=[^\W\d_])[ -](?=[^\W_])|(?<=\d)[ -](?=[^\W\d_])")
_TYPO_MIN_LETTERS = 8
_TYPO_SAME_START = 5


def options_as_written(text: str, options: Sequence[str]) -> list[int]:
    """Options that ``text`` repeats as they are written, up to case, white space and punctuation around them."""
    wanted = _as_written(text)
    exact = [i for i, option in enumerate(options) if wanted and _as_written(option) == wanted]
    return exact or _options_with_key(0, _keys(text), options)


def options_named(text: str, options: Sequence[str]) -> list[int]:
    """Options whose text is ``text``, by the strictest comparison that finds any."""
    # "A) dislocation" must not become the option "A dislocation": behind a label only the option as written counts.
    keys, labeled = _keys(text), LABEL.match(clean(text))
    for level in range(1 if labeled else len(keys)):
        if named := _options_with_key(level, keys, options):
            return named
    if labeled:
        return []
    words = words_of(clean(text))
    return [i for i, option in enumerate(options) if _differs_by_a_typo(words, words_of(clean(option)))]


def same_text(text: str, option: str) -> bool:
    """Whether ``text`` is the option's text by any comparison but the one that forgives a slip."""
    return any(mine and mine == theirs for mine, theirs in zip(_keys(text), _option_keys(option), strict=True))


def clean(text: str) -> str:
    """Case, Unicode form, dashes, entities, simple markup and white space made alike; a line break stays one."""
    text = _ENTITY.sub(lambda match: _ENTITIES[match[1].lower()], text)
    text = _MARKUP.sub(" ", unicodedata.normalize("NFKC", text))
    text = unicodedata.normalize("NFKC", text.casefold())
    text = _DASHES.sub("-", text).strip()
    return _SPACES.sub(lambda match: "\n" if "\n" in match[0] else " ", text).removeprefix("- ")


def words_of(cleaned: str) -> tuple[str, ...]:
    """Words, numbers and meaningful signs of a cleaned text, in order."""
    return tuple(_WORD.findall(cleaned))


def trim(text: str) -> str:
    """``text`` without the forgiven characters at its ends."""
    start, end = 0, len(text)
    while start < end and is_forgiven(text[start]):
        start += 1
    while start < end and is_forgiven(text[end - 1]):
        end -= 1
    return text[start:end]


def is_forgiven(char: str) -> bool:
    """Punctuation, brackets, blanks and invisible characters; not the signs and dashes that change a meaning."""
    category = unicodedata.category(char)
    return char in "`$|~^" or (category[0] in "PZ" and category != "Pd" and char != "%") or category in ("Cc", "Cf")


def _as_written(text: str) -> str:
    return " ".join(text.split()).casefold()


def _keys(text: str) -> tuple[object, ...]:
    """What a text is compared by, strictest first; a key that is empty matches nothing."""
    cleaned = clean(text)
    return (
        _SPACES.sub(" ", trim(cleaned)),
        words_of(cleaned),
        _joined_words(cleaned),
        _joined_words(ARTICLE.sub("", cleaned, count=1) if ARTICLE.match(cleaned) else cleaned),
    )


_option_keys = lru_cache(maxsize=4096)(_keys)


def _options_with_key(level: int, keys: tuple[object, ...], options: Sequence[str]) -> list[int]:
    return [i for i, option in enumerate(options) if keys[level] and _option_keys(option)[level] == keys[level]]


def _joined_words(cleaned: str) -> tuple[str, ...]:
    """Words with blanks and hyphens inside them closed up, so that ``X-ray``, ``X ray`` and ``Xray`` are one word."""
    if sum(len(word) == 1 and word.isalpha() for word in words_of(cleaned)) > 1:
        return ()  # "A B" are two letters, not the blood group AB
    return words_of(_JOINT.sub("", cleaned.replace("\n", " ")))


def _differs_by_a_typo(words: tuple[str, ...], option: tuple[str, ...]) -> bool:
    """Whether the texts are equal but for one slip late in one long word.

    Medical opposites differ at the start (hyper-/hypo-, ab-/ad-, af-/ef-) or in short words (left, right, a grade), so
    the first five letters must be right and every other word, number and sign the same.
    """
    if len(words) != len(option):
        return False
    different = [(mine, theirs) for mine, theirs in zip(words, option, strict=True) if mine != theirs]
    if len(different) != 1:
        return False
    mine, theirs = different[0]
    if not (mine.isalpha() and theirs.isalpha()) or min(len(mine), len(theirs)) < _TYPO_MIN_LETTERS:
        return False
    return mine[:_TYPO_SAME_START] == theirs[:_TYPO_SAME_START] and OSA.distance(mine, theirs, score_cutoff=1) <= 1
