from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import Field

from medrl.errors import SettingsError
from medrl.grpo.settings import GRPO
from medrl.settings import Settings, dump_settings, load_settings


class Recipe(Settings):
    model: str
    """Where the weights come from."""
    steps: int = Field(default=500, ge=1)
    lr: float = 1e-6
    shuffle: bool = True
    out: Path = Path("runs/x")
    betas: tuple[float, float] = (0.9, 0.999)
    grpo: GRPO = GRPO()
    second: GRPO | None = None
    compiled: Literal["auto"] | bool = "auto"


def message_of(recipe, overrides=(), cls: type[Settings] = Recipe) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(cls, recipe, overrides)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


GRPO_HAS = "it has " + ", ".join(sorted(GRPO.model_fields))


def test_a_recipe_with_overrides_becomes_settings(tmp_path):
    path = write(tmp_path, "model: tiny\nlr: 1e-6\ngrpo:\n  group_size: 4\n")
    settings = load_settings(Recipe, path, ["grpo.group_size=16", "second.kl_coef=0", "shuffle=no", "betas=[0.8, 0.9]"])
    assert settings.grpo == GRPO(group_size=16)
    assert settings.second == GRPO(kl_coef=0.0)
    assert (settings.lr, settings.shuffle, settings.betas) == (1e-6, False, (0.8, 0.9))


def test_an_override_leaves_the_mapping_it_was_given_alone():
    recipe = {"model": "tiny", "grpo": {"group_size": 4}}
    load_settings(Recipe, recipe, ["grpo.group_size=16"])
    assert recipe == {"model": "tiny", "grpo": {"group_size": 4}}


def test_an_exponent_without_a_point_is_a_number_though_yaml_reads_text():
    assert yaml.safe_load("1e-6") == "1e-6"
    assert load_settings(Recipe, {"model": "tiny"}, ["lr=1e-6"]).lr == 1e-6


def test_dumped_settings_are_plain_yaml_that_loads_to_the_same(tmp_path):
    settings = load_settings(Recipe, {"model": "tiny", "second": {"kl_coef": "1e-3"}, "out": "runs/y"})
    path = write(tmp_path, yaml.safe_dump(dump_settings(settings)))
    assert load_settings(Recipe, path) == settings


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        GRPO().group_size = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_the_docstring_of_a_field_is_its_description():
    assert GRPO.model_fields["group_size"].description == "Completions per prompt (G)."


def test_an_unknown_key_names_the_near_ones_and_all_there_are(tmp_path):
    path = write(tmp_path, "model: tiny\ngrpo:\n  grup_size: 8\n")
    assert message_of(path) == f"{path}: grpo: GRPO has no setting 'grup_size'; did you mean group_size? {GRPO_HAS}"


def test_an_unknown_key_near_nothing_lists_what_there_is():
    assert message_of({"zzz": 1}, cls=GRPO) == f"settings: GRPO has no setting 'zzz'; {GRPO_HAS}"


def test_settings_made_in_code_raise_the_same_errors():
    with pytest.raises(SettingsError, match=r"^GRPO has no setting 'grup_size'; did you mean group_size\?"):
        GRPO(grup_size=8)  # pyright: ignore[reportCallIssue]


def test_an_unknown_key_in_an_override_shows_the_override(tmp_path):
    path = write(tmp_path, "model: tiny\n")
    expected = (
        f"{path} with grpo.grup_size=8: grpo: GRPO has no setting 'grup_size'; did you mean group_size? {GRPO_HAS}"
    )
    assert message_of(path, ["grpo.grup_size=8"]) == expected


def test_all_problems_are_told_at_once():
    assert message_of({"steps": "many", "grpo": {"kl_coef": True}}).splitlines() == [
        "settings: Recipe needs the setting 'model', which is not given",
        "settings: steps is the text 'many', but it must be a whole number",
        "settings: grpo: kl_coef is true, but it must be a number",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=2.5", "steps is 2.5, but it must be a whole number"),
        ("steps=yes", "steps is true, but it must be a number"),
        ("steps=", "steps is empty, but it must be a whole number"),
        ("steps=0", "steps is 0, but it must be at least 1"),
        ("lr=fast", "lr is the text 'fast', but it must be a number"),
        ("lr=.nan", "lr is nan, but it must be a finite number"),
        ("shuffle=7", "shuffle is 7, but it must be true or false"),
        ("model=[a]", "model is the list ['a'], but it must be text"),
        ("betas=0.9", "betas is 0.9, but it must be a list"),
        ("betas=[0.9]", "betas is the list [0.9], but it needs 2 values or more"),
        ("betas=[0.9, x]", "betas.1 is the text 'x', but it must be a number"),
        ("grpo=5", f"grpo is 5, but it must be {GRPO_HAS.replace('it has', 'a section with')}"),
        ("grpo.reduction=mean", "grpo: reduction is the text 'mean', but it must be 'sequence', 'token' or 'constant'"),
    ],
)
def test_a_wrong_value_says_what_was_given_and_what_would_do(override, expected):
    assert message_of({"model": "tiny"}, [override]) == f"settings with {override}: {expected}"


def test_an_override_without_a_value_shows_how_to_write_one():
    assert message_of({}, ["steps"]) == "override 'steps' is not key=value; write it as in grpo.group_size=8"
    assert message_of({}, ["grpo..a=1"]).endswith("write it as in grpo.group_size=8")


def test_an_override_below_a_plain_value_is_an_error():
    assert message_of({"steps": 3}, ["steps.x=1"]) == "override 'steps.x=1': steps is 3, not a section with settings"


def test_an_override_that_is_no_yaml_is_an_error():
    assert message_of({}, ["model={"]).startswith("override 'model={': '{' is not valid YAML: ")


def test_a_missing_recipe_says_so_and_names_near_ones(tmp_path):
    write(tmp_path, "model: tiny\n")
    missing = tmp_path / "recipes.yaml"
    assert message_of(missing) == (
        f"recipe {missing} does not exist; give the path of a YAML file; {tmp_path} has recipe.yaml"
    )


def test_a_folder_is_no_recipe(tmp_path):
    assert message_of(tmp_path) == f"recipe {tmp_path} is a folder; give the path of a YAML file"


def test_bytes_that_are_no_text_are_no_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert message_of(path).startswith(f"recipe {path} is not UTF-8 text")


@pytest.mark.parametrize(
    "text", ["model: [", "day: 2026-99-99", "x: !!python/object/apply:os.getcwd []", "a: 1\n b: 2"]
)
def test_malformed_or_executable_yaml_is_an_error(tmp_path, text):
    path = write(tmp_path, text)
    assert message_of(path).startswith(f"recipe {path} is not valid YAML: ")


def test_a_recipe_that_is_no_mapping_is_an_error(tmp_path):
    path = write(tmp_path, "- a\n- b\n")
    assert message_of(path) == f"{path} holds the list ['a', 'b'], but a recipe is a list of 'key: value' lines"


def test_an_empty_recipe_is_all_defaults(tmp_path):
    assert load_settings(GRPO, write(tmp_path, "# nothing\n")) == GRPO()


def test_a_key_given_twice_is_an_error_that_names_both_lines(tmp_path):
    path = write(tmp_path, "model: tiny\ngrpo:\n  kl_coef: 0\n  group_size: 4\n  kl_coef: 1\n")
    assert message_of(path) == f"{path}: 'grpo.kl_coef' is given twice, on lines 3 and 5; keep one of them"


def test_a_key_that_is_no_text_is_an_error(tmp_path):
    path = write(tmp_path, "model: tiny\ngrpo:\n  on: 1\n")
    assert message_of(path) == f"{path}: the key true is true; put it in quotes"


def test_a_recipe_can_share_a_section_by_an_anchor(tmp_path):
    path = write(tmp_path, "model: tiny\ngrpo: &g\n  group_size: 4\nsecond: *g\n")
    assert load_settings(Recipe, path).second == GRPO(group_size=4)


@pytest.mark.parametrize("given", ["maybe", "3", "[true]"])
def test_a_word_or_a_bool_is_asked_for_once(tmp_path, given):
    message = message_of(write(tmp_path, f"model: x\ncompiled: {given}"))
    assert message.count("compiled") == 1 and message.endswith("but it must be auto, true or false")
