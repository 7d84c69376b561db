import pytest
from PIL import Image

from medrl.data.store import load, read_info, write_store
from medrl.errors import DataError, SettingsError
from medrl.settings import load_settings
from medrl.study.settings import Study, StudyData, method_recipe
from medrl.study.stores import prepare_stores
from medrl.types import Example


@pytest.fixture(scope="module")
def source(tmp_path_factory, noise):
    """Forty pictures of two modalities, two questions of two types about each."""
    folder = tmp_path_factory.mktemp("source")
    examples = []
    for i in range(40):
        path = folder / f"{i}.png"
        noise(i).resize((64, 64), Image.Resampling.NEAREST).save(path)
        for kind in ("Modality Recognition", "Disease Diagnosis"):
            examples.append(
                Example(
                    id=f"{i}-{kind}", source="noise", images=(path,), question=kind, options=("CT", "MRI"), target="A",
                    modality=("CT", "MRI")[i % 2], question_type=kind,
                )
            )  # fmt: skip
    write_store(folder / "store", examples, source="noise", license="none")
    return folder / "store"


def test_a_divided_store_shares_no_picture_between_train_and_test(source, tmp_path):
    stores = prepare_stores(StudyData(store=source, test_fraction=0.25), tmp_path, quiet=True)
    train, test = load(stores.train), load(stores.test)
    assert len(train) + len(test) == 80 and len(test) == 20
    assert not {e.id.split("-")[0] for e in train} & {e.id.split("-")[0] for e in test}
    assert {e.modality for e in test} == {"CT", "MRI"}


def test_sizes_count_in_each_domain(source, tmp_path):
    data = StudyData(store=source, test_fraction=0.25, train_size=12, test_size=6)
    stores = prepare_stores(data, tmp_path, quiet=True)
    assert read_info(stores.train).modalities == {"CT": 12, "MRI": 12}
    assert read_info(stores.test).modalities == {"CT": 6, "MRI": 6}


def test_only_what_is_to_be_kept_is_kept_and_given_stores_stay_as_they_are(source, tmp_path):
    keep = {"question_type": ("Modality Recognition",)}
    stores = prepare_stores(StudyData(store=source, keep=keep), tmp_path / "a", quiet=True)
    assert {e.question_type for e in load(stores.train) + load(stores.test)} == {"Modality Recognition"}
    given = prepare_stores(StudyData(train=stores.train, test=stores.test), tmp_path / "b", quiet=True)
    assert given == stores and not (tmp_path / "b").exists()
    narrower = StudyData(train=stores.train, test=stores.test, keep={"modality": ("MRI",)})
    kept = prepare_stores(narrower, tmp_path / "c", quiet=True)
    assert read_info(kept.train).modalities.keys() == {"MRI"} and read_info(kept.test).modalities.keys() == {"MRI"}


def test_stores_that_are_there_are_used_again_and_others_are_not_taken_for_them(source, tmp_path):
    data = StudyData(store=source)
    first = read_info(prepare_stores(data, tmp_path, quiet=True).train)
    written = (tmp_path / "data" / "train" / "store.json").stat().st_mtime_ns
    assert read_info(prepare_stores(data, tmp_path, quiet=True).train) == first
    assert (tmp_path / "data" / "train" / "store.json").stat().st_mtime_ns == written
    with pytest.raises(SettingsError, match="other settings"):
        prepare_stores(StudyData(store=source, seed=1), tmp_path, quiet=True)


def test_a_value_that_is_not_there_is_named_with_those_that_are(source, tmp_path):
    with pytest.raises(DataError, match=r"PET, but .* has CT, MRI"):
        prepare_stores(StudyData(store=source, keep={"modality": ("PET",)}), tmp_path, quiet=True)


@pytest.mark.parametrize("data", [{}, {"train": "a"}, {"demo": True, "store": "a"}])
def test_data_come_from_exactly_one_place(data):
    with pytest.raises(SettingsError, match="needs one of"):
        StudyData(**data)


def test_a_method_is_the_shared_recipe_with_its_own_words_laid_over(tmp_path):
    (tmp_path / "own.yaml").write_text(
        "method: grpo\npolicy: {model: elsewhere}\ndata: {train: x}\ngrpo: {group_size: 6}\ntraining: {steps: 9}\n"
    )
    study = load_settings(
        Study,
        {
            "data": {"train": "a", "test": "b"},
            "axes": {"modality": {}},
            "policy": {"model": "base"},
            "recipe": {"reward": {"choice_correct": 1.0, "well_formed": 1.0}, "training": {"steps": 5, "seed": 1}},
            "methods": {
                "sft": {"method": "sft", "training": {"mode": "no_think"}, "reward": {"choice_correct": 2.0}},
                "filed": {"recipe": "own.yaml", "training": {"mode": "no_think"}},
            },
        },
    )
    sft = method_recipe(study, "sft", tmp_path / "train", tmp_path)
    assert (sft.method, sft.training.steps, sft.training.mode, sft.training.seed) == ("sft", 5, "no_think", 1)
    assert sft.reward == {"choice_correct": 2.0} and sft.policy.model == "base"
    filed = method_recipe(study, "filed", tmp_path / "train", tmp_path)
    assert (filed.grpo.group_size, filed.training.steps, filed.training.mode) == (6, 9, "no_think")
    assert filed.policy.model == "base"  # one base for all, whatever the file says
    assert filed.data.train == tmp_path / "train"
