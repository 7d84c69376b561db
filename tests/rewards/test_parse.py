import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from labeled_answers import BLOCKS, COMPLETIONS, IMAGING

from medrl.errors import RewardError, SettingsError
from medrl.rewards import parse_answer
from medrl.rewards.option_text import same_text
from medrl.rewards.parse import find_block, find_tags, read_choice
from medrl.types import LETTERS, MODES

FORMS = {
    "think": "<think>reasons</think><answer>{}</answer>",
    "no_think": "<answer>{}</answer>",
    "think_after": "<answer>{}</answer><think>reasons</think>",
}

anything = st.text(max_size=60) | st.lists(
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "<answer>",
            "</answer>",
            "C",
            "c)",
            "CT",
            "a ",
            "none",
            "\n",
            "(",
            "<b>",
            "肺",
            ".*",
            "\\",
            "&lt;",
        ]
    )
    | st.text(max_size=5),
    max_size=20,
).map("".join)
free_of_tags = st.text(min_size=1, max_size=30).filter(lambda text: not find_tags(text) and text.strip())
option_lists = st.lists(free_of_tags, min_size=2, max_size=5).map(tuple)
words = st.sampled_from(
    ["left", "right", "lung", "grade", "2", "3", "mass", "CT", "a", "b", "cell", "肺炎", "HER2+", "no", "(A)", "-"]
)
plain_options = st.lists(
    st.lists(words, min_size=1, max_size=4).map(" ".join), min_size=2, max_size=5, unique=True
).map(tuple)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("why", "options", "block", "letter"), BLOCKS, ids=[row[0] for row in BLOCKS])
def test_an_answer_block_is_read_as_labeled_by_hand_in_every_mode(why, options, block, letter, mode):
    answer = parse_answer(FORMS[mode].format(block), options, mode)
    assert answer.letter == letter
    assert answer.raw == block
    assert bool(answer.problem) == (letter is None)


@pytest.mark.parametrize(("why", "mode", "text", "letter", "form"), COMPLETIONS, ids=[row[0] for row in COMPLETIONS])
def test_a_completion_is_read_as_labeled_by_hand(why, mode, text, letter, form):
    assert parse_answer(text, IMAGING, mode).letter == letter


@pytest.mark.parametrize(
    ("block", "options", "problem"),
    [
        ("", IMAGING, "empty answer"),
        ("not sure", IMAGING, "abstained"),
        ("C) MRI", IMAGING, "letter and text disagree"),
        ("CT (A)", IMAGING, "letter and text disagree"),
        ("A or C", IMAGING, "names several options"),
        ("CT and MRI", IMAGING, "names several options"),
        ("B or C", IMAGING, "names several options"),
        ("no", ("No", "No", "Yes"), "names several options"),
        ("C or E", IMAGING, "letter and text disagree"),
        ("E", IMAGING, "letter E is not offered"),
        ("Z", IMAGING, "letter Z is not offered"),
        ("Z) CT", IMAGING, "letter Z is not offered"),
        ("E CT", IMAGING, "letter E is not offered"),
        ("CT (E)", IMAGING, "letter E is not offered"),
        ("B CT", IMAGING, "letter and text disagree"),
        ("A) CT scan", IMAGING, "letter and text disagree"),
        ("a CT scan", IMAGING, "no option has this text"),
        ("...", IMAGING, "empty answer"),
        ("x", (), "letter X is not offered"),
        ("E) PET", IMAGING, "letter E is not offered"),
        ("PET", IMAGING, "no option has this text"),
        ("I see a CT", IMAGING, "letter I is not offered"),
        ("I see nothing", IMAGING, "no option has this text"),
        ("X-rays", IMAGING, "no option has this text"),
        ("E-mail", IMAGING, "no option has this text"),  # E would be the first letter beyond the options
        ("PET (E)", IMAGING, "letter E is not offered"),
        ("x" * 1000, IMAGING, "answer is too long"),
    ],
)
def test_the_problem_says_why_there_is_no_letter(block, options, problem):
    assert parse_answer(FORMS["no_think"].format(block), options, "no_think").problem == problem
    assert read_choice(block, options) == (None, problem)


def test_a_choice_that_is_read_has_no_problem():
    for block in ("C", "C) CT", "CT", "the answer is c"):
        assert read_choice(block, IMAGING) == (2, "")


def test_an_answer_is_too_long_above_400_characters_and_twice_the_longest_option():
    options = ("MRI", "CT of the chest")  # 15 characters
    for room, longest in ((options, 430), ((), 400)):
        fits, over = ("the answer is" + " " * (length - 14) + "b" for length in (longest, longest + 1))
        assert len(fits) == longest and len(over) == longest + 1
        assert read_choice(over, room) == (None, "answer is too long")
        assert (
            read_choice(fits, room)[0] == (1 if room else None) and read_choice(fits, room)[1] != "answer is too long"
        )


def test_a_letter_behind_the_text_is_looked_for_in_the_last_32_characters():
    assert read_choice("CT (C)" + "!" * 29, IMAGING) == (2, "")
    assert read_choice("CT (C)" + "!" * 30, IMAGING)[0] is None


def test_three_openings_are_put_up_with_and_not_four():
    assert read_choice("So the answer is: option: choice: C", IMAGING) == (2, "")
    assert read_choice("So the answer is: option: choice: letter: C", IMAGING)[0] is None


@pytest.mark.parametrize(
    ("text", "mode", "problem"),
    [
        ("", "think", "no answer block"),
        ("<think>C", "think", "no answer block"),
        ("C or B", "no_think", "no answer block"),
        ("<think></answer></think>C", "think", "answer is not after the reasoning"),
        ("<answer>C</answer><answer>B</answer>", "think", "several answer blocks"),
        ("<answer>A<answer>B", "think", "several answer blocks"),
        ("A</answer>B</answer>", "think", "several answer blocks"),
        ("</answer>C<answer>", "think", "answer block is not closed"),
        ("<think><answer>C</answer>", "think", "answer inside the reasoning"),
        ("<answer>C<think></answer>", "think", "answer inside the reasoning"),
        ("<answer>C</answer><think>x</think>", "think", "answer is not after the reasoning"),
        ("<think>x</think><answer>C</answer>", "think_after", "answer is not before the reasoning"),
        ("<answer>C", "no_think", "answer block is not closed"),
        ("C</answer>", "no_think", "answer block is not opened"),
    ],
)
def test_the_problem_says_what_is_wrong_with_the_blocks(text, mode, problem):
    answer = parse_answer(text, IMAGING, mode)
    assert (answer.value, answer.problem) == (None, problem)
    block = find_block(text, mode)
    assert answer.raw == block.text == ("C or B" if text == "C or B" else "")


@given(anything, option_lists, st.sampled_from(MODES))
@settings(max_examples=500, deadline=None)
@example("<answer>" + "9" * 5000 + "</answer>", ("&#" + "9" * 5000 + ";", "B"), "think")
@example("<answer>\ud800</answer>", ("\ud800", "B"), "no_think")
def test_any_string_is_read_as_an_offered_letter_or_has_a_problem(text, options, mode):
    for completion in (text, FORMS[mode].format(text)):
        answer = parse_answer(completion, options, mode)
        assert (answer.letter is None) == bool(answer.problem)
        assert answer.letter is None or answer.letter in LETTERS[: len(options)]


@pytest.mark.parametrize(
    "piece",
    [
        "<answer>",
        "</think>",
        "a ",
        "*",
        "( ",
        "1,",
        "-",
        "&lt",
        "<b",
        "the answer is ",
        "\u0301\u0323",
        "\ufdfa",
        "a.",
        " \n",
    ],
)
def test_a_very_long_completion_is_unreadable_rather_than_slow(piece):
    text = piece * (100_000 // len(piece))
    for mode in MODES:
        assert parse_answer(text, IMAGING, mode).letter is None
        assert parse_answer(FORMS[mode].format(text), IMAGING, mode).letter is None


@given(
    st.sampled_from(BLOCKS),
    st.sampled_from(MODES),
    st.text(" \n\t\r\u00a0\u3000", max_size=6),
    st.text(" \n", max_size=6),
)
def test_white_space_around_the_answer_changes_nothing(row, mode, before, after):
    _, options, block, letter = row
    assert parse_answer(before + FORMS[mode].format(before + block + after) + after, options, mode).letter == letter


@given(st.sampled_from(BLOCKS), st.sampled_from(MODES))
def test_letter_case_changes_nothing(row, mode):
    _, options, block, letter = row
    text = FORMS[mode].format(block)
    for change in (str.upper, str.lower, str.swapcase):
        assert parse_answer(change(text), options, mode).letter == letter
        assert parse_answer(text, [change(option) for option in options], mode).letter == letter


@given(anything, option_lists, st.sampled_from(MODES))
def test_letter_case_of_any_text_changes_nothing(text, options, mode):
    text = FORMS[mode].format(text)
    assume(text.upper().casefold() == text.lower().casefold() == text.casefold())
    assert parse_answer(text.upper(), options, mode).letter == parse_answer(text.lower(), options, mode).letter


@given(plain_options, st.data())
def test_an_answer_in_words_follows_its_option_through_any_order(options, data):
    said = data.draw(st.sampled_from(options) | st.lists(words, min_size=1, max_size=4).map(" ".join))
    assume(not any(len(word.strip("()-")) == 1 and word.strip("()-").isalpha() for word in said.split()))
    order = data.draw(st.permutations(range(len(options))))
    shuffled = [options[i] for i in order]
    before = parse_answer(FORMS["think"].format(said), options, "think").letter
    after = parse_answer(FORMS["think"].format(said), shuffled, "think").letter
    chosen_before = None if before is None else LETTERS.index(before)
    assert chosen_before == (None if after is None else order[LETTERS.index(after)])


BRACKETED = ["Computed tomography (CT)", "Ultrasound (US)", "Fracture (open)", "Fracture (closed)", "Left [L]", "Cyst"]
OTHER_NAMES = {  # what each may be called where no other option may be
    "Computed tomography (CT)": ["CT", "the CT", "computed tomography", "CT (computed tomography)"],
    "Ultrasound (US)": ["US", "ultrasound", "us (ultrasound)"],
    "Fracture (open)": ["open", "Fracture, open", "open (fracture)"],
    "Fracture (closed)": ["closed"],
    "Left [L]": ["left", "Left (L)"],
    "None of the above": ["none", "None of these", "neither", "none of the options given"],
    "All of these": ["all", "All of the above", "all the above", "all of them"],
}  # fmt: skip


@given(st.permutations([*BRACKETED, "None of the above", "All of these"]), st.data(), st.sampled_from(MODES))
def test_another_name_of_an_option_follows_it_through_any_order(options, data, mode):
    option = data.draw(st.sampled_from(sorted(OTHER_NAMES)))
    name = data.draw(st.sampled_from(OTHER_NAMES[option]))
    letter = LETTERS[options.index(option)]
    for said in (name, f"{letter}) {name}", f"{name} ({letter})", f"It's {name}</s>", f"{name.upper()}."):
        assert parse_answer(FORMS[mode].format(said), options, mode).letter == letter, said
    other = data.draw(st.sampled_from([LETTERS[i] for i in range(len(options)) if LETTERS[i] != letter]))
    for said in (f"{other}) {name}", f"{name} ({other})", f"not {name}", f"{name} is wrong", f"{other} or {name}"):
        assert parse_answer(FORMS[mode].format(said), options, mode).letter is None, said


@given(
    st.permutations([*BRACKETED, "None of the above"]),
    st.sampled_from(["Fracture", "fracture, CT", "CT or US", "L", "(open"]),
)
def test_a_name_that_several_options_have_or_none_is_not_read(options, said):
    letter = parse_answer(FORMS["no_think"].format(said), options, "no_think").letter
    assert letter == (LETTERS[options.index("Fracture (open)")] if said == "(open" else None)


ENDINGS = ["</s>", "<|im_end|>", "<|endoftext|>", "<eos>", "<br />", " is correct", " is the right answer.", "\n\n"]


@given(
    st.sampled_from([row for row in BLOCKS if "~~" not in row[2]]),
    st.sampled_from(["", "<s>", "It's ", "So the answer is: ", "<p style='x'>"]),
    st.sampled_from(["", *ENDINGS[:5]]),
)
def test_a_letter_is_read_through_any_frame_that_adds_nothing(row, before, after):
    _, options, _, letter = row
    assume(letter is not None)
    said = f"{before}{letter}{after}"
    assert parse_answer(FORMS["no_think"].format(said), options, "no_think").letter == letter
    for ending in ENDINGS:
        assert parse_answer(FORMS["no_think"].format(letter + ending), options, "no_think").letter == letter


@given(
    option_lists,
    st.data(),
    st.sampled_from(MODES),
    st.sampled_from(["{}", "({})", "{}.", " {}\n", "Option {}", "**{}**"]),
)
def test_a_letter_follows_its_option_through_any_order_and_any_option_texts(options, data, mode, way):
    assume(all(not option.casefold().strip().startswith("option") for option in options))
    index = data.draw(st.integers(0, len(options) - 1))
    assert parse_answer(FORMS[mode].format(way.format(LETTERS[index])), options, mode).letter == LETTERS[index]


@given(plain_options, st.data())
def test_an_option_repeated_as_written_is_never_read_as_another(options, data):
    index = data.draw(st.integers(0, len(options) - 1))
    assume(len(options[index]) > 1 and options[index].strip("()- ").casefold() not in "ab")
    letter = parse_answer(FORMS["think"].format(options[index]), options, "think").letter
    assert letter in (LETTERS[index], None)


@given(plain_options, st.data())
def test_letter_and_text_are_read_only_when_they_agree(options, data):
    letter = data.draw(st.integers(0, len(options) - 1))
    text = data.draw(st.integers(0, len(options) - 1))
    assume(options[text].strip("()- ").upper() != LETTERS[letter])  # "A) a" only says its letter twice
    answer = parse_answer(FORMS["think"].format(f"{LETTERS[letter]}) {options[text]}"), options, "think")
    if letter == text:
        assert answer.letter in (LETTERS[letter], None)
    elif answer.letter == LETTERS[letter]:
        assert same_text(options[text], options[letter])
    elif answer.letter is not None:
        said = f"{LETTERS[letter]}{options[text]}".casefold()
        chosen = options[LETTERS.index(answer.letter)].casefold()
        assert [char for char in said if char.isalnum()] == [char for char in chosen if char.isalnum()]


def test_powers_keep_their_meaning_although_unicode_folds_them():
    options = ("10²", "102", "10")
    assert parse_answer("<answer>10²</answer>", options, "no_think").letter == "A"
    assert parse_answer("<answer>102</answer>", options, "no_think").letter == "B"


def test_the_tenth_option_is_the_last_that_has_a_letter():
    assert parse_answer("<answer>J</answer>", [str(i) for i in range(10)], "no_think").letter == "J"


def test_more_options_than_letters_are_an_error_of_the_data():
    with pytest.raises(RewardError, match="11 options"):
        parse_answer("<answer>A</answer>", [str(i) for i in range(11)], "think")


def test_an_unknown_mode_is_an_error_that_lists_the_modes():
    with pytest.raises(SettingsError, match="think, no_think, think_after"):
        parse_answer("<answer>A</answer>", ("x", "y"), "thinking")  # pyright: ignore[reportArgumentType]
