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
_MAX_CHARS = 20_000


def read_leniently(example: Example, completion: Completion) -> Answer:
    """The strict answer; else that of the last answer block; else the one option that the final text names.

    The final text is what follows the reasoning (in ``think_after``: comes before it), or everything where that is
    empty. An option is named by a lone capital or by its text; where several are named, ``the answer is C`` decides,
    and two such that differ leave it unread; so does a denial (``not C``, ``C is wrong``). For kinds other than choices
    only the last block is tried.
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
    said = _offered((match[1] or match[2] for match in _SAID.finditer(text)), options)
    if said:
        return said
    plain = f" {' '.join(words_of(clean(text)))} "
    by_text = {index for index, option in enumerate(options) if (words := _joined(option)) and words in plain}
    if _DENIED.search(_without(plain, options)):
        return set()
    # "Lung" stands also where "left lung" does: the longer one is meant.
    longest = {i for i in by_text if not any(i != j and _joined(options[i]) in _joined(options[j]) for j in by_text)}
    alone = _offered((match[1] for match in _ALONE.finditer(text)), options)
    return longest | alone


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
