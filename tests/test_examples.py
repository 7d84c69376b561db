"""Every example runs as it stands, and stays short enough to be read at a glance."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from medrl.data.prompts import find_template
from medrl.settings import load_settings
from medrl.study.settings import Study, method_recipe
from medrl.training.recipe import Recipe

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
PRINTS = {
    "01_reward": "Answered B, which is right",
    "02_rollouts": "advantage",
    "03_train": "recipe.yaml, rollouts.jsonl",
    "04_evaluate": "95 % interval",
    "05_compare": "exact McNemar p",
}


def test_there_is_one_expectation_per_example():
    assert [path.stem for path in EXAMPLES] == sorted(PRINTS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_prints_what_it_promises(path, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    runpy.run_path(str(path), run_name="__main__")
    assert PRINTS[path.stem] in capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_fewer_than_40_lines(path):
    assert len(path.read_text().splitlines()) < 40


EVERY_RECIPE = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
STUDIES = [path for path in EVERY_RECIPE if path.stem.startswith("study-")]
RECIPES = [path for path in EVERY_RECIPE if path not in STUDIES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_its_header_says_how_to_run_it_on_what_and_what_to_expect(path):
    settings = load_settings(Recipe, path)
    find_template(settings.training.mode, settings.training.template)
    check_header(path)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_loads_with_all_its_methods_and_its_header_says_the_same(path):
    study = load_settings(Study, path)
    for name in study.methods:
        training = method_recipe(study, name, Path("train"), path.parent).training
        find_template(training.mode, training.template)
    for ask in study.zero_shot.values():
        find_template(ask.mode, ask.template)
    check_header(path)


def check_header(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(re.search(rf"(medrl train|medrl study|benchmarks/\w+\.py) recipes/{path.name}", line) for line in header)
    for fact in ("Command", "Hardware:", "Minutes:", "Expected:"):
        assert any(line.startswith(f"# {fact}") for line in header), fact


def test_the_papers_recipes_have_the_papers_hyper_parameters():
    for name in ("med-r1-ct-think", "medvlm-r1-mri"):
        settings = load_settings(Recipe, RECIPES[0].parent / f"{name}.yaml")
        assert (settings.grpo.group_size, settings.grpo.kl_coef, settings.grpo.clip_low) == (4, 0.04, 0.2)
        assert (settings.training.optim.lr, settings.training.optim.schedule) == (1e-6, "linear")
        assert (settings.training.prompts_per_step, settings.training.seed) == (4, 42)
        assert (settings.policy.max_pixels, settings.training.sampling.temperature) == (401408, 1.0)
