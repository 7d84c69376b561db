import hashlib
import operator

import pytest

from medrl.errors import RewardError, SettingsError
from medrl.rewards import check_gold, make_reward
from medrl.rewards.choose import describe_files, locate_files
from medrl.types import Completion, Example

CHOICE = Example(id="c-1", source="omni", images=(), question="?", options=("CT", "MRI"), target="A")
YES_NO = Example(id="y-1", source="VQA-RAD", images=(), question="?", options=(), target="yes", kind="yes_no")
RIGHT = Completion(text="<think>It is a CT.</think><answer>A</answer>", token_ids=(), finish_reason="stop")
YES = Completion(text="<think>x</think><answer>yes</answer>", token_ids=(), finish_reason="stop")

MINE = """
from medrl.types import Score

def lesion_size(example, completion):
    return 0.5 if "lesion" in completion.text else 0.25

def short(example, completion):
    return 1.0

def batched(completions):
    return [1.0 for _ in completions]

number = 3
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my_rewards.py").write_text(MINE)
    return tmp_path


def test_a_reward_by_path_is_that_function(folder):
    assert make_reward("my_rewards.py:lesion_size", [folder])(CHOICE, RIGHT) == 0.25
    assert make_reward("operator:concat", [folder]) is operator.concat


def test_folders_are_searched_in_order(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "my_rewards.py").write_text("def lesion_size(example, completion):\n    return 9.0\n")
    assert make_reward("my_rewards.py:lesion_size", [other, folder])(CHOICE, RIGHT) == 9.0
    assert make_reward("my_rewards.py:short", [folder, other])(CHOICE, RIGHT) == 1.0


def test_parts_of_ours_and_of_the_user_s_go_together(folder):
    reward = make_reward({"choice_correct": 1.0, "my_rewards.py:lesion_size": 0.5}, [folder])
    score = reward(CHOICE, RIGHT)
    assert score.value == 1.125 and score.parts == {"choice_correct": 1.0, "lesion_size": 0.25}


def test_every_source_has_its_reward(folder):
    spec = {"by_source": {"VQA-RAD": {"answer_correct": 2.0}, "default": {"choice_correct": 1.0, "well_formed": 1.0}}}
    reward = make_reward(spec, [folder])
    assert reward(YES_NO, YES).parts == {"answer_correct": 1.0} and reward(YES_NO, YES).value == 2.0
    assert reward(CHOICE, RIGHT).parts == {"choice_correct": 1.0, "well_formed": 1.0}
    # Full marks are 2 for both here, and 2 and 1 where they differ: each source is held to its own.
    spec["by_source"]["default"] = {"choice_correct": 1.0}
    assert check_gold(make_reward(spec, [folder]), [YES_NO, CHOICE], "think") == []


def test_a_source_without_a_reward_is_named():
    reward = make_reward({"by_source": {"VQA-RAD": {"answer_correct": 1.0}}})
    with pytest.raises(RewardError, match=r"'c-1'.*'omni'.*VQA-RAD"):
        reward(CHOICE, RIGHT)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("my_rewards.py:lesion_sise", "did you mean lesion_size"),
        ("my_rewards.py:number", "cannot be called"),
        ("my_rewards.py:batched", r"from_trl, from_verl, from_easyr1"),
        ("other_rewards.py:lesion_size", "there is no file other_rewards.py in"),
        ("no_such_package.rewards:f", "there is no module no_such_package"),
        ("choice_correct", "FILE.py:FUNCTION"),
        ("my_rewards.py:", "FILE.py:FUNCTION"),
        ({"my_rewards.py:nothing": 1.0}, "has no nothing"),
        ({"choice_corect": 1.0}, "did you mean 'choice_correct'"),
        ({"choice_correct": "much"}, "weight of choice_correct"),
        ({}, "at least one part"),
        ({"by_source": {}}, "stands alone"),
        ({"by_source": {"a": {"choice_correct": 1.0}}, "well_formed": 1.0}, "stands alone"),
        ({"by_source": {"a": 1.0}}, "by_source.a"),
        ({"by_source": {"a": {"by_source": {"b": {"choice_correct": 1.0}}}}}, "by_source.a"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_would_do(folder, spec, words):
    with pytest.raises(SettingsError, match=words):
        make_reward(spec, [folder])


def test_a_file_that_fails_is_named_with_its_error(folder):
    (folder / "broken.py").write_text("1 / 0\n")
    with pytest.raises(SettingsError, match=r"broken.py:f: the file fails with ZeroDivisionError"):
        make_reward("broken.py:f", [folder])
    (folder / "broken.py").write_text("def f(:\n")
    with pytest.raises(SettingsError, match="SyntaxError"):
        make_reward("broken.py:f", [folder])


def test_the_files_of_a_reward_are_described_by_their_content(folder):
    digest = {"my_rewards.py": hashlib.sha256(MINE.encode()).hexdigest()}
    assert describe_files("my_rewards.py:short", [folder]) == digest
    assert describe_files({"choice_correct": 1.0, "my_rewards.py:short": 1.0}, [folder]) == digest
    assert describe_files({"by_source": {"a": {"my_rewards.py:short": 1}, "b": "operator:concat"}}, [folder]) == digest
    assert describe_files({"choice_correct": 1.0}, [folder]) == {}


def test_a_reward_with_its_files_located_means_the_same_without_folders(folder):
    file = str(folder / "my_rewards.py")
    assert locate_files("my_rewards.py:short", [folder]) == f"{file}:short"
    mixed = {"choice_correct": 1.0, "my_rewards.py:short": 0.5, "operator:concat": 0.5}
    assert locate_files(mixed, [folder]) == {"choice_correct": 1.0, f"{file}:short": 0.5, "operator:concat": 0.5}
    by_source = {"by_source": {"a:b": {"my_rewards.py:short": 1}, "default": "my_rewards.py:lesion_size"}}
    located = locate_files(by_source, [folder])
    assert located == {"by_source": {"a:b": {f"{file}:short": 1}, "default": f"{file}:lesion_size"}}
    assert describe_files(located) == {file: describe_files(by_source, [folder])["my_rewards.py"]}
    assert locate_files("not_there.py:short", [folder]) == "not_there.py:short"  # make_reward says where it looked
