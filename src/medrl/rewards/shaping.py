"""Parts beside right and well formed: length, repetition, and whether reasoning and answer belong together.

Each is a weak signal that a policy can learn to please; give it a small weight and watch its curve.
"""

import re
from collections.abc import Callable, Sequence

from medrl.rewards.kinds import read_answer
from medrl.rewards.option_text import clean, words_of
from medrl.rewards.parse import find_tags, read_choice
from medrl.types import LETTERS, Completion, Example

_SENTENCE_END = re.compile(r"[.!?]\s+|[。！？；;\n]+")
# "The answer is a tumor" names no option: before another word, "a" is an article.
_LETTER = r"(a(?!\s+(?!because\b|since\b|as\b)\w)|[b-j])(?![\w'’])"
_LETTER_SAID = re.compile(
    r"\b(?:option|choice)(?:\s+(?:is|would be))?[\s:=*(\[]*([a-j])(?![\w'’])"
    rf"|\banswer(?:\s+(?:is|would be))?[\s:=*(\[]*{_LETTER}"
    rf"|\b(?:choose|pick|select)\s+{_LETTER}"
    r"|[(\[]([a-j])[)\]]"
)
_DENIAL = re.compile(
    r"\b(?:not|no|neither|nor|never|without|unlike|cannot|isn't|doesn't|exclud\w*|rules? out|ruled out)\b"
)
_MAX_CHARS = 20_000


def brief_up_to(words: int, zero_at: int) -> Callable[[Example, Completion], float]:
    """A part that is 1.0 up to ``words`` words and falls in a straight line to 0.0 at ``zero_at``, tags included."""

    def brief(example: Example, completion: Completion) -> float:
        length = len(completion.text.split())
        return min(1.0, max(0.0, (zero_at - length) / (zero_at - words)))

    return brief


brief = brief_up_to(120, 240)
"""`brief_up_to` with room to spare: the papers' completions settle at 60 to 85 tokens."""


def no_repetition(example: Example, completion: Completion) -> float:
    """Share of the runs of four words that are distinct; 1.0 where there are fewer than five words.

    In the reasoning, so that an answer may repeat it; in the whole completion where there is no reasoning.
    """
    words = words_of(clean((reasoning_of(completion) or completion.text)[:_MAX_CHARS]))
    runs = list(zip(*(words[start:] for start in range(4)), strict=False))
    return len(set(runs)) / len(runs) if len(runs) > 1 else 1.0


def reasoning_of(completion: Completion) -> str:
    """Text between the first opening and the last closing think tag; empty where there is no such pair."""
    tags = find_tags(completion.text)
    opened = next((tag.end for tag in tags if tag.name == "think"), None)
    closed = next((tag.start for tag in reversed(tags) if tag.name == "/think"), None)
    return "" if opened is None or closed is None or closed < opened else completion.text[opened:closed]


def implied_option(reasoning: str, options: Sequence[str]) -> str | None:
    """Letter of the option that a reasoning comes out at; None where it comes out at none, or at several.

    The last sentence that names an option without denying it decides; it must name one only. An option is named by its
    text or as ``option C``, ``the answer is C``, ``(C)``. The longest of nested texts counts: "left lung" over "lung".
    """
    for sentence in reversed(_SENTENCE_END.split(reasoning[-_MAX_CHARS:])):
        text = clean(sentence)
        named = _options_in(text, options)
        if named and not _DENIAL.search(_without(text, options)):
            return LETTERS[named.pop()] if len(named) == 1 else None
    return None


def think_agrees(example: Example, completion: Completion) -> float:
    """1.0 if the reasoning comes out at the option that is answered; 0.0 if at another, at none, or without an answer.

    For questions without options: if the reasoning holds the words of the answer. 1.0 where no reasoning is asked for.
    """
    if completion.mode == "no_think":
        return 1.0
    answer, reasoning = read_answer(example, completion).value, reasoning_of(completion)
    if answer is None:
        return 0.0
    if example.kind == "choice":
        return float(implied_option(reasoning, example.options) == answer)
    if example.kind == "multi_select":
        texts = [example.options[LETTERS.index(letter)] for letter in answer.split(", ")]
        return float(all(_holds(reasoning, text) for text in texts))
    return float(_holds(reasoning, answer))


def names_option(example: Example, completion: Completion) -> float:
    """1.0 if the words of the option that is answered stand in the completion, not its letter alone; else 0.0.

    For questions without options, and where only the letter is asked for (``no_think``): 1.0 for any readable answer.
    """
    answer = read_answer(example, completion).value
    if answer is None:
        return 0.0
    if example.kind not in ("choice", "multi_select") or completion.mode == "no_think":
        return 1.0
    texts = [example.options[LETTERS.index(letter)] for letter in answer.split(", ")]
    return float(all(_holds(completion.text, text) for text in texts))


def _options_in(text: str, options: Sequence[str]) -> set[int]:
    whole, _ = read_choice(text, options)
    if whole is not None:
        return {whole}
    plain = _plain(text)
    named = [_plain(clean(option)) for option in options]
    by_text = {i for i, words in enumerate(named) if _stands_in(words, plain)}
    longest = {i for i in by_text if not any(named[i] != named[j] and _stands_in(named[i], named[j]) for j in by_text)}
    letters = [next(filter(None, match.groups())) for match in _LETTER_SAID.finditer(text)]
    said = {index for letter in letters if (index := ord(letter) - ord("a")) < len(options)}
    return longest | said


def _without(text: str, options: Sequence[str]) -> str:
    """``text`` without the options' own words: the "no" of the option "no fracture" denies nothing."""
    plain = f" {_plain(text)} "
    for words in sorted((_plain(clean(option)) for option in options), key=len, reverse=True):
        plain = plain.replace(f" {words} ", "  ") if words else plain
    return plain


def _holds(text: str, part: str) -> bool:
    return _stands_in(_plain(clean(part)), _plain(clean(text[:_MAX_CHARS])))


def _stands_in(words: str, plain: str) -> bool:
    """Whether the words stand in the text as words; in scripts without blanks, as characters."""
    if any(char >= "\u2e80" for char in words):
        return words in plain
    return bool(words) and f" {words} " in f" {plain} "


def _plain(cleaned: str) -> str:
    return " ".join(words_of(cleaned))
