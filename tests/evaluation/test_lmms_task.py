"""A store as a task of lmms-eval, loaded by lmms-eval's own task manager."""

import importlib.util
import sys

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from medrl.cli import app
from medrl.data.images import open_image
from medrl.data.prompts import make_prompt
from medrl.data.store import load, read_info, write_store
from medrl.errors import DataError, SettingsError
from medrl.evaluation.lmms_task import Task, write_task


@pytest.fixture(scope="module")
def store(make_examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("stores") / "it's noise"
    write_store(out, make_examples(out.parent / "images", 5), source="noise", license="none")
    return out


@pytest.fixture
def written(store, tmp_path):
    out = tmp_path / "task"
    result = CliRunner().invoke(
        app, ["export-task", str(store), "--name", "noise", "--template", "plain-no-think", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    return out


def test_the_functions_ask_and_grade_as_an_evaluation_does(store):
    task = Task(store, "no_think", "plain-no-think")
    for example in load(store):
        doc = {"id": example.id, "target": example.target}
        assert task.doc_to_text(doc, None) == make_prompt(example, "no_think", "plain-no-think").text
        (picture,) = task.doc_to_visual(doc)
        assert np.array_equal(np.asarray(picture), np.asarray(open_image(example.images[0])))
        right = f"<answer>{example.target}</answer>"
        wrong = f"<answer>{'B' if example.target == 'A' else 'A'}</answer>"
        assert task.process_results(doc, [right]) == {"acc": 1.0, "well_formed": 1.0}
        assert task.process_results(doc, [wrong]) == {"acc": 0.0, "well_formed": 1.0}
        assert task.process_results(doc, ["no idea"]) == {"acc": 0.0, "well_formed": 0.0}


def test_what_is_written_is_yaml_and_python_that_name_the_store(written, store):
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    task = yaml.load((written / "noise.yaml").read_text(), Loader)  # noqa: S506 - a SafeLoader
    assert task["dataset_kwargs"]["data_files"]["test"] == str(store / "data.parquet")
    assert read_info(store).fingerprint[:16] in (written / "noise.yaml").read_text()
    spec = importlib.util.spec_from_file_location("noise_utils", written / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    assert all(
        callable(getattr(utils, task[name].removeprefix("utils."))) for name in ("doc_to_text", "process_results")
    )


@pytest.mark.interop
def test_lmms_evals_own_task_manager_loads_the_task_and_its_rows(written, store):
    tasks = pytest.importorskip("lmms_eval.tasks")
    manager = tasks.TaskManager(include_path=str(written), include_defaults=False, model_name="qwen2_vl")
    task = tasks.get_task_dict(["noise"], manager)["noise"]
    docs, examples = task.test_docs(), load(store)
    assert [doc["id"] for doc in docs] == [example.id for example in examples]
    for doc, example in zip(docs, examples, strict=True):
        assert task.doc_to_text(doc) == make_prompt(example, "no_think", "plain-no-think").text
        assert task.doc_to_target(doc) == example.target
        assert task.doc_to_visual(doc)[0].size == open_image(example.images[0]).size
        found = task.process_results(doc, [f"<answer>{example.target}</answer>"])
        assert found == {"acc": 1.0, "well_formed": 1.0}
    assert task.higher_is_better() == {"acc": True, "well_formed": True}
    sys.modules.pop("utils", None)


def test_names_templates_and_folders_that_will_not_do_are_refused(store, tmp_path):
    with pytest.raises(SettingsError, match="name is 'a b'"):
        write_task(store, tmp_path / "task", name="a b")
    with pytest.raises(SettingsError, match="plainest"):
        write_task(store, tmp_path / "task", name="noise", template="plainest")
    with pytest.raises(DataError):
        write_task(tmp_path / "nothing", tmp_path / "task")
    assert not (tmp_path / "task").exists()
