import json
from types import SimpleNamespace

import numpy as np
import pytest

from medrl.errors import RewardError
from medrl.rewards import choice_correct, from_weights, weighted, well_formed
from medrl.rewards.adapters import as_easyr1, as_trl, as_verl, columns_of, from_easyr1, from_trl, from_verl
from medrl.types import KINDS, Completion, Example

EXAMPLE = Example(id="ct-1", source="omni", images=(), question="Which?", options=("CT", "MRI"), target="A")
YES_NO = Example(id="y-1", source="rad", images=(), question="Is it?", options=(), target="yes", kind="yes_no")
REWARD = weighted((1.0, choice_correct), (0.5, well_formed))
RIGHT = "<think>x</think><answer>A</answer>"
WRONG = "<think>x</think><answer>B</answer>"
BARE = "A"


def completion(text: str) -> Completion:
    return Completion(text=text, token_ids=(1, 2), finish_reason="stop")


def test_columns_are_plain_json_and_lose_nothing_that_grading_needs():
    given = Example(
        id="n", source="s", images=(), question="?", options=("a", "b"), target="3 cm", kind="numeric",
        references=("x",), tolerance="5 %",
    )  # fmt: skip
    columns = columns_of(given, "no_think")
    assert json.loads(json.dumps(columns)) == columns
    assert columns == {
        "id": "n", "source": "s", "question": "?", "options": ["a", "b"], "target": "3 cm", "kind": "numeric",
        "mode": "no_think", "references": ["x"], "tolerance": "5 %",
    }  # fmt: skip
    assert len(KINDS) == 6


def test_trl_calls_a_reward_with_lists_of_texts_or_conversations():
    reward, columns = as_trl(REWARD), columns_of(EXAMPLE, "think")
    lists = {name: [value] * 3 for name, value in columns.items()}
    values = reward(prompts=["p"] * 3, completions=[RIGHT, WRONG, BARE], trainer_state=None, **lists)
    assert values == [1.5, 0.5, 1.0]
    talk = [[{"role": "assistant", "content": text}] for text in (RIGHT, WRONG)]
    pieces = [[{"role": "assistant", "content": [{"type": "text", "text": RIGHT}]}]]
    assert reward(prompts=["p"] * 3, completions=talk + pieces, **lists) == [1.5, 0.5, 1.5]


def test_trl_gets_an_error_that_names_the_row_that_has_no_target():
    with pytest.raises(RewardError, match=r"'ct-1' has no target; .*columns_of"):
        as_trl(REWARD)(prompts=["p"], completions=[RIGHT], id=["ct-1"])


def test_verl_gets_the_score_and_its_parts():
    columns = columns_of(EXAMPLE, "think")
    given = as_verl(REWARD)("omni", RIGHT, columns.pop("target"), extra_info={**columns, "split": "train", "index": 4})
    assert given == {"score": 1.5, "choice_correct": 1.0, "well_formed": 1.0}
    assert as_verl(REWARD)(data_source="omni", solution_str=WRONG, ground_truth="A", extra_info=columns)["score"] == 0.5


def test_rows_of_a_data_frame_hold_lists_as_arrays():
    columns = columns_of(EXAMPLE, "think")
    row = {**columns, "options": np.array(columns["options"]), "references": np.array([]), "tolerance": None}
    assert as_verl(REWARD)("omni", RIGHT, row.pop("target"), row)["score"] == 1.5


def test_easyr1_calls_with_one_input_or_with_a_list():
    truth = json.dumps(columns_of(EXAMPLE, "think"))
    given = [{"response": text, "response_length": 5, "ground_truth": truth} for text in (RIGHT, BARE)]
    right = {"overall": 1.5, "choice_correct": 1.0, "well_formed": 1.0}
    assert as_easyr1(REWARD)(given[0]) == right
    assert as_easyr1(REWARD)(given) == [right, {"overall": 1.0, "choice_correct": 1.0, "well_formed": 0.0}]
    with pytest.raises(RewardError, match="not an example as JSON"):
        as_easyr1(REWARD)({"response": RIGHT, "response_length": 5, "ground_truth": "A"})


def test_an_example_may_travel_as_json_in_one_column():
    own = json.dumps({**columns_of(EXAMPLE, "think"), "patient": None, "image_names": ["images/a.png"]})
    without_mode = json.dumps({k: v for k, v in columns_of(EXAMPLE, "think").items() if k != "mode"})
    assert as_trl(REWARD)(prompts=[""], completions=[RIGHT], medrl=[own], solution=["A"]) == [1.5]
    assert as_trl(REWARD, mode="no_think")(prompts=[""], completions=["<answer>A</answer>"], medrl=[without_mode]) == [
        1.5
    ]
    assert as_verl(REWARD)("omni", RIGHT, "A", {"index": 3, "medrl": own})["score"] == 1.5
    assert as_easyr1(REWARD)({"response": WRONG, "response_length": 3, "ground_truth": without_mode})["overall"] == 0.5


def test_a_reward_survives_the_way_there_and_back():
    for there, back in ((as_trl, from_trl), (as_verl, from_verl)):
        part = back(there(REWARD))
        for text in (RIGHT, WRONG, BARE, ""):
            assert part(EXAMPLE, completion(text)) == REWARD(EXAMPLE, completion(text)).value
    talking = from_trl(as_trl(REWARD), conversational=True)
    assert talking(EXAMPLE, completion(RIGHT)) == 1.5


@pytest.mark.parametrize("trainer", ["grpo_trainer.GRPOTrainer", "rloo_trainer.RLOOTrainer"])
def test_trl_s_own_trainers_call_it_with_rows_of_a_data_set(trainer):
    datasets = pytest.importorskip("datasets")
    module, name = trainer.split(".")
    trainer_class = getattr(pytest.importorskip(f"trl.trainer.{module}"), name)
    rows = [
        {"prompt": "Which?", **columns_of(given, mode)} for given, mode in [(EXAMPLE, "think"), (YES_NO, "no_think")]
    ]
    inputs = list(datasets.Dataset.from_list(rows))
    accelerator = SimpleNamespace(device="cpu", gather=lambda values: values, is_main_process=True)
    reward = as_trl(from_weights({"answer_correct": 1.0, "well_formed": 0.5}))
    stand_in = SimpleNamespace(
        reward_funcs=[reward], reward_func_names=["medrl"], reward_processing_classes=[None], accelerator=accelerator,
        state=SimpleNamespace(global_step=0), _log_completion_extra=None, _log_metric=None, environments=None,
        args=SimpleNamespace(report_to=[]),
    )  # fmt: skip
    completions = [WRONG, "<answer>yes</answer>"]
    values = trainer_class._calculate_rewards(stand_in, inputs, ["Which?"] * 2, completions, [[1], [1]])
    assert values.tolist() == [[0.5], [1.5]]


def test_trl_s_own_function_becomes_a_part():
    rewards = pytest.importorskip("trl.rewards")
    part = from_trl(rewards.think_format_reward, conversational=True)
    assert part.__name__ == "think_format_reward"
    score = weighted((1.0, choice_correct), (1.0, part))(EXAMPLE, completion(RIGHT))
    assert score.parts == {"choice_correct": 1.0, "think_format_reward": 1.0}
    assert part(EXAMPLE, completion(BARE)) == 0.0


def test_a_function_of_verl_s_or_easyr1_s_form_becomes_a_part():
    def verl(data_source, solution_str, ground_truth, extra_info=None):
        assert (data_source, ground_truth, extra_info["options"]) == ("omni", "A", ["CT", "MRI"])
        return {"score": 0.75, "acc": 1.0}

    def easyr1(reward_input, format_weight=0.5):
        return {"overall": float(reward_input["ground_truth"] in reward_input["response"])}

    assert from_verl(verl)(EXAMPLE, completion(RIGHT)) == 0.75
    assert from_verl(lambda *_: 1)(EXAMPLE, completion(RIGHT)) == 1.0
    assert from_easyr1(easyr1)(EXAMPLE, completion(RIGHT)) == 1.0
    assert from_easyr1(lambda inputs: [easyr1(one) for one in inputs], batch=True)(EXAMPLE, completion("x")) == 0.0


@pytest.mark.parametrize("values", [[], [1.0, 0.0], 1.0, {"a": 1}])
def test_a_list_of_the_wrong_length_is_an_error_that_names_the_sample(values):
    def wrong(prompts, completions, **columns):
        return values

    with pytest.raises(RewardError, match=r"wrong on example 'ct-1' returned .* 1 completion"):
        from_trl(wrong)(EXAMPLE, completion(RIGHT))


def test_a_score_that_is_no_number_is_an_error_that_names_the_sample():
    with pytest.raises(RewardError, match="'ct-1' returned None; it must be a number"):
        from_trl(lambda prompts, completions, **_: [None])(EXAMPLE, completion(RIGHT))
    with pytest.raises(RewardError, match="1 score for 1 completion"):
        from_easyr1(lambda inputs: [], batch=True)(EXAMPLE, completion(RIGHT))


def test_every_kind_travels():
    columns = {name: [value] for name, value in columns_of(YES_NO, "no_think").items()}
    reward = as_trl(from_weights({"answer_correct": 1.0, "well_formed": 1.0}))
    assert reward(prompts=[""], completions=["<answer>Yes.</answer>"], **columns) == [2.0]
