"""The wording of prompts, and that data cannot speak with the template's voice."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example as case
from hypothesis import given
from hypothesis import strategies as st

from medrl.data.prompts import CONTROL, DEFAULT_TEMPLATES, TEMPLATES, make_prompt, neutralize
from medrl.errors import DataError, SettingsError
from medrl.types import MODES, Example


def make_example(question="What is shown?", options=("CT", "MRI"), target="A"):
    return Example(id="d/1", source="d", images=(Path("a.png"),), question=question, options=options, target=target)


def test_med_r1_puts_the_options_on_the_line_of_the_question():
    prompt = make_prompt(make_example(), "think")
    assert prompt.text == (
        "What is shown? A)CT, B)MRI Your task: 1. Think through the question step by step, enclose your reasoning "
        "process in <think>...</think> tags. 2. Then provide the correct single-letter choice (A, B, C, D,...) inside "
        "<answer>...</answer> tags. 3. No extra information or text outside of these tags."
    )
    assert (prompt.id, prompt.images, prompt.mode) == ("d/1", (Path("a.png"),), "think")


def test_medvlm_r1_keeps_the_indentation_and_trailing_blanks_of_its_model_card():
    text = make_prompt(make_example(), "think", "medvlm-r1").text
    assert text.splitlines()[:5] == ["", "    What is shown?", "A) CT", "B) MRI ", "    Your task: "]
    assert text.endswith("tags.\n    ")


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("med-r1-no-think", "inside <answer>...</answer> tags. 2. No extra information or text outside of this tag."),
        ("med-r1-eval", "B)MRI Think through the question step by step in <think>...</think> tags. Then provide the "
         "correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags."),
        ("med-r1-eval-no-think",
         "B)MRI Provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags."),
        ("med-r1-zero-shot", "B)MRI Provide the correct single-letter choice (A, B, C, D,...)."),
        ("med-r1-readme",
         "B)MRI First output the thinking process in <think> </think> and final choice (A, B, C, D ...) in "
         "<answer> </answer> tags."),
        ("r1-v",
         "MRI  Output the thinking process in <think> </think> and final answer (number) in <answer> </answer> tags."),
    ],
)  # fmt: skip
def test_a_published_wording_is_reproduced_to_the_letter(name, ending):
    assert make_prompt(make_example(), TEMPLATES[name].mode, name).text.endswith(ending)


def test_every_mode_has_a_default_template_of_that_mode():
    assert set(DEFAULT_TEMPLATES) == set(MODES)
    assert all(TEMPLATES[name].mode == mode for mode, name in DEFAULT_TEMPLATES.items())


def test_think_after_asks_for_the_answer_before_the_reasoning():
    for name in ("med-r1-think-after", "plain-think-after"):
        text = TEMPLATES[name].text
        assert text.index("<answer>") < text.index("<think>")
    assert "ours" in TEMPLATES["med-r1-think-after"].source


def test_every_template_holds_the_question_once():
    assert all(template.text.count("{question}") == 1 for template in TEMPLATES.values())


def test_a_template_that_contradicts_the_mode_is_refused_with_the_ones_that_fit():
    with pytest.raises(SettingsError, match=r"'plain' asks for mode 'think'.*med-r1-no-think.*plain-no-think"):
        make_prompt(make_example(), "no_think", "plain")


def test_an_unknown_template_is_refused_with_near_names():
    with pytest.raises(SettingsError, match=r"'medr1'.*med-r1"):
        make_prompt(make_example(), "think", "medr1")
    with pytest.raises(SettingsError, match="think, no_think, think_after"):
        make_prompt(make_example(), "cot")  # type: ignore[arg-type]


def test_more_options_than_letters_are_refused():
    with pytest.raises(DataError, match="11 options"):
        make_prompt(make_example(options=tuple("abcdefghijk")))


def test_braces_in_a_question_are_text():
    assert make_prompt(make_example("Is {question} {0} 50%?")).text.startswith("Is {question} {0} 50%? A)CT")


@pytest.mark.parametrize(
    "attack",
    [
        "<|im_end|>", "<|image_pad|>", "<| im_start |>", "< |x|>", "<image>", "<IMAGE>", "<image 1>", "<image_2>",
        "< image >",
        "</think>", "< / Think >", "<t h i n k>", "<answer>", "</ANSWER>", "<answer/>", "<answer >",
        "＜think＞", "<ｔｈｉｎｋ>", "<｜end▁of▁sentence｜>", "<th\u200bink>", "<\u200b/think\u2060>",
        "\ufeff<\u00adanswer>",
        "<ima\ufe0fge>", "<s>", "</s>", "<start_of_turn>", "<IMG_CONTEXT>", "<\nanswer\n>", "<an\x00swer>",
        "<|<|im_end|>|>", "<|a <think> b|>", "<think <think>>",
    ],
)  # fmt: skip
def test_a_control_token_in_data_becomes_harmless_visible_text(attack):
    calm = neutralize(f"before {attack} after")
    assert not CONTROL.search(calm)
    assert "‹" in calm and calm.startswith("before ") and calm.endswith(" after")


def test_the_letters_of_a_softened_token_stay_readable():
    assert neutralize("a </think> b <|im_end|>") == "a ‹/think› b ‹|im_end|›"


@pytest.mark.parametrize(
    "text",
    [
        "p < 0.05", "<5 mm", "CD4 <200 > 50", "5 < |x| and y > 3", "FEV1<80% and >50%", "T1 > T2 < FLAIR",
        "grade <II or >III", "lesion < 1 cm → benign; µ ≤ 3½ ²", "a<b>c", "<thinking-cap", "stage <strong> note",
    ],
)  # fmt: skip
def test_medical_text_stays_untouched(text):
    assert neutralize(text) == text


def test_a_token_split_over_question_and_option_does_not_survive_the_join():
    text = make_prompt(make_example("end <|", ("x|>", "y")), template="med-r1").text
    assert "<|" not in text


PIECES = st.sampled_from(
    [
        "<",
        ">",
        "|",
        "/",
        " ",
        "<|",
        "|>",
        "think",
        "ANSWER",
        "image",
        " 1",
        "s",
        "\u200b",
        "＜",
        "＞",
        "｜",
        "</",
        "0.05",
        "\n",
        "im_end",
    ]
)
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=14).map("".join)


@given(TEXTS)
@case("<|<|a|>|>")
@case("<think <|x|> >")
def test_neutralized_text_holds_no_control_token_and_neutralizing_again_changes_nothing(text):
    calm = neutralize(text)
    visible = re.sub("[\u200b-\u200f\u2060\ufeff]", "", calm).translate(str.maketrans("＜＞｜", "<>|"))
    assert not CONTROL.search(visible)
    assert not re.search(r"<\|[^<>]*\|>|</?(think|answer|image)>", visible, re.IGNORECASE)
    assert neutralize(calm) == calm


@given(st.text(alphabet=st.characters(exclude_characters="<＜﹤"), max_size=60))
def test_text_without_an_opening_bracket_is_unchanged(text):
    assert neutralize(text) == text


def test_importing_prompts_and_store_does_not_import_torch():
    code = "import sys, medrl.data.prompts, medrl.data.store; assert not {'torch', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("multi_select", "the letters of all right options"),
        ("yes_no", "yes or no"),
        ("numeric", "the number and its unit"),
        ("short", "a few words"),
        ("box", "the box as x1, y1, x2, y2 in pixels"),
    ],
)
def test_other_kinds_than_choices_are_asked_for_what_they_want(kind, asked):
    options = ("CT", "MRI") if kind == "multi_select" else ()
    example = Example(id="q", source="s", images=(), question="Say {answer}?", options=options, target="x", kind=kind)
    shown = "Say {answer}?" + ("\nA) CT\nB) MRI" if options else "")
    assert make_prompt(example, "no_think").text == f"{shown}\nGive {asked} in <answer>...</answer>."
    assert make_prompt(example, "think", "med-r1").text.endswith(f"then give {asked} in <answer>...</answer>.")
    assert "single-letter" not in make_prompt(example, "think_after").text
