"""Every kind of question in training: what counts as right is the kind's verdict, not the same string."""

import pytest
import yaml

from medrl.data.store import write_store
from medrl.errors import DataError
from medrl.sft import SFT
from medrl.training.curriculum import count_right
from medrl.training.methods import check_demonstrations, keep_best
from medrl.training.metrics import rollout_rows
from medrl.training.monitors import implied, letter_counts, pass_rates, step_monitors
from medrl.training.recipe import run_recipe
from medrl.types import Completion, Example, Group, Groups, Prompt, Rollout, Score

OPTIONS = ("edema", "mass", "cyst")
CASES = {
    # kind: (options, target, tolerance, references), answers that are right, answers that are wrong
    "choice": ((OPTIONS, "B", "", ()), ["B"], ["A", None]),
    "multi_select": ((OPTIONS, "A, C", "", ()), ["A, C", "C, A"], ["A", "A, B, C", None]),
    "yes_no": (((), "yes", "", ()), ["yes"], ["no", None]),
    "numeric": (((), "3.5 cm", "5 %", ()), ["3.5 cm", "35 mm", "3.6 cm"], ["4 cm", "3.5 s", None]),
    "short": (((), "left kidney", "", ("kidney",)), ["left kidney", "The left kidney.", "kidney"], ["liver", None]),
    "box": (((), "10, 10, 30, 40", "", ()), ["10, 10, 30, 40", "11, 10, 30, 40"], ["60, 60, 70, 70", None]),
}


def make_example(kind: str) -> Example:
    (options, target, tolerance, references), _, _ = CASES[kind]
    return Example(
        id=kind, source="s", images=(), question="?", options=options, target=target, kind=kind, tolerance=tolerance,
        references=references,
    )  # fmt: skip


def make_group(kind: str, answers: list[str | None]) -> Group:
    text = "<think>edema</think><answer>x</answer>"
    rollouts = tuple(
        Rollout(
            completion=Completion(text=text, token_ids=(1,) * (n + 1), finish_reason="stop"),
            score=Score(value=1.0, answer=a),
        )
        for n, a in enumerate(answers)
    )
    prompt = Prompt(id=kind, text="?", images=(), mode="think")
    return Group(example=make_example(kind), prompt=prompt, rollouts=rollouts)


@pytest.mark.parametrize("kind", CASES)
def test_right_is_what_the_kind_calls_right(kind):
    _, right, wrong = CASES[kind]
    group = make_group(kind, [*right, *wrong])
    kept = [1.0] * len(right) + [0.0] * len(wrong)
    assert keep_best(group, "all") == kept
    assert sum(keep_best(group, "best")) == 1 and keep_best(group, "best")[0] == 1  # equal rewards: the shortest
    assert count_right(group) == len(right)
    assert pass_rates(Groups((group,)))[1] == pytest.approx(len(right) / len(kept))
    rows = rollout_rows(0, Groups((group,)), [[0.0] * len(kept)])
    assert [row["right"] for row in rows] == [bool(one) for one in kept]
    lengths = step_monitors(Groups((group,)))
    assert lengths["completions/mean_length_right"] == pytest.approx((len(right) + 1) / 2)


def test_letters_are_counted_where_there_are_letters_and_free_answers_are_not():
    groups = [make_group(kind, [CASES[kind][1][0], CASES[kind][2][0], None]) for kind in CASES]
    answers, targets = letter_counts(groups)
    # choice: B, A; multi_select: A+C, A; yes_no: yes, no; each target once per completion
    assert answers == {"A": 3, "B": 1, "C": 1, "no": 1, "yes": 1}
    assert targets == {"A": 3, "B": 3, "C": 3, "no": 0, "yes": 3}


def test_only_a_choice_is_implied_by_a_reasoning():
    thought = Completion(text="<think>It is edema.</think>", token_ids=(), finish_reason="stop")
    assert implied(make_example("choice"), thought) == "A"
    assert implied(make_example("multi_select"), thought) is None


def test_the_released_script_s_answers_are_letters_and_so_must_the_questions_be():
    objective = SFT(emulate="med-r1-released")
    check_demonstrations([make_example("choice")], "no_think", objective)
    with pytest.raises(DataError, match=r"'numeric' is of kind numeric: set sft\.emulate to none"):
        check_demonstrations([make_example("choice"), make_example("numeric")], "no_think", objective)


@pytest.mark.parametrize(("kinds", "part"), [(["choice"], "choice_correct"), (["choice", "short"], "answer_correct")])
def test_a_recipe_without_a_reward_gets_the_one_that_grades_its_kinds_and_the_run_says_so(
    kinds, part, examples, model_folder, small, tmp_path
):
    rows = [make_example(kind) for kind in kinds]
    write_store(tmp_path / "store", [examples[0], *rows], source="s", license="l")
    recipe = {
        "policy": {"model": str(model_folder), "dtype": "float32"},
        "data": {"train": str(tmp_path / "store")},
        "grpo": {"group_size": 2, "kl_coef": 0},
        "training": {**small.model_dump(), "steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = run_recipe(tmp_path / "recipe.yaml", out=tmp_path / "run", quiet=True)
    assert run.recipe["reward"] == {part: 1.0, "well_formed": 1.0}
    assert f"rewards/{part}/mean" in run.metrics()[0]
    assert run_recipe(tmp_path / "recipe.yaml", out=run.path, resume="must", quiet=True).recipe == run.recipe
