"""The two papers' released graders, bug for bug: to reproduce their numbers, and to show what they measure.

Written anew after their public behavior, for the questions they were made for (a letter among options).

Med-R1, training reward (arXiv 2503.13939; the same as R1-V's): the first ``<answer>`` of the completion, also inside
the reasoning, must equal the letter as written; a line break or a stop inside the tag loses it; without a tag the whole
completion must. MedVLM-R1, training reward (arXiv 2502.19634): letters A to J are counted in the first ``<answer>``,
in upper case and also inside words; exactly one, the right one, earns 1.0 alone and 0.5 beside other text, so that
"none" earns half where E is right. Both evaluation scripts have rules of their own.
"""

import re

from medrl.errors import MissingExtraError, RewardError
from medrl.types import Completion, Example

_FIRST_ANSWER = re.compile(r"<answer>(.*?)</answer>")
_FIRST_ANSWER_ANY_CASE = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_THINK_THEN_ANSWER = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
_ANSWER_ONLY = re.compile(r"\s*<answer>.*?</answer>", re.DOTALL)
_ANSWER_WORD = re.compile(r"<answer>\s*(\w+)\s*</answer>")
_ANSWER_CAPITAL = re.compile(r"<answer>\s*([A-Z])\s*</answer>")


def med_r1_answer(completion: Completion) -> str:
    """What Med-R1's training reward compares with the solution."""
    match = _FIRST_ANSWER.search(completion.text)
    return match[1].strip() if match else completion.text.strip()


def med_r1_accuracy(example: Example, completion: Completion) -> float:
    """1.0 or 0.0, as Med-R1's training reward.

    Before it compares, it asks math-verify whether any number or formula of the whole completion, reasoning included,
    is the solution. That never helps a letter; for a numeric target it does harm, and is done here too.
    """
    if example.kind == "numeric" and _same_anywhere(completion.text, example.target):
        return 1.0
    return float(med_r1_answer(completion) == _text_target(example))


def med_r1_format(example: Example, completion: Completion) -> float:
    """1.0 or 0.0, as the released format rewards: with reasoning in both papers, Med-R1's other one without."""
    pattern = _ANSWER_ONLY if completion.mode == "no_think" else _THINK_THEN_ANSWER
    return float(pattern.fullmatch(completion.text) is not None)


def med_r1_eval_answer(completion: Completion) -> str | None:
    """What Med-R1's evaluation script takes for the answer: the first tag that holds one word."""
    match = _ANSWER_WORD.search(completion.text)
    return match[1] if match else None


def med_r1_eval_accuracy(example: Example, completion: Completion) -> float:
    """1.0 or 0.0, as Med-R1's evaluation script."""
    return float(med_r1_eval_answer(completion) == _text_target(example))


def raw_accuracy(example: Example, completion: Completion) -> float:
    """1.0 if the whole output is the letter and nothing else.

    As Med-R1's evaluation of the untrained model and of Qwen2-VL without reasoning, and MedVLM-R1's ``simple`` one.
    """
    return float(completion.text == _text_target(example))


def medvlm_r1_answer(completion: Completion) -> str | None:
    """The letter that MedVLM-R1's training reward takes for the answer: the only one from A to J in the first tag."""
    letters = re.findall(r"[A-J]", _medvlm_r1_text(completion).upper())
    return letters[0] if len(letters) == 1 else None


def medvlm_r1_accuracy(example: Example, completion: Completion) -> float:
    """1.0, 0.5 or 0.0, as MedVLM-R1's training reward."""
    letter, target = medvlm_r1_answer(completion), _text_target(example)
    if letter is None or letter != target:
        return 0.0
    beside = re.sub(letter, "", _medvlm_r1_text(completion), count=1, flags=re.IGNORECASE)
    return 0.5 if beside.strip() else 1.0


def _medvlm_r1_text(completion: Completion) -> str:
    match = _FIRST_ANSWER_ANY_CASE.search(completion.text)
    return match[1].strip() if match else ""


def medvlm_r1_eval_answer(completion: Completion) -> str | None:
    """What MedVLM-R1's evaluation script (``complex``) takes for the answer: the first tag that holds one capital."""
    match = _ANSWER_CAPITAL.search(completion.text)
    return match[1] if match else None


def medvlm_r1_eval_accuracy(example: Example, completion: Completion) -> float:
    """1.0 or 0.0, as MedVLM-R1's evaluation script with its ``complex`` prompt."""
    return float(medvlm_r1_eval_answer(completion) == _text_target(example))


def _text_target(example: Example) -> str:
    """The solution as the released code had it."""
    if example.kind not in ("choice", "numeric"):
        raise RewardError(
            f"example {example.id!r} is of kind {example.kind}, but the papers' graders know only letters and numbers: "
            "take the scorer strict"
        )
    return example.target.strip()


def _same_anywhere(text: str, target: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise MissingExtraError("math-verify", "rewards") from error
    # The released code passes the answer as the gold and the gold as the answer; so does this.
    return bool(verify(parse(text), parse(f"<answer> {target} </answer>")))
