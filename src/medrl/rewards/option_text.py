"""Whether a text is an option's text: what is forgiven in writing it, and what is not.

Forgiven: case, white space, Unicode form, markup, surrounding and inner punctuation, a leading article, hyphenation,
one slip late in one long word; ``CT`` or ``computed tomography`` for ``Computed tomography (CT)``, and ``none`` for
``None of the above``. Not forgiven: another missing or added word, and any other number or sign.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from rapidfuzz.distance import OSA

ARTICLE = re.compile(r"(?:an?|the) (?=[^\s(\[]\S)")
LABEL = re.compile(r"[\W_]*[a-z](?:\s?[)\].:,;=|*\n]|\s-\s)")
"""A letter set off as a label, as in ``C) CT``, at the start of a cleaned text."""

_ENTITIES = {"lt": "<", "gt": ">", "amp": "&", "nbsp": " ", "quot": '"', "#39": "'"}
_ENTITY = re.compile(r"(?ai)&(lt|gt|amp|nbsp|quot|#39);")
_MARKUP = re.compile(
    r"""(?ai)</?(?:b|i|u|p|a|br|em|strong|span|code|pre|div|sup|mark|font|center|small|big|li|ul|ol|h[1-6]|table|tr|td)
        (?:\s[^<>]{0,80}=[^<>]{0,80})?\s{0,9}/?>
      | <\|[a-z0-9_]{1,40}\|> | <(?:bos|eos|pad|(?:start|end)_of_turn)>""",
    re.VERBOSE,
)
"""Tags that only change how a text looks, and the tokens by which models begin and end a turn."""
_SUBSCRIPT = re.compile(r"(?ai)</?sub>")
_DASHES = re.compile(r"[\u2010-\u2015\u2212\ufe58\ufe63\uff0d]")
_SPACES = re.compile(r"\s+")
# Signs and decimal points carry meaning ("HER2-", "-5", "> 5 mm", "1.5 T"); other punctuation does not.
_WORD = re.compile(
    r"(?:(?<![^\W_])[-.](?=\d))?[^\W_]+(?:(?<=\d)[-.,:/](?=\d)[^\W_]+)*(?:-(?![^\W_]))?|[<>=±≤≥+%]",
)
_JOINT = re.compile(r"(?<=[^\W\d_])[ -](?=[^\W_])|(?<=\d)[ -](?=[^\W\d_])")
_BRACKETED = re.compile(r"([^()\[\]]*[^()\[\]\s])\s?[(\[]([^()\[\]]+)[)\]]?[\s.]*")
"""``long form (short form)``; some data sets leave the closing bracket out."""
_ABOVE = r"(?: of)?(?: (?:the|these|those|them))?(?: (?:above|given|listed|options|choices|answers))*"
_OF_THE_ABOVE = {
    "none of the above": re.compile(rf"(?:none|neither)(?:{_ABOVE}| a nor b)|以上都不是|以上均不是|以上皆非|都不是"),
    "all of the above": re.compile(rf"all{_ABOVE}|以上都是|以上均是|以上皆是"),
    "both of the above": re.compile(rf"both{_ABOVE}|both a and b"),
}
_BARE = frozenset({"none", "neither", "all", "both"})
"""What may stand alone for the option that begins with it."""
_DENIALS = frozenset({"no", "none", "not", "absent", "negative", "false", "excluded", "not present", "not seen"})
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
    names = _names(text)
    if named := [i for i, option in enumerate(options) if names & _names_of_option(option)]:
        return [] if len(named) == 1 and names & _denied_in(options[named[0]]) else named
    words = words_of(clean(text))
    return [i for i, option in enumerate(options) if _differs_by_a_typo(words, words_of(clean(option)))]


def same_text(text: str, option: str) -> bool:
    """Whether ``text`` is the option's text by any comparison but the one that forgives a slip."""
    return any(mine and mine == theirs for mine, theirs in zip(_keys(text), _option_keys(option), strict=True))


def says_all(cleaned: str) -> bool:
    """Whether a cleaned text is ``all of the above`` in any of its wordings."""
    return _OF_THE_ABOVE["all of the above"].fullmatch(" ".join(words_of(cleaned))) is not None


def clean(text: str) -> str:
    """Case, Unicode form, dashes, entities, simple markup and white space made alike; a line break stays one."""
    text = _ENTITY.sub(lambda match: _ENTITIES[match[1].lower()], text)
    text = _SUBSCRIPT.sub("", _MARKUP.sub(" ", unicodedata.normalize("NFKC", text)))
    text = unicodedata.normalize("NFKC", text.casefold())
    text = _DASHES.sub("-", text).strip().removeprefix("<s>")
    while text.endswith("</s>"):  # it ends a turn; elsewhere it is the end of a stroke through a text
        text = text.removesuffix("</s>").rstrip()
    text = text.strip()
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
    """Punctuation, brackets, blanks, check marks, what is invisible; not the signs and dashes that change a meaning."""
    category = unicodedata.category(char)
    return (
        char in "`$|~^✓✔✅☑\ufe0f"
        or (category[0] in "PZ" and category != "Pd" and char != "%")
        or category in ("Cc", "Cf")
    )


def _as_written(text: str) -> str:
    return " ".join(text.split()).casefold()


def _keys(text: str) -> tuple[object, ...]:
    """What a text is compared by, strictest first; a key that is empty matches nothing."""
    cleaned = clean(text)
    return (
        _SPACES.sub(" ", trim(cleaned)),
        words_of(cleaned),
        _joined_words(cleaned),
        _without_article(cleaned),
    )


_option_keys = lru_cache(maxsize=4096)(_keys)


def _options_with_key(level: int, keys: tuple[object, ...], options: Sequence[str]) -> list[int]:
    return [i for i, option in enumerate(options) if keys[level] and _option_keys(option)[level] == keys[level]]


def _joined_words(cleaned: str) -> tuple[str, ...]:
    """Words with blanks and hyphens inside them closed up, so that ``X-ray``, ``X ray`` and ``Xray`` are one word."""
    if sum(len(word) == 1 and word.isalpha() for word in words_of(cleaned)) > 1:
        return ()  # "A B" are two letters, not the blood group AB
    return words_of(_JOINT.sub("", cleaned.replace("\n", " ")))


def _names(text: str) -> frozenset[object]:
    """What a text may be called besides its own words; texts that have one of these in common mean the same.

    ``none``, ``all`` and ``both`` of the above in any of their wordings; and of ``long form (short form)``, as an
    option, either of the two. An answer that gives two must give the option's two, unless one of them is made of the
    other's initials.
    """
    cleaned = clean(text)
    plain = " ".join(words_of(cleaned))
    names: set[object] = {group for group, wording in _OF_THE_ABOVE.items() if wording.fullmatch(plain)}
    names |= {plain} & _BARE
    names |= {_without_article(cleaned)} | ({plain.removeprefix("both ")} if " and " in plain else set())
    if match := _BRACKETED.fullmatch(cleaned):
        outer, inner = _without_article(match[1]), _without_article(match[2])
        names.add(frozenset((outer, inner)))
        if any(len(words) == 1 and words[0] == _initials(of) for words, of in ((inner, match[1]), (outer, match[2]))):
            names |= {outer, inner}
    return frozenset(names) - {"", ()}


@lru_cache(maxsize=4096)
def _names_of_option(option: str) -> frozenset[object]:
    names = set(_names(option))
    if match := _BRACKETED.fullmatch(clean(option)):
        inner = _without_article(match[2])
        if sum(map(len, inner)) > 1:  # one letter in brackets is a grade or a label, not a name
            names.add(inner)
        names |= {_without_article(match[1]), _without_article(f"{match[2]} {match[1]}")}
    first = words_of(clean(option))[:1]
    return frozenset(names | set(first) & _BARE) - {()}


def _denied_in(option: str) -> frozenset[object]:
    """What the brackets of ``Fracture (absent)`` deny."""
    match = _BRACKETED.fullmatch(clean(option))
    if match is None or " ".join(words_of(match[2])) not in _DENIALS:
        return frozenset()
    return frozenset({_without_article(match[1])})


def _initials(cleaned: str) -> str:
    words = words_of(cleaned)
    return "".join(word[0] for word in words) if len(words) > 1 else ""


def _without_article(cleaned: str) -> tuple[str, ...]:
    return _joined_words(ARTICLE.sub("", cleaned, count=1) if ARTICLE.match(cleaned) else cleaned)


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
