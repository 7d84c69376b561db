"""Answers of two closed kinds: several options, and yes or no."""

import re
from collections.abc import Sequence

from medrl.rewards.option_text import clean, trim, words_of
from medrl.rewards.parse import read_choice, strip_lead_in
from medrl.types import LETTERS

_SEPARATORS = (r"[\n;；]", r"[\n;；,，、/&|+]", r"[\n;；,，、/&|+]|(?i:\band\b)|和|及|与")
_YES = frozenset({"yes", "true", "是", "是的", "有", "对", "对的", "はい"})
_NO = frozenset({"no", "false", "否", "不是", "没有", "无", "不", "いいえ"})
_REASON = re.compile(r"(yes|no)\s?[,.;:\n-]\s?(?=\S)")


def read_multi_select(text: str, options: Sequence[str]) -> tuple[str | None, str]:
    """Letters of the options that ``text`` lists, in their order and joined by ``, ``; or None and the problem.

    Options are listed by letter, by text, or both, separated by commas, semicolons, line breaks or ``and``; letters
    also without anything between them, in alphabetical order (``ACD``). One piece that is no option spoils the list.
    """
    chosen, problem = _options_listed(text, options)
    if chosen is None:
        return None, problem
    return ", ".join(LETTERS[index] for index in sorted(chosen)), ""


def _options_listed(text: str, options: Sequence[str]) -> tuple[set[int] | None, str]:
    body = strip_lead_in(clean(text))
    # Letters mean the options they stand for, even where an option's own text is a letter: "A, C" is two of them.
    listed = [trim(piece) for piece in re.split(r"[,;\n]", body)]
    if len(listed) > 1 and all(len(piece) == 1 and "a" <= piece < chr(ord("a") + len(options)) for piece in listed):
        return {ord(piece) - ord("a") for piece in listed}, ""
    whole, problem = read_choice(text, options)
    if whole is not None:
        return {whole}, ""
    letters = [ord(char) - ord("a") for char in trim(body)]
    if letters == sorted(set(letters)) and letters and letters[0] >= 0 and letters[-1] < len(options):
        return set(letters), ""
    for separator in _SEPARATORS:
        pieces = [piece for piece in re.split(separator, body) if piece and not piece.isspace()]
        read = [read_choice(piece, options) for piece in pieces]
        if len(pieces) > 1 and all(index is not None for index, _ in read):
            return {index for index, _ in read if index is not None}, ""
    return None, "not a list of options" if problem == "names several options" else problem


def read_yes_no(text: str, options: Sequence[str]) -> tuple[str | None, str]:
    """``yes`` or ``no``, or None and the problem.

    The whole text is yes or no (also true or false, and Chinese or Japanese for them), or begins so and goes on after
    a comma or stop without saying the other. Where options are shown, their letters count too.
    """
    if options:
        index, problem = read_choice(text, options)
        if index is not None:
            text = options[index]
        elif problem == "names several options":
            return None, problem
    body = strip_lead_in(clean(text))
    word = trim(body)
    if word in _YES | _NO:
        return ("yes" if word in _YES else "no"), ""
    reason = _REASON.match(body)
    if reason is None:
        return None, "empty answer" if not word else "neither yes nor no"
    other = {"yes": "no", "no": "yes"}[reason[1]]
    if other in words_of(body):
        return None, "says yes and no"
    return reason[1], ""
