"""Completion text -> Answer: the only parser, for rewards and for evaluation alike.

    completion -> tags -> the region its mode allows -> one answer block -> readings -> a letter, or why not

A completion without any answer tag may still be nothing but an answer, as untrained models write it ("C"): it is read,
and `well_formed` says that it lacks the form. Where there is an answer tag, only the text inside it is read.

The reading is closed-world. A letter comes out only when the block as a whole is a letter, an option's text, or both in
agreement. Nothing is searched for inside words or sentences, so "none" holds no E and "normal" no "no"; two readings
that differ are no reading. The time it takes is linear in the length of the text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from medrl.errors import RewardError, SettingsError
from medrl.rewards.option_text import (
    ARTICLE,
    LABEL,
    clean,
    is_forgiven,
    options_as_written,
    options_named,
    same_text,
    trim,
    words_of,
)
from medrl.rewards.phrases import is_abstention, strip_lead_in, strip_tail
from medrl.types import LETTERS, MODES, Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was read out of a completion."""

    value: str | None
    """What was answered, in the form of ``Example.target``; None: unreadable, which counts as wrong."""
    raw: str = ""
    """Text inside the answer block, as written."""
    problem: str = ""
    """Why there is no value, in a few words; empty when there is one."""

    @property
    def letter(self) -> str | None:
        """The value of a choice."""
        return self.value


@dataclass(frozen=True, slots=True)
class Tag:
    """One ``<think>``, ``</think>``, ``<answer>`` or ``</answer>`` of a completion, in any case."""

    name: str
    """Lower case, with its slash: ``think``, ``/think``, ``answer`` or ``/answer``."""
    start: int
    end: int
    """Characters ``text[start:end]`` are the tag."""


_TAG = re.compile(r"(?ai)<(/?(?:think|answer))>")


def find_tags(text: str) -> list[Tag]:
    """All think and answer tags of ``text``, in order."""
    return [Tag(match[1].lower(), match.start(), match.end()) for match in _TAG.finditer(text)]


def parse_answer(text: str, options: Sequence[str], mode: Mode) -> Answer:
    """The option a completion chose.

    In ``think`` and ``no_think`` the answer stands after the last ``</think>``, in ``think_after`` before the first
    think tag; at most one ``<answer>...</answer>`` may stand there. A bare letter that is offered always means that
    option, even where another option's text is that letter. Never raises on any ``text``; raises `RewardError` for more
    than ten options and `SettingsError` for an unknown mode.
    """
    if len(options) > len(LETTERS):
        raise RewardError(
            f"{len(options)} options were given, but letters reach only {len(LETTERS)} (A to {LETTERS[-1]})"
        )
    block = find_block(text, mode)
    if block.problem:
        return Answer(value=None, problem=block.problem)
    index, problem = read_choice(block.text, options)
    if index is None:
        return Answer(value=None, raw=block.text, problem=problem if block.tagged else NO_BLOCK)
    return Answer(value=LETTERS[index], raw=block.text)


# ---- where the answer stands ---------------------------------------------------------------------------------------

NO_BLOCK = "no answer block"


@dataclass(frozen=True, slots=True)
class Block:
    """Where an answer may be read."""

    text: str
    problem: str = ""
    """Why there is no such place; ``text`` is then empty."""
    tagged: bool = True
    """Whether answer tags stand around it. Text without them is an answer only if it is nothing else."""


def find_block(text: str, mode: Mode) -> Block:
    """The text that holds the answer: between the answer tags, or all that is not reasoning where there are none.

    Raises `SettingsError` for an unknown mode.
    """
    if mode not in MODES:
        raise SettingsError(f"there is no mode {mode!r}; the modes are {', '.join(MODES)}")
    tags = find_tags(text)
    if not any(tag.name in ("answer", "/answer") for tag in tags):
        return _text_without_reasoning(text, tags, mode)
    inside, problem = _between_answer_tags(text, tags, mode)
    return Block(inside, problem)


def _text_without_reasoning(text: str, tags: list[Tag], mode: Mode) -> Block:
    reasoning = [tag for tag in tags if tag.name in ("think", "/think")]
    if not reasoning:
        rest = text
    elif mode == "think_after":
        rest = text[: reasoning[0].start]
    else:
        rest = text[reasoning[-1].end :] if reasoning[-1].name == "/think" else ""
    return Block(rest, tagged=False) if rest.strip() else Block("", NO_BLOCK)


def _between_answer_tags(text: str, tags: list[Tag], mode: Mode) -> tuple[str, str]:
    """The text of the one answer block, or ``""`` and the problem."""
    region = _tags_before_reasoning(tags) if mode == "think_after" else _tags_after_reasoning(tags)
    blocks = [tag for tag in region if tag.name in ("answer", "/answer")]
    names = [tag.name for tag in blocks]
    if blocks and any(tag.name == "think" and tag.start < blocks[-1].start for tag in region):
        return "", "answer inside the reasoning"
    if names == ["answer", "/answer"]:
        return text[blocks[0].end : blocks[1].start], ""
    if names.count("answer") > 1 or names.count("/answer") > 1:
        return "", "several answer blocks"
    if "answer" in names:
        return "", "answer block is not closed"
    if "/answer" in names:
        return "", "answer block is not opened"
    where = "before" if mode == "think_after" else "after"
    return "", f"answer is not {where} the reasoning"


def _tags_after_reasoning(tags: list[Tag]) -> list[Tag]:
    closed = [position for position, tag in enumerate(tags) if tag.name == "/think"]
    return tags[closed[-1] + 1 :] if closed else tags


def _tags_before_reasoning(tags: list[Tag]) -> list[Tag]:
    reasoning = [position for position, tag in enumerate(tags) if tag.name in ("think", "/think")]
    return tags[: reasoning[0]] if reasoning else tags


# ---- what the block says -------------------------------------------------------------------------------------------

_LAST_LETTER = re.compile(
    r"""(?: [\s,;:]*[(\[]\s?(?:(?:option|choice|answer)[\s:]{1,2})?([a-z])\s?[)\]]
          | (?:(?:[,;:=]|\s-|\n)\s?|\.\s)(?:(?:option|choice|answer)[\s:]{1,2})?([a-z])
          | (?:\.|,?(?:\swhich)?\sis)\s(?:the\s)?(?:option|choice|answer)(?:\sis)?[\s:]{1,2}([a-z])
        )[\s.!*_"'`]*\Z""",
    re.VERBOSE,
)
_LAST_LETTER_CHARS = 32
_BEHIND_LETTER = re.compile(r"\A[)\].:,\s]*(?:[-=]+>|=)?")
_STRUCK_OUT = re.compile(r"(?ais)~~[^~]*~~|<(del|strike)>.*?</\1>")
SPARE_CHARS = 400
"""How much longer than twice the longest option an answer may be: room for a lead-in, markup and blanks."""


def read_choice(raw: str, options: Sequence[str]) -> tuple[int | None, str]:
    """Index of the option that the text ``raw`` is, or None and the problem.

    All readings are collected: the block as an option's text, as ``letter text`` and as ``text (letter)``. An option is
    chosen when the readings that make sense all name the same one.
    """
    raw = raw.strip()
    # Nothing that long is an option; and Unicode normalization takes quadratic time on a run of combining marks.
    if len(raw) > SPARE_CHARS + 2 * max(map(len, options), default=0):
        return None, "answer is too long"
    text = clean(_STRUCK_OUT.sub(" ", raw))
    if not text:
        return None, "empty answer"
    letter = _bare_letter(text)
    if letter is not None and letter < len(options):
        return letter, ""
    body = strip_lead_in(text)
    # As written beats any lead-in: "It is normal" may be one option and "Normal" another.
    readings = set(options_as_written(raw, options) or options_named(text, options) + _options_said(body, options))
    for said in {body, strip_tail(body)}:
        readings.update(_letter_then_text(said, options), _text_then_letter(said, options))
    if not readings:
        readings.update(_options_said(strip_tail(body), options))
    if len(readings) == 1:
        return readings.pop(), ""
    return None, "names several options" if readings else _say_why_unreadable(body, options)


def _options_said(text: str, options: Sequence[str]) -> list[int]:
    """Options that ``text`` names by a letter alone or by their text alone."""
    letter = _bare_letter(text)
    if letter is not None and letter < len(options):
        return [letter]
    return options_named(text, options)


def _letter_then_text(text: str, options: Sequence[str]) -> list[int]:
    """The option of a text like ``C) CT`` whose letter and text agree."""
    split = _split_first_letter(text)
    if split is None or split[0] >= len(options):
        return []
    letter, rest = split
    bare = _BEHIND_LETTER.sub("", rest)
    if (written := options_as_written(bare, options)) and letter not in written:
        return []
    bodies = {rest, bare, strip_lead_in(bare)}
    again = _split_last_letter(bare)
    if again is not None and again[0] == letter:
        bodies.add(again[1])  # "C) CT (C)" only says its letter twice
    return [letter] if any(_agrees(letter, body, options) for body in bodies) else []


def _text_then_letter(text: str, options: Sequence[str]) -> list[int]:
    """The option of a text like ``CT (C)`` whose letter and text agree."""
    split = _split_last_letter(text)
    if split is None or split[0] >= len(options):
        return []
    letter, rest = split
    both_letters = _bare_letter(rest) not in (None, letter)  # "A, B" is two answers, even where B's text is "A"
    return [letter] if not both_letters and _agrees(letter, rest, options) else []


def _agrees(letter: int, text: str, options: Sequence[str]) -> bool:
    return same_text(text, options[letter]) or _options_said(text, options) == [letter]


def _bare_letter(text: str) -> int | None:
    """Position in the alphabet of a text that is one letter and forgiven punctuation; may lie beyond the options."""
    text = trim(text)
    return ord(text) - ord("a") if len(text) == 1 and "a" <= text <= "z" else None


def _split_first_letter(text: str) -> tuple[int, str] | None:
    start = next((i for i, char in enumerate(text) if not is_forgiven(char)), len(text))
    letter, rest = text[start : start + 1], text[start + 1 :]
    if not ("a" <= letter <= "z") or not rest:
        return None
    # Scripts written without spaces put the text right behind the letter ("C肺炎"); Latin text there makes it a word.
    if rest[0].isalnum() and rest[0] < "\u2e80":
        return None
    return ord(letter) - ord("a"), rest


def _split_last_letter(text: str) -> tuple[int, str] | None:
    offset = max(0, len(text) - _LAST_LETTER_CHARS)
    match = _LAST_LETTER.search(text, offset)
    if match is None or match.start() == 0:
        return None
    return ord(match[1] or match[2] or match[3]) - ord("a"), text[: match.start()]


# ---- why there is no letter ----------------------------------------------------------------------------------------


def _say_why_unreadable(body: str, options: Sequence[str]) -> str:
    words = words_of(body)
    plain = " ".join(words)
    if not words:
        return "empty answer"
    if is_abstention(plain):
        return "abstained"
    letters = {word for word in words if len(word) == 1 and "a" <= word < chr(ord("a") + len(options))}
    texts = [
        option for option in options if (inside := " ".join(words_of(clean(option)))) and f" {inside} " in f" {plain} "
    ]
    if len(letters) > 1 or len(texts) > 1:
        return "names several options"
    letter = _bare_letter(body)
    split = _split_last_letter(body) or (None if ARTICLE.match(body) else _split_first_letter(body))
    index = letter if letter is not None else split[0] if split else None
    # "I see" and "X-rays" begin with letters that nobody meant; "Z. PET" and "Z CT" say which one they mean.
    meant = letter is not None or texts or LABEL.match(body) or _split_last_letter(body)
    if index is None or (index >= len(options) and not meant):
        return "no option has this text"
    if index >= len(options):
        return f"letter {chr(ord('A') + index)} is not offered"
    return "letter and text disagree"
