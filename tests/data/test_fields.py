"""Options inside questions, lists in strings, answers in every spelling."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medrl.data.prompts import inline_options, lines_of_options
from medrl.data.readers.fields import option_list, read_answer, read_letter
from medrl.data.readers.inline import split_inline
from medrl.data.readers.rows import RowError


@pytest.mark.parametrize(
    ("problem", "question", "options"),
    [
        ("What is it? A)CT, B)MRI", "What is it?", ("CT", "MRI")),
        ("What is it? A) CT, B) MRI, C) PET", "What is it?", ("CT", "MRI", "PET")),
        ("What is it?\nA) CT\nB) MRI.", "What is it?", ("CT", "MRI.")),
        ("What is it?A)CT ,B)MRI", "What is it?", ("CT", "MRI")),
        ("Q?  A)Cyst, simple, B)Cyst (complex), C)None", "Q?", ("Cyst, simple", "Cyst (complex)", "None")),
        ("Q? A)Type B) lesion, B)Normal", "Q?", ("Type B) lesion", "Normal")),
        ("Q? A)Grade A, B) mixed, B)Other, C)None", "Q?", ("Grade A, B) mixed", "Other", "None")),
        ("Q? A)Hepatitis (A, B), B)Hepatitis (C), C)HIV", "Q?", ("Hepatitis (A, B)", "Hepatitis (C)", "HIV")),
        ("Is vitamin A) enough? A)Yes, B)No", "Is vitamin A) enough?", ("Yes", "No")),
        ("Stage (T1)? A)IIA), B)IIB)", "Stage (T1)?", ("IIA)", "IIB)")),
        ("Q? A)x B)y C)z D)w", "Q?", ("x", "y", "z", "w")),
        ("Q? (A) x (B) y", "Q?", ("x", "y")),
        ("Q? A. x\nB. y", "Q?", ("x", "y")),
        ("Q? A:x; B:y", "Q?", ("x", "y")),
        ("Q? A)1,000 cells, B)2,000 cells", "Q?", ("1,000 cells", "2,000 cells")),
        ("Q? A)COVID-19, B)Pneumonia, C)N/A, D)A, B and C", "Q?", ("COVID-19", "Pneumonia", "N/A", "A, B and C")),
    ],
)
def test_options_are_found_inside_the_question(problem, question, options):
    assert split_inline(problem) == (question, options)


@pytest.mark.parametrize(
    "problem",
    [
        "Q? A)x, B)y, C)z", "Q?A)x,B)y,C)z", "Q? A) x; B) y; C) z", "Q?\r\nA) x\r\nB) y\r\nC) z\r\n",
        "Q?\nA)x,\nB)y,\nC)z", "Q? A)x , B)y , C)z,", "Q?\u00a0A)\u00a0x,\u00a0B)\u00a0y,\u00a0C)\u00a0z",
        "Q? A )x, B )y, C )z", "Q? A)x | B)y | C)z", "Q? A. x, B. y, C. z", "Q? A.x, B.y, C.z", "Q? A: x, B: y, C: z",
        "Q? A:x B:y C:z", "Q? (A)x, (B)y, (C)z", "Q?\n(A) x\n(B) y\n(C) z", "Q? [A] x, [B] y, [C] z",
        "Q?（A）x，（B）y，（C）z", "Q? A）x，B）y，C）z", "Q? A、x\nB、y\nC、z",
        "Q? a)x, b)y, c)z", "Q?\na. x\nb. y\nc. z",
        "Q? (a) x, (b) y, (c) z", "Q? Options: A)x, B)y, C)z", "Q?\nAnswer Choices: (A) x (B) y (C) z",
    ],
)  # fmt: skip
def test_options_may_be_lettered_and_parted_in_any_usual_way(problem):
    assert split_inline(problem) == ("Q?", ("x", "y", "z"))


@pytest.mark.parametrize(
    ("problem", "question", "options"),
    [
        ("What is shownA)CT, B)MRI", "What is shown", ("CT", "MRI")),
        ("Q? A) Grade A) tumor, B) Cyst", "Q?", ("Grade A) tumor", "Cyst")),
        ("Q? A. E.coli, B. C. difficile, C. None", "Q?", ("E.coli", "C. difficile", "None")),
        ("Which (A, B or C)? A)x_ray., B)No, It's normal, C)A", "Which (A, B or C)?",
         ("x_ray.", "No, It's normal", "A")),
        ("Deposits? A)IgA nephropathy (IgA), B)Other", "Deposits?", ("IgA nephropathy (IgA)", "Other")),
        ("Stage? A)Tumor, T2 N0 M0, Stage Ib, B)Lymphoma, T2 N1 M0", "Stage?",
         ("Tumor, T2 N0 M0, Stage Ib", "Lymphoma, T2 N1 M0")),
    ],
)  # fmt: skip
def test_letters_and_commas_of_medicine_are_no_marks(problem, question, options):
    assert split_inline(problem) == (question, options)


@pytest.mark.parametrize("problem", ["What is it?", "A)only", "Q? B)x, C)y", "Vitamin a. or b. here", ""])
def test_a_question_without_options_is_a_bad_row(problem):
    with pytest.raises(RowError, match="holds no options"):
        split_inline(problem)


def test_a_question_that_reads_in_two_ways_is_a_bad_row():
    with pytest.raises(RowError, match="more than one way"):
        split_inline("Q? A)x, B)y, B)z")


OPTION = (
    st.text("abcdefgh ()-.,'0123456789é医", min_size=1, max_size=25)
    .map(str.strip)
    .filter(lambda text: text and text[-1] not in ",;" and text[0] not in ",;" and text.count("(") == text.count(")"))
)


@given(st.lists(OPTION, min_size=2, max_size=6), st.sampled_from([inline_options, lines_of_options]))
def test_what_the_papers_prompts_write_is_read_back(options, write):
    question, found = split_inline(write("Which one, if any?", options))
    assert (question, found) == ("Which one, if any?", tuple(options))


@pytest.mark.parametrize(
    "value",
    [
        ["x", "y"], {"A": "x", "B": "y"}, {"B": "y", "A": "x", "C": None}, "['x', 'y']", '["x", "y"]', "x|y",
        "A) x, B) y", ["A: x", "B: y"], ["(A) x", "(B) y"], ["A.x", "B.y"], " A:x\n B:y", "x\ny",
        ["a) x", "b) y"], {"a": "x", "b": "y"}, ["[A] x", "[B] y"], "A. x\r\nB. y",
    ],
)  # fmt: skip
def test_options_are_read_from_every_form_of_list(value):
    assert option_list(value) == ("x", "y")


@pytest.mark.parametrize(
    "value", [None, 3, "x", "", ["x", ""], {"A": "x", "C": "y"}, "__import__('os').getcwd()", "[x, y]"]
)
def test_what_is_no_list_is_a_bad_row_and_never_run(value):
    with pytest.raises(RowError):
        option_list(value)


def test_letters_stay_when_they_are_not_all_there():
    assert option_list(["A: x", "y"]) == ("A: x", "y") and option_list(["B. x", "A. y"]) == ("B. x", "A. y")


@pytest.mark.parametrize(
    "answer",
    ["B", "b", "(B)", "B)", "B.", " B ", "<answer> B </answer>", "<answer>B</answer>", "MRI", "mri", "MRI.", "B) MRI",
     "B: MRI", "<answer>MRI</answer>", "<answer>\nB\n</answer>", "<ANSWER> B </ANSWER>", "< answer > B </ answer >",
     "<answer> B <answer>", "<answer> B", "Answer: B", "The answer is B.", "Option B", "[B]", "（B）", "b) mri",
     "M.R.I"],
)  # fmt: skip
def test_an_answer_is_a_letter_or_a_text_or_both(answer):
    assert read_answer(answer, ("CT", "MRI", "PET")) == "B"


def test_a_field_of_letters_is_read_as_a_letter_even_where_an_option_is_called_so():
    assert read_letter("<answer> A </answer>", ("B", "A")) == "A" and read_letter("MRI", ("CT", "MRI")) == "B"


def test_an_options_text_goes_before_its_looks_as_a_letter():
    assert read_answer("A", ("B", "A")) == "B"


def test_punctuation_that_makes_another_number_or_result_is_not_forgiven():
    for answer, option in (("15", "1.5"), ("5", "-5"), ("<5 mm", ">5 mm"), ("HER2-", "HER2+")):
        with pytest.raises(RowError, match="none of the options"):
            read_answer(answer, (option, "x"))
    assert read_answer("No its normal.", ("Yes", "No, It's normal")) == "B"


def test_a_number_is_not_taken_for_a_place_and_that_is_said():
    with pytest.raises(RowError, match="not read as an option's place"):
        read_answer("1", ("CT", "MRI"))


@pytest.mark.parametrize("answer", ["D", "PET scan", "B) CT", "", "none"])
def test_an_answer_that_is_no_option_is_a_bad_row(answer):
    with pytest.raises(RowError):
        read_answer(answer, ("CT", "MRI", "PET"))
