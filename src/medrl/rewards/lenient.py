"""A forgiving reading, for figures beside the strict ones: what a patient examiner would still count.

It finds an answer where the strict parser refuses to look, but never guesses: no random option, no most similar text.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from medrl.rewards.kinds import read_answer
from medrl.rewards.option_text import clean, words_of
from medrl.rewards.parse import Answer, find_tags
from medrl.types import LETTERS, Completion, Example, Mode

_SAID = re.compile(
    r"(?i:\b(?:answer|option|choice)\b(?:\s+(?:is|would be))?)\s*[:=]?\s*[*_(\[\"']*([A-J])(?![\w'’])|[(\[]([A-J])[)\]]"
)
# "A" before a word is an article and "I" a pronoun, but in "A or C" they are letters.
_ALONE = re.compile(r"(?<![\w'’])([B-HJ]|[AI](?!\s+(?!(?:or|and)\b)\w))(?![\w'’])")
_DENIED = re.compile(
    r"\b(?:not|no|non|never|neither|nor|without|except|wrong|incorrect|false|unlikely|cannot|\w+n t|excluded?"
    r"|reject(?:ed)?|rules? out|ruled out|(?:anything|all|everything) but)\b"
)
"""Words, as ``words_of`` gives them, beside which a named option may be the one that is ruled out."""
_COMPARED = re.compile(r"\b(?:unlike|than|versus|vs|instead|rather|compared|whereas|while|although)\b")
_BEFORE_LETTER = re.compile(r"[\W_]*(?:(?:is|option|choice|answer|the|correct|so|therefore|which)[\W_]+)*\Z")
_BEHIND_LETTER = re.compile(r"\A[\W_]*(?:(?:is|which|it|this|an?|the)[\W_]+)*")
_MAX_CHARS = 20_000
_NEAR_CHARS, _MAX_SAID = 400, 20
"""How far beside a letter another option's text is looked for, and beside how many of the last letters."""


def read_leniently(example: Example, completion: Completion) -> Answer:
    """The strict answer; else that of the last answer block; else the one option that the final text names.

    The final text is what follows the reasoning (in ``think_after``: comes before it), or everything where that is
    empty. An option is named by a lone capital or by its text; where several are named, ``the answer is C`` decides,
    and two such that differ leave it unread; so does another option's text right beside it (``Option C, MRI``) or as
    the only one that the text names, and a denial (``not C``, ``C is wrong``). For kinds other than choices only the
    last block is tried.
    """
    strict = read_answer(example, completion)
    if strict.value is not None:
        return strict
    for block in reversed(_blocks(completion.text)):
        answer = read_answer(example, replace(completion, text=f"<answer>{block}</answer>", mode="no_think"))
        if answer.value is not None:
            return answer
    if example.kind != "choice":
        return strict
    for text in _final_texts(completion.text, completion.mode):
        named = _named(text[-_MAX_CHARS:], example.options)
        if len(named) == 1:
            return Answer(value=LETTERS[named.pop()], raw=text)
    return strict


def _blocks(text: str) -> list[str]:
    """Texts behind each opening answer tag, up to the next tag or the end."""
    tags = find_tags(text)
    edges = [*(tag.start for tag in tags), len(text)]
    return [text[tag.end : edges[place + 1]] for place, tag in enumerate(tags) if tag.name == "answer"]


def _final_texts(text: str, mode: Mode) -> list[str]:
    tags = [tag for tag in find_tags(text) if tag.name in ("think", "/think")]
    if not tags:
        return [text]
    final = text[: tags[0].start] if mode == "think_after" else text[tags[-1].end :]
    return [final, text] if final.strip() else [text]


def _named(text: str, options: Sequence[str]) -> set[int]:
    """Options that ``text`` names; where it says what the answer is, only those it says so of."""
    plain = f" {' '.join(words_of(clean(text)))} "
    by_text = _in_words(plain, options)
    rest = _without(plain, options)
    denied = _DENIED.search(rest)
    matches = [match for match in _SAID.finditer(text) if LETTERS.index(match[1] or match[2]) < len(options)]
    if matches:
        said = {LETTERS.index(match[1] or match[2]) for match in matches}
        said.update(*(_beside(text, match, options) for match in matches[-_MAX_SAID:]))
        return said | (by_text if len(by_text) == 1 and not denied and not _COMPARED.search(rest) else set())
    if denied:
        return set()
    return by_text | _offered((match[1] for match in _ALONE.finditer(text)), options)


def _in_words(plain: str, options: Sequence[str]) -> set[int]:
    """Options whose words stand in the text. "Lung" stands also where "left lung" does: the longer one is meant."""
    return _longest({i for i, option in enumerate(options) if (words := _joined(option)) and words in plain}, options)


def _longest(named: set[int], options: Sequence[str]) -> set[int]:
    return {i for i in named if not any(i != j and _joined(options[i]) in _joined(options[j]) for j in named)}


def _beside(text: str, match: re.Match[str], options: Sequence[str]) -> set[int]:
    """Options whose words end right before the letter that was said, or begin right behind it."""
    start, end = match.span()
    before = _BEFORE_LETTER.sub("", text[max(0, start - _NEAR_CHARS) : start].casefold())
    behind = _BEHIND_LETTER.sub("", text[end : end + _NEAR_CHARS].casefold(), count=1)
    before, behind = (f" {' '.join(words_of(clean(near)))} " for near in (before, behind))
    ends = {i for i, option in enumerate(options) if (words := _joined(option)) and before.endswith(words)}
    begins = {i for i, option in enumerate(options) if (words := _joined(option)) and behind.startswith(words)}
    return _longest(ends, options) | _longest(begins, options)


def _without(plain: str, options: Sequence[str]) -> str:
    """The text without the options' own words: "no finding" may be one of them."""
    for option in sorted(map(_joined, options), key=len, reverse=True):
        plain = plain.replace(option, " ") if option else plain
    return plain


def _joined(option: str) -> str:
    words = " ".join(words_of(clean(option)))
    return f" {words} " if words else ""


def _offered(letters: Iterable[str], options: Sequence[str]) -> set[int]:
    return {index for letter in letters if (index := LETTERS.index(letter)) < len(options)}
