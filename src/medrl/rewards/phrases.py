"""Words around an answer that add nothing to it: ``The answer is C.``, ``C is correct``, and words that decline one.

All functions take texts as `option_text.clean` makes them.
"""

import re

_NOUN = r"(?:answer|ans\.?|option|choice|letter|response|selection|solution|conclusion|diagnosis)"
_SURE = r"(?:final|correct|right|best|only|true|most\s(?:likely|probable|appropriate|suitable|accurate))"
_IS = r"(?:is|are|was|would\sbe|should\sbe|must\sbe|will\sbe)"
_LEAD_IN = re.compile(
    rf"""[\s*_#"'`(\[{{]*(?:
        (?:(?:so|thus|therefore|hence|finally|overall),?\s)? (?:(?:the|my|our)\s)? (?:{_SURE}\s){{0,2}}
            {_NOUN}s?(?![^\W_]) (?:\s{_IS}(?![^\W_]))?
      | (?:it|this|that|which)(?:\s(?:is|must\sbe)|['’]s)(?![^\W_])
      | (?:i|we)(?:\s(?:would|will)|['’](?:d|ll))?
            \s(?:choose|chose|pick|select|go\swith|say|answer|think|believe|conclude)(?![^\W_])(?:\sthat(?=\s(?!is\s)))?
      | (?:based\son|according\sto)\s(?:the|this)\s(?:(?:given|provided)\s)?(?:image|question|information)
            (?:\sprovided)?,
      | (?:the|this)\s(?:(?:medical|imaging)\s)?(?:image|scan|modality)\s(?:is|shows)(?![^\W_])
      | [-=]{{1,2}}> | = | [→⇒]
      | (?:so|thus|therefore|hence|i\.e\.),?(?=[\s:])
      | (?:因此|所以|故|综上所述?)?[,:]?(?:我|应|應|该|該)?(?:最终|正确|正確)?的?
            (?:答案|选项|選項|选择|選擇|选|選|答え|正解|回答)(?:应该|應該|应|應)?(?:是|为|為|は)?
      | (?:정답|답)[은이]?
      | (?:(?:la|le|die|a)\s)?(?:respuesta|réponse|antwort|resposta|risposta|ответ)(?:\scorr?e[ct]t?[ae])?
            (?:\s(?:es|est|ist|é|è))?(?![^\W_])
      | (?:\\[\[(]\s?)?\$*\\(?:boxed|fbox|text|textbf|textit|mathrm|mathbf)\{{
    )[\s:=*"']*(?:-(?:\s|(?=[a-z](?![^\W_]))))?""",
    re.VERBOSE,
)
_TAIL = re.compile(
    rf"""(?: ,?\s(?:(?:which|that)\s)?{_IS}\s(?:(?:the|my|our)\s)?(?:(?:{_SURE}\s){{0,2}}{_NOUN}s?|{_SURE}(?:\sone)?)
           | (?:です|である|だ|입니다|이다|예요|이에요) )[\s.。!*_"'`)\]]*\Z""",
    re.VERBOSE,
)
_TAIL_CHARS = 80
_ABSTENTIONS = re.compile(
    r"""(?: none | neither | nothing | unknown | unsure | unclear | uncertain | undetermined | impossible | n\ a | na
          | no\ answer | no\ idea | not\ enough | insufficient | all\ of\ the\ above | 不知道 | 无法.* | 不确定
          | (?:i\ |we\ )?(?:am\ |m\ )?(?:not\ sure|not\ certain|not\ able|unsure|uncertain|unable|sorry)
          | (?:i\ |we\ |it\ )?(?:cannot|can\ t|can\ not|could\ not|do\ not|don\ t)
        )(?![^\W_])""",
    re.VERBOSE,
)


def strip_phrases(text: str) -> str:
    """``text`` without the phrases before and behind it that only say that it is the answer."""
    return strip_tail(strip_lead_in(text))


def strip_lead_in(text: str) -> str:
    """``text`` without up to three openings such as ``The answer is`` or ``Option``."""
    for _ in range(3):
        match = _LEAD_IN.match(text)
        if match is None or match.end() == len(text):
            break
        text = text[match.end() :]
    return text


def strip_tail(text: str) -> str:
    """``text`` without an ending such as ``is the correct answer``."""
    match = _TAIL.search(text, max(0, len(text) - _TAIL_CHARS))
    return text[: match.start()] if match is not None and match.start() > 0 else text


def is_abstention(plain: str) -> bool:
    """Whether words, joined by blanks, begin by declining to answer."""
    return _ABSTENTIONS.match(plain) is not None
