"""Answers of two closed kinds: several options, and yes or no."""

import re
from collections.abc import Sequence

from medrl.rewards.option_text import clean, says_all, trim, words_of
from medrl.rewards.parse import SPARE_CHARS, read_choice
from medrl.rewards.phrases import strip_lead_in, strip_phrases, strip_tail
from medrl.types import LETTERS

_SEPARATORS = (
    r"[\n;；]",
    r"[\n;；,，、/&|+]",
    r"[\n;；,，、/&|+]|(?i:\b(?:and|plus|as\swell\sas)\b)|和|及|与",
    r"[\n;；,，、/&|+]|(?i:\b(?:and|plus|as\swell\sas)\b)|\s(?=\(?[a-j][).:]\s)",
)
_AROUND_LIST = re.compile(r"\A(?:(?:both|only)\s)+|\s(?:only|both)[\s.]*\Z")
_YES = frozenset({"yes", "true", "yeah", "yep", "是", "是的", "有", "对", "对的", "はい"})
_NO = frozenset({"no", "false", "nope", "否", "不是", "没有", "无", "不", "いいえ"})
_SUBJECT = r"(?:it|there|this|that|they|he|she)\s(?:is|are|does|do|has|have|was)"
_REASON = re.compile(
    rf"""([^\W\d_]+)(?: \s?[,.;:!\n(\[。、-]+\s?(?=\S) | \s(?=(?:because|since|as|due)\s)
                     | (\s)(?={_SUBJECT}(?![^\W_])) )""",
    re.VERBOSE,
)
_DENIED = re.compile(rf"{_SUBJECT}(?:n['’]t|\snot|\sno)(?![^\W_])")
_ECHO = re.compile(rf"{_SUBJECT}(n['’]t|\snot)?[\s.!]*")
_DOUBT = re.compile(
    r"""\b(?: (?:un(?:clear|sure|certain|known|determined|decided)|indeterminate|inconclusive)
              (?=[\s.!)]*(?:\Z|[,;:.]|if|whether))
            | maybe | perhaps | possibly | probably | might | may | could\sbe
            | not\s(?:sure|certain|clear|known|possible)
            | (?:cannot|can['’]t|can\snot)\s(?:tell|say|be\s(?:sure|certain|determined|excluded|ruled))
            | (?:do\snot|don['’]t)\sknow | (?:hard|difficult)\sto\s(?:say|tell|see|assess|determine)
            | wait | correction | on\ssecond\sthought | neither | depends )(?![^\W_])""",
    re.VERBOSE,
)
"""Behind yes or no: leaves it open, or takes it back."""
_TAKEN_BACK = re.compile(
    r"not(?:\s(?:really|quite|exactly|at\sall))?[\s.!]*\Z|(?:that\sis\s)?(?:wrong|incorrect)[\s.!]*\Z"
)


def read_multi_select(text: str, options: Sequence[str]) -> tuple[str | None, str]:
    """Letters of the options that ``text`` lists, in their order and joined by ``, ``; or None and the problem.

    Options are listed by letter, by text, or both, separated by commas, semicolons, line breaks or ``and``; letters
    also by blanks (``C A``), or without anything between them in alphabetical order (``ACD``). ``All of the above`` is
    all of them where no option says so itself. One piece that is no option spoils the list.
    """
    chosen, problem = _options_listed(text, options)
    if chosen is None:
        return None, problem
    return ", ".join(LETTERS[index] for index in sorted(chosen)), ""


def _options_listed(text: str, options: Sequence[str]) -> tuple[set[int] | None, str]:
    if len(text) > SPARE_CHARS + 2 * sum(map(len, options)):
        return None, "answer is too long"
    body = _AROUND_LIST.sub("", strip_phrases(clean(text)))
    body = re.sub(r"\)\s?(?=\()", "), ", body)  # "(A)(C)"
    # Letters mean the options they stand for, even where an option's own text is a letter: "A, C" is two of them.
    for separator in (r"[,;\n]", r"\s"):
        listed = [trim(piece) for piece in re.split(separator, body)]
        if len(listed) > 1 and all(len(piece) == 1 and "a" <= piece < chr(ord("a") + len(options)) for piece in listed):
            return {ord(piece) - ord("a") for piece in listed}, ""
    whole, problem = read_choice(text, options)
    if whole is not None:
        return {whole}, ""
    if says_all(body) and options:
        return set(range(len(options))), ""
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

    The whole text is yes or no (also true or false, and Chinese or Japanese for them), or begins so and goes on
    (``Yes, there is``, ``No: it is clear``) without saying the other, without doubt and without taking it back. Where
    options are shown, their letters count too.
    """
    if options:
        index, problem = read_choice(text, options)
        if index is not None:
            text = options[index]
        elif problem == "names several options":
            return None, problem
    body = strip_lead_in(clean(text))
    word = trim(strip_tail(body))
    if word in _YES | _NO:
        return ("yes" if word in _YES else "no"), ""
    reason = _REASON.match(body)
    if reason is None or reason[1] not in _YES | _NO:
        return None, "empty answer" if not word else "neither yes nor no"
    said, rest = ("yes" if reason[1] in _YES else "no"), body[reason.end() :].lstrip(" .")
    if _says_other(said, rest) or (reason[2] and bool(_DENIED.match(rest)) == (said == "yes")):
        return None, "says yes and no"
    return (None, "doubts its answer") if _DOUBT.search(rest) else (said, "")


def _says_other(said: str, rest: str) -> bool:
    """Whether what stands behind yes or no says the other: in a word, or as ``it is`` and ``it is not`` do."""
    others = _NO if said == "yes" else _YES
    if others & set(words_of(rest)) or (said == "yes" and _TAKEN_BACK.match(rest)):
        return True
    if any(other in rest.replace("没有", "" if said == "no" else "没有") for other in others if other >= "\u2e80"):
        return True
    echo = _ECHO.fullmatch(rest)
    return echo is not None and (echo[1] is None) == (said == "no")
