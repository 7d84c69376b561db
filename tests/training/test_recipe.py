import shutil
from pathlib import Path

import pytest
import yaml

from medrl.data.store import load, read_info, write_store
from medrl.errors import DataError, PolicyError, RunError, SettingsError
from medrl.grpo import GRPO
from medrl.policy.policy import Policy
from medrl.sft import SFT
from medrl.training import recipe as recipe_module
from medrl.training.methods import demonstrate
from medrl.training.recipe import Data, Recipe, run_recipe, select


@pytest.fixture
def store(examples, tmp_path) -> Path:
    write_store(tmp_path / "store", examples, source="noise", license="none")
    return tmp_path / "store"


@pytest.fixture
def recipe(store, model_folder, small, tmp_path) -> Path:
    content = {
        "policy": {"model": str(model_folder), "dtype": "float32"},
        "data": {"train": str(store), "modality": ["MRI"]},
        "grpo": {"group_size": 2},
        "training": {**small.model_dump(), "steps": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


def test_auto_compiles_nothing_where_weights_lie_in_pieces(recipe, monkeypatch):
    asked = []
    monkeypatch.setattr(recipe_module, "load_policy", lambda settings: asked.append(settings.compile_layers))
    monkeypatch.setattr(recipe_module, "train", lambda *_, **__: None)
    monkeypatch.setattr(recipe_module, "world_size", lambda: 2)
    for words in ([], ["scale.strategy=fsdp"], ["scale.strategy=fsdp", "policy.compile_layers=true"]):
        run_recipe(recipe, words, out=recipe.parent / "run")
    assert asked == ["auto", False, True]  # what was asked for outright is refused with a reason, later


def test_a_recipe_trains_what_it_says(recipe, store, tmp_path):
    run = run_recipe(recipe, ["training.steps=1", "training.prompts_per_step=3"], out=tmp_path / "run", quiet=True)
    assert len(run.metrics()) == 1
    rows = list(run.rollouts())
    assert {row["prompt_id"] for row in rows} == {"example-1", "example-3", "example-5"}  # the MRI rows
    assert len(rows) == 3 * 2
    assert all((store / row["images"][0]).is_file() for row in rows)
    assert run.recipe["training"]["steps"] == 1 and run.recipe["grpo"]["kl_coef"] == 0.04
    assert run.provenance["data_fingerprint"] == read_info(store).fingerprint
    assert run.provenance["train_rows"] == 3


def test_the_store_is_loaded_once_and_verified_by_the_first_rank(recipe, store, monkeypatch):
    loaded, given, trained = [], [], {}
    load, verify = recipe_module.store.load, recipe_module.store.verify
    monkeypatch.setattr(recipe_module.store, "load", lambda path: loaded.append(path) or load(path))
    monkeypatch.setattr(recipe_module.store, "verify", lambda path, rows: given.append(rows) or verify(path, rows))
    monkeypatch.setattr(recipe_module, "load_policy", lambda settings: None)
    monkeypatch.setattr(recipe_module, "train", lambda *_, **options: trained.update(options))
    run_recipe(recipe, out=recipe.parent / "run")
    assert loaded == [store] and given == [load(store)]
    assert trained["provenance"]["data_fingerprint"] == read_info(store).fingerprint
    monkeypatch.setattr(recipe_module, "from_first", lambda work: "of the first")  # as on the other ranks
    run_recipe(recipe, out=recipe.parent / "run")
    assert len(given) == 1 and trained["provenance"]["data_fingerprint"] == "of the first"


def test_the_recipe_a_run_keeps_trains_the_same_run(recipe, tmp_path):
    first = run_recipe(recipe, out=tmp_path / "first", quiet=True)
    again = run_recipe(first.path / "recipe.yaml", out=tmp_path / "again", quiet=True)
    assert again.recipe == first.recipe
    assert list(again.rollouts()) == list(first.rollouts())


def test_a_method_chooses_its_objective(model_folder, store):
    parts = {"policy": {"model": str(model_folder)}, "data": {"train": store}}
    assert isinstance(Recipe(**parts).objective, GRPO)
    assert isinstance(Recipe(**parts, method="sft").objective, SFT)


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("training.stepz=3", SettingsError, "steps"),
        ("grpo.group_size=1", SettingsError, "at least 2"),
        ("method=dpo", SettingsError, "dpo"),
        ("reward.choice_corect=1", SettingsError, "choice_correct"),
        ("data.modality=[OCT]", DataError, "OCT.*has CT, MRI"),
        ("data.train=/no/such/store", DataError, "/no/such/store"),
        ("policy.model=/no/such/model", PolicyError, "/no/such/model"),
        ("policy.dtype=float16", SettingsError, "float16 cannot be trained in"),
        ("training.template=med-r1", SettingsError, "med-r1"),
    ],
)
def test_what_is_wrong_is_named_and_no_run_folder_is_made(recipe, tmp_path, override, error, words):
    with pytest.raises(error, match=words):
        run_recipe(recipe, [override], out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_on_data_that_have_changed(recipe, store, examples, tmp_path):
    run_recipe(recipe, out=tmp_path / "run", quiet=True)
    run_recipe(recipe, out=tmp_path / "run", resume="must", quiet=True)
    shutil.rmtree(store)
    write_store(store, examples[:5], source="noise", license="none")
    with pytest.raises(RunError, match="data"):
        run_recipe(recipe, out=tmp_path / "run", resume="must", quiet=True)


def test_a_run_is_resumed_with_settings_that_change_no_result_and_others_are_named(recipe, tmp_path):
    run_recipe(recipe, out=tmp_path / "run", quiet=True)
    harmless = ["training.save_every=1", "training.tokens_per_micro_batch=900", "policy.checkpoint_activations=true"]
    run_recipe(recipe, harmless, out=tmp_path / "run", resume="must", quiet=True)
    changed = [*harmless, "policy.lora.rank=4", "grpo.kl_coef=0.1", "training.steps=3"]
    with pytest.raises(SettingsError) as error:
        run_recipe(recipe, changed, out=tmp_path / "run", resume="auto", quiet=True)
    words = str(error.value)
    assert "grpo.kl_coef was 0.04 and is now 0.1; policy.lora was empty and is now not set" in words
    assert "policy.lora.rank was not set and is now 4" in words
    assert "training.steps was 2 and is now 3 (the learning rate falls over them)" in words
    assert not [name for name in ("save_every", "micro_batch", "checkpoint_activations") if name in words]


def test_a_run_may_be_resumed_where_the_same_data_lie_elsewhere(recipe, store, tmp_path):
    run_recipe(recipe, out=tmp_path / "run", quiet=True)
    moved = store.rename(tmp_path / "moved")
    run_recipe(recipe, [f"data.train={moved}"], out=tmp_path / "run", resume="must", quiet=True)


def test_filters_and_limit_keep_the_rows_in_order(examples):
    def kept(**filters) -> list[str]:
        return [example.id for example in select(examples, Data(train=Path("store"), **filters))]

    assert kept() == [f"example-{i}" for i in range(7)]
    assert kept(modality=("CT",)) == ["example-0", "example-2", "example-4", "example-6"]
    assert kept(modality=("CT",), limit=2) == ["example-0", "example-2"]
    assert kept(question_type=("Modality Recognition",), modality=("MRI", "CT"), limit=99) == kept()


def test_a_demonstration_is_the_right_answer_in_the_form_asked_for(model_folder, store):
    from medrl.data.prompts import make_prompt
    from medrl.rewards import from_weights

    policy, examples = Policy.load(model_folder), load(store)
    reward = from_weights({"choice_correct": 1.0, "well_formed": 1.0})
    for mode in ("no_think", "think_after", "think"):
        groups = demonstrate(policy, examples, lambda example, mode=mode: make_prompt(example, mode))
        for group in groups:
            (rollout,) = group.rollouts
            assert rollout.completion.mode == mode
            assert policy.decode(rollout.completion.token_ids) == rollout.completion.text
            assert rollout.completion.token_ids[-1] == policy.eos_token_id
            assert reward(group.example, rollout.completion).parts["choice_correct"] == 1.0
