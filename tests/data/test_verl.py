"""verl's own classes read what is exported for it, and score with the reward file that is shipped."""

from pathlib import Path

import pyarrow.parquet
import pytest

from medrl.data import store
from medrl.data.export import export_data

REWARD_FILE = Path(__file__).parents[2] / "recipes" / "verl_reward.py"


@pytest.fixture
def exported(make_examples, tmp_path):
    examples = make_examples(tmp_path / "images", 4)
    store.write_store(tmp_path / "store", examples, source="noise", license="none")
    export_data(tmp_path / "store", "verl", tmp_path / "verl", mode="think")
    return examples, tmp_path / "verl" / "data.parquet"


def answer(letter: str) -> str:
    return f"<think>One looks.</think><answer>{letter}</answer>"


def check_scores(compute_score, row: dict, target: str) -> None:
    given = (row["data_source"], row["reward_model"]["ground_truth"], row["extra_info"])
    source, truth, extra = given
    right = compute_score(data_source=source, solution_str=answer(target), ground_truth=truth, extra_info=extra)
    assert (right["score"], right["choice_correct"], right["well_formed"]) == (2.0, 1.0, 1.0)
    wrong = "B" if target == "A" else "A"
    assert (
        compute_score(data_source=source, solution_str=answer(wrong), ground_truth=truth, extra_info=extra)["score"]
        == 1
    )
    unreadable = compute_score(data_source=source, solution_str="no idea", ground_truth=truth, extra_info=extra)
    assert unreadable["score"] == 0


def test_an_exported_row_holds_all_that_the_reward_file_needs(exported):
    import runpy

    examples, file = exported
    compute_score = runpy.run_path(str(REWARD_FILE))["compute_score"]
    rows = pyarrow.parquet.read_table(file).to_pylist()
    for row, example in zip(rows, examples, strict=True):
        check_scores(compute_score, row, example.target)


@pytest.mark.interop
def test_verl_s_own_dataset_and_reward_loader_take_both(exported, processor):
    pytest.importorskip("verl")
    pytest.importorskip("ray")
    from omegaconf import OmegaConf
    from verl.trainer.ppo.reward import get_custom_reward_fn
    from verl.utils.dataset.rl_dataset import RLHFDataset

    examples, file = exported
    config = OmegaConf.create(
        {"max_prompt_length": 4096, "filter_overlong_prompts": False, "cache_dir": str(file.parent / "cache")}
    )
    rows = RLHFDataset(str(file), processor.tokenizer, config, processor=processor)
    assert len(rows) == len(examples)
    chosen = {"path": str(REWARD_FILE), "name": "compute_score"}
    compute_score = get_custom_reward_fn(OmegaConf.create({"reward": {"custom_reward_function": chosen}}))
    for number, example in enumerate(examples):
        row = rows[number]
        kinds = [part["type"] for part in row["raw_prompt"][0]["content"]]
        assert kinds.count("image") == len(example.images) and "text" in kinds
        check_scores(compute_score, row, example.target)
