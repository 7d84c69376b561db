"""Example -> Prompt: the wording of the question, by template name, with the data's text made harmless.

    text = template with {question} replaced by neutralize(question + options)

Each paper's wording is kept to the letter, its odd line breaks and trailing blanks included: a prompt that differs in
one token is another experiment.
"""

import difflib
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from medrl.errors import DataError, SettingsError
from medrl.types import LETTERS, MODES, Example, Kind, Mode, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """One way to ask."""

    name: str
    mode: Mode
    """Form of completion the wording asks for."""
    text: str
    """Text of the user turn; ``{question}`` stands for question and options, ``{answer}`` for what is to be given."""
    options: Literal["inline", "lines"]
    """How the options follow the question; a key of ``OPTION_STYLES``."""
    source: str
    """Where the wording comes from."""


def inline_options(question: str, options: Sequence[str]) -> str:
    """``What is this? A)CT, B)MRI``: one line, as in the released splits of Med-R1."""
    return f"{question} " + ", ".join(f"{letter}){option}" for letter, option in zip(LETTERS, options, strict=False))


def lines_of_options(question: str, options: Sequence[str]) -> str:
    """``What is this?\\nA) CT\\nB) MRI``: one option per line, as in the released data of MedVLM-R1."""
    return question + "".join(f"\n{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))


OPTION_STYLES: dict[str, Callable[[str, Sequence[str]], str]] = {"inline": inline_options, "lines": lines_of_options}

_TEMPLATES = (
    Template(
        name="med-r1",
        mode="think",
        text="{question} Your task: 1. Think through the question step by step, enclose your reasoning process in "
        "<think>...</think> tags. 2. Then provide the correct single-letter choice (A, B, C, D,...) inside "
        "<answer>...</answer> tags. 3. No extra information or text outside of these tags.",
        options="inline",
        source="Med-R1, training (src/r1-v/src/open_r1/grpo_vqa.py)",
    ),
    Template(
        name="med-r1-no-think",
        mode="no_think",
        text="{question} Your task: 1. Provide the correct single-letter choice (A, B, C, D,...) inside "
        "<answer>...</answer> tags. 2. No extra information or text outside of this tag.",
        options="inline",
        source="Med-R1, training without reasoning (src/r1-v/src/open_r1/grpo_vqa_nothink.py)",
    ),
    Template(
        name="med-r1-think-after",
        mode="think_after",
        text="{question} Your task: 1. Provide the correct single-letter choice (A, B, C, D,...) inside "
        "<answer>...</answer> tags. 2. Then explain the choice step by step, enclose your reasoning process in "
        "<think>...</think> tags. 3. No extra information or text outside of these tags.",
        options="inline",
        source="ours: Med-R1 describes answering first and reasoning after; no wording of it is public",
    ),
    Template(
        name="med-r1-eval",
        mode="think",
        text="{question} Think through the question step by step in <think>...</think> tags. Then provide the correct "
        "single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags.",
        options="inline",
        source="Med-R1, evaluation (src/eval_vqa/test_qwen2vl_vqa.py)",
    ),
    Template(
        name="med-r1-eval-no-think",
        mode="no_think",
        text="{question} Provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags.",
        options="inline",
        source="Med-R1, evaluation without reasoning (src/eval_vqa, the _nothink scripts)",
    ),
    Template(
        name="med-r1-zero-shot",
        mode="no_think",
        text="{question} Provide the correct single-letter choice (A, B, C, D,...).",
        options="inline",
        source="Med-R1, evaluation of the untrained model, no tags (src/eval_vqa/test_qwen2vl_vqa_zero_shot.py)",
    ),
    Template(
        name="med-r1-readme",
        mode="think",
        text="{question} First output the thinking process in <think> </think> and final choice (A, B, C, D ...) in "
        "<answer> </answer> tags.",
        options="inline",
        source="Med-R1, README, inference",
    ),
    Template(
        name="medvlm-r1",
        mode="think",
        text="\n    {question} \n    Your task: \n"
        "    1. Think through the question step by step, enclose your reasoning process in <think>...</think> tags.\n"
        "    2. Then provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags.\n"
        "    3. No extra information or text outside of these tags.\n    ",
        options="lines",
        source="MedVLM-R1, training, evaluation ('complex') and model card",
    ),
    Template(
        name="medvlm-r1-simple",
        mode="no_think",
        text="\n    {question} \n    Your task: provide the correct single-letter choice (A, B, C, D,...).\n    ",
        options="lines",
        source="MedVLM-R1, evaluation ('simple'), asks for no tags",
    ),
    Template(
        name="r1-v",
        mode="think",
        text="{question}  Output the thinking process in <think> </think> and final answer (number) in "
        "<answer> </answer> tags.",
        options="lines",
        source="R1-V, counting; it had no options, so their form is ours",
    ),
    Template(
        name="plain",
        mode="think",
        text="{question}\nReason in <think>...</think>, then give {answer} in <answer>...</answer>.",
        options="lines",
        source="ours: short, for small models",
    ),
    Template(
        name="plain-no-think",
        mode="no_think",
        text="{question}\nGive {answer} in <answer>...</answer>.",
        options="lines",
        source="ours: short, for small models",
    ),
    Template(
        name="plain-think-after",
        mode="think_after",
        text="{question}\nGive {answer} in <answer>...</answer>, then reason in <think>...</think>.",
        options="lines",
        source="ours: short, for small models",
    ),
)

ANSWERS: dict[Kind, str] = {
    "choice": "the letter",
    "multi_select": "the letters of all right options",
    "yes_no": "yes or no",
    "numeric": "the number and its unit",
    "short": "a few words",
    "box": "the box as x1, y1, x2, y2 in pixels",
}
"""What ``{answer}`` of a template says, by kind of question."""

TEMPLATES: dict[str, Template] = {template.name: template for template in _TEMPLATES}
DEFAULT_TEMPLATES: dict[Mode, str] = {
    "think": "med-r1",
    "no_think": "med-r1-no-think",
    "think_after": "med-r1-think-after",
}


PLAIN_TEMPLATES: dict[Mode, str] = {
    "think": "plain",
    "no_think": "plain-no-think",
    "think_after": "plain-think-after",
}


def make_prompt(example: Example, mode: Mode = "think", template: str | None = None) -> Prompt:
    """The user turn that asks for ``example``'s answer in the form ``mode``.

    Args:
        example: what to ask about; its question and options are neutralized, see ``neutralize``.
        mode: form of completion asked for.
        template: a key of ``TEMPLATES``; None takes ``DEFAULT_TEMPLATES[mode]``. The papers' wordings ask for one
            letter, so questions of other kinds are asked in the words of ``PLAIN_TEMPLATES[mode]`` instead.

    Raises:
        SettingsError: the mode or the template is unknown, or the template asks for another mode.
        DataError: the example has more options than there are letters.
    """
    chosen = find_template(mode, template)
    if example.kind != "choice" and "{answer}" not in chosen.text:
        chosen = TEMPLATES[PLAIN_TEMPLATES[mode]]
    if len(example.options) > len(LETTERS):
        raise DataError(
            f"example {example.id!r} has {len(example.options)} options, but there are {len(LETTERS)} letters"
        )
    problem = OPTION_STYLES[chosen.options](example.question, example.options)
    # Joined before it is neutralized: a token must not be smuggled in halves, one in the question, one in an option.
    text = chosen.text.replace("{answer}", ANSWERS[example.kind]).replace("{question}", neutralize(problem))
    return Prompt(id=example.id, text=text, images=example.images, mode=mode)


ANSWER_FORMS: dict[Mode, str] = {
    "think": "<think>{rationale}</think><answer>{target}</answer>",
    "no_think": "<answer>{target}</answer>",
    "think_after": "<answer>{target}</answer><think>{rationale}</think>",
}
"""The completion that each mode asks for."""


def demonstration(example: Example, mode: Mode, *, rationale: bool) -> str:
    """The right answer of ``example`` in the form of ``mode``, with its rationale or with an empty reasoning block."""
    # A tag in the data's own text would end the block that it stands in.
    reasoning = neutralize((example.rationale or "").strip()) if rationale else ""
    return ANSWER_FORMS[mode].format(target=example.target, rationale=reasoning)


def find_template(mode: Mode, name: str | None = None) -> Template:
    """The template called ``name``, or the default of ``mode``; SettingsError when it is unknown or does not fit."""
    if mode not in MODES:
        raise SettingsError(f"mode is {mode!r}, but it must be one of {', '.join(MODES)}")
    if name is None:
        return TEMPLATES[DEFAULT_TEMPLATES[mode]]
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(TEMPLATES)}"
        raise SettingsError(f"there is no prompt template {name!r}; {hint}")
    template = TEMPLATES[name]
    if template.mode != mode:
        fitting = ", ".join(other.name for other in _TEMPLATES if other.mode == mode)
        raise SettingsError(
            f"template {name!r} asks for mode {template.mode!r}, but mode is {mode!r}: "
            f"use one of {fitting}, or set the mode to {template.mode!r}"
        )
    return template


# Names of tags that steer a chat template, an image processor or our own parser, over the model families we know.
_CONTROL_NAMES = (
    "think", "thinking", "answer", "reasoning", "image", "images", "img", "img_context", "image_soft_token",
    "image_pad", "video", "audio", "start_of_image", "end_of_image", "start_of_turn", "end_of_turn",
    "vision_start", "vision_end", "tool_call", "tool_response", "s", "bos", "eos", "pad", "unk", "mask",
)  # fmt: skip
_NAME = "(?:" + "|".join(r"\s*".join(map(re.escape, name)) for name in _CONTROL_NAMES) + ")"
_OPENER = re.compile(rf"<(?=\s*\||\s*(?:/\s*)?{_NAME}(?![a-z]))", re.IGNORECASE)
CONTROL = re.compile(
    rf"<\s*\|[^<>]*\|\s*>|<\s*(?:/\s*)?{_NAME}(?:[\s_:#-]*\d+|\s[^<>]{{0,80}})?\s*(?:/\s*)?>",
    re.IGNORECASE,
)
"""What must not reach a tokenizer or a parser from data: special tokens ``<|...|>`` and control tags, in any case."""

_FILLERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")
_SOFTEN = str.maketrans("<>", "‹›")


def neutralize(text: str) -> str:
    """``text`` with the brackets of every control token turned into ``‹ ›``: still readable, no longer a token.

    Covers ``<|im_end|>`` and any other ``<|...|>``, ``<image>``, ``<image 1>``, ``</think>``, ``<answer>`` and such,
    in any case, with blanks or invisible characters inside, or in full-width letters. Everything else is left as
    it is: ``p < 0.05``, ``<5 mm`` and ``CD4 <200 > 50`` come out unchanged. Idempotent.
    """
    if "<" not in text and text.isascii():
        return text
    softened = _replace_folded(text, CONTROL)
    if CONTROL.search(_fold(softened)[0]):
        # One token hidden inside another, as in <|<|im_end|>|>: no honest text does that, so every opener goes.
        softened = _replace_folded(softened, _OPENER)
    return softened


def _replace_folded(text: str, pattern: re.Pattern[str]) -> str:
    """Soften each match of ``pattern`` in the folded text; what lies between the matches stays as it was written."""
    folded, origin = _fold(text)
    pieces, end = [], 0
    for match in pattern.finditer(folded):
        pieces += [text[end : origin[match.start()]], match.group().translate(_SOFTEN)]
        end = origin[match.end() - 1] + 1
    return "".join([*pieces, text[end:]])


def _fold(text: str) -> tuple[str, Sequence[int]]:
    """``text`` as a lenient reader sees it (compatibility forms unified, invisible characters gone), and the index in
    ``text`` that each of its characters came from."""
    if text.isascii() and text.isprintable():
        return text, range(len(text))
    folded, origin = [], []
    for index, character in enumerate(text):
        if _is_invisible(character):
            continue
        for part in unicodedata.normalize("NFKC", character):
            folded.append(part)
            origin.append(index)
    return "".join(folded), origin


def _is_invisible(character: str) -> bool:
    category = unicodedata.category(character)
    return (
        category == "Cf"
        or (category == "Cc" and character not in "\t\n\r\v\f")
        or character in _FILLERS
        or "\ufe00" <= character <= "\ufe0f"
        or "\U000e0100" <= character <= "\U000e01ef"
    )
