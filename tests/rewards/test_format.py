from typing import Literal

import pytest
from labeled_answers import COMPLETIONS, IMAGING

from medrl.rewards import well_formed
from medrl.types import MODES, Completion, Example, Mode

EXAMPLE = Example(id="ct-1", source="s", images=(), question="Which modality?", options=IMAGING, target="C")


def completion(text: str, mode: Mode, finish_reason: Literal["stop", "length"] = "stop") -> Completion:
    return Completion(text=text, token_ids=(1,), finish_reason=finish_reason, mode=mode)


@pytest.mark.parametrize(("why", "mode", "text", "letter", "form"), COMPLETIONS, ids=[row[0] for row in COMPLETIONS])
def test_the_form_is_judged_as_labeled_by_hand(why, mode, text, letter, form):
    assert well_formed(EXAMPLE, completion(text, mode)) == float(form)


@pytest.mark.parametrize("row", [row for row in COMPLETIONS if row[4]], ids=lambda row: row[0])
def test_a_form_belongs_to_one_mode_only(row):
    _, mode, text, _, _ = row
    assert [other for other in MODES if well_formed(EXAMPLE, completion(text, other))] == [mode]


def test_the_form_counts_when_the_token_limit_cut_behind_the_last_tag():
    text = "<think>x</think><answer>C</answer>"
    assert well_formed(EXAMPLE, completion(text, "think", finish_reason="length")) == 1.0


def test_the_form_does_not_depend_on_the_answer():
    for inside in ("C", "A", "none", "anything at all"):
        assert well_formed(EXAMPLE, completion(f"<answer>{inside}</answer>", "no_think")) == 1.0
