"""Options inside a question: ``What is it? A)CT, B)MRI`` -> the question and its options.

Files differ in how they letter options and in what stands between them; commas, brackets and even ``B)`` may stand
inside an option. So every way of lettering is tried, and within one every chain of letters that keeps their order.
"""

import re

from medrl.data.readers.rows import RowError
from medrl.types import LETTERS

_GAP = r"([ \t\u00a0]*)"
_STYLES = (
    rf"(?<![A-Z0-9_(（\[])([A-J])[ \t]?[)）]{_GAP}",
    rf"[(（\[]([A-J])[)）\]]{_GAP}",
    rf"(?<![\w.])([A-J])[.．、]{_GAP}(?=\S)",
    rf"(?<!\w)([A-J])[:：]{_GAP}",
)
"""``A) x`` or ``A)x``, ``(A) x`` or ``[A] x``, ``A. x``, ``A: x``; group 1 is the letter, group 2 the blanks behind."""
_SMALL = [style.replace("A-J", "a-j").replace("A-Z", r"\w") for style in _STYLES]
_WAYS = [(re.compile(style), True) for style in (*_STYLES, *_SMALL)] + [(re.compile(style), False) for style in _STYLES]
_BETWEEN = ",;|/，；"
_SEPARATED = re.compile(rf"(?:^|[{_BETWEEN}\n])\s*$")
_SENTENCE_OVER = re.compile(r"(?:^|[?？.。!:：\n])\s*$")
_END_OF_OPTION = re.compile(rf"\s*[{_BETWEEN}]*\s*$")
_HEADING = re.compile(r"\s*\b(?:answer choices|options|choices)\s*[:：]\s*$", re.IGNORECASE)
_MOST_CHAINS = 1000

Chain = list[re.Match[str]]


def split_inline(problem: str) -> tuple[str, tuple[str, ...]]:
    """The question and its options.

    Letters behind a comma, semicolon or line break are looked for first, capitals before small ones, then capitals
    anywhere. Of all ways to read the letters in order, those with most options win; then those whose marks are all
    spaced alike; then those that begin where a sentence is over, or else a part of one; then those that leave every
    option's brackets closed.

    Raises:
        RowError: it holds no options, or two readings are still left.
    """
    for style, strict in _WAYS:
        chains = _chains(problem, list(style.finditer(problem)), strict)
        if chains:
            return _read_chain(problem, _best_chain(problem, chains))
    raise RowError("holds no options: expected A)..., B)... after the question")


def _chains(problem: str, marks: Chain, strict: bool) -> list[Chain]:
    """Every longest way through the marks in the order of their letters, from A to at least B.

    Args:
        strict: after A, a mark counts only behind a comma, semicolon or line break.
    """
    counted = [mark for mark in marks if mark[1] in "Aa" or not strict or _SEPARATED.search(problem[: mark.start()])]
    chains: list[Chain] = [[mark] for mark in counted if mark[1] in "Aa"]
    longest: list[Chain] = []
    for letter in LETTERS[1:]:
        chains = [
            [*chain, mark]
            for chain in chains
            for mark in counted
            if mark[1].upper() == letter
            and mark.start() >= chain[-1].end()
            and problem[chain[-1].end() : mark.start()].strip(_BETWEEN + " \n\r\t\u00a0")
        ]
        if not chains or len(chains) > _MOST_CHAINS:
            break
        longest = chains
    return longest


def _best_chain(problem: str, chains: list[Chain]) -> Chain:
    def score(chain: Chain) -> tuple[bool, bool, bool, int, int]:
        alike = len({mark[2] for mark in chain}) == 1
        before = problem[: chain[0].start()]
        over, parted = bool(_SENTENCE_OVER.search(before)), bool(_SEPARATED.search(before))
        options = _read_chain(problem, chain)[1]
        return (
            alike,
            over,
            over or parted,
            sum(option.count("(") == option.count(")") for option in options),
            chain[0].start(),
        )

    ranked = sorted(chains, key=score, reverse=True)
    if len(ranked) > 1 and score(ranked[0]) == score(ranked[1]):
        readings = [" | ".join(_read_chain(problem, chain)[1]) for chain in ranked[:2]]
        raise RowError(f"its options can be read in more than one way: {readings[0]!r} or {readings[1]!r}")
    return ranked[0]


def _read_chain(problem: str, chain: Chain) -> tuple[str, tuple[str, ...]]:
    ends = [mark.start() for mark in chain[1:]] + [len(problem)]
    # The comma before the next letter separates; it is no part of the option.
    options = (_END_OF_OPTION.sub("", problem[mark.end() : end]) for mark, end in zip(chain, ends, strict=True))
    question = _HEADING.sub("", problem[: chain[0].start()])
    return question.strip(), tuple(option.strip() for option in options)
