"""Nothing in the program unpickles anything: a file from a stranger can be wrong, it cannot run."""

import ast
import pickle
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "medrl"
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
LOADERS = {
    "torch": {"load", "jit.load", "package.PackageImporter", "export.load", "hub.load"},
    "numpy": {"load", "lib.npyio.NpzFile"},
    "pandas": {"read_pickle"},
    "torch.distributed.checkpoint": {"load", "FileSystemReader"},
    "yaml": {"load", "unsafe_load", "full_load", "load_all", "Loader", "UnsafeLoader", "FullLoader"},
}
OPTIONS = {"weights_only": False, "allow_pickle": True, "trust_remote_code": True, "use_safetensors": False}


def unpickles(source: str) -> list[str]:
    """Places in a module that unpickle, or may: by whatever name the function goes in it."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # local name -> what it is
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.split(".")[0]
                names[local] = alias.name if alias.asname else local
                found += [f"import {alias.name}"] if alias.name.split(".")[0] in PICKLES else []
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found += [f"from {node.module}"] if node.module.split(".")[0] in PICKLES else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            full = names.get(first, first) + (f".{rest}" if rest else "")
            found += [full for module, functions in LOADERS.items() for f in functions if full == f"{module}.{f}"]
        elif isinstance(node, ast.Call):
            for word in node.keywords:
                value = word.value.value if isinstance(word.value, ast.Constant) else None
                found += [f"{word.arg}={value}"] if word.arg in OPTIONS and value is OPTIONS[word.arg] else []
    return found


@pytest.mark.parametrize(
    "path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.relative_to(SOURCE).with_suffix("").as_posix()
)
def test_no_module_unpickles(path):
    assert unpickles(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads as read",
        "def f():\n    import joblib.numpy_pickle",
        "import torch\ntorch.load('x')",
        "import torch as t\nstate = t.load('x', weights_only=True)",
        "from torch import load\nload('x')",
        "from torch import load as read\nread('x')",
        "from torch import jit\njit.load('x')",
        "import numpy as np\nnp.load('x')",
        "import pandas\nread = pandas.read_pickle",
        "import torch.distributed.checkpoint as dcp\ndcp.load({})",
        "import yaml\nyaml.load('x', Loader=yaml.FullLoader)",
        "model.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', use_safetensors=False)",
    ],
)
def test_the_search_finds_what_it_is_for(source):
    assert unpickles(source)


@pytest.mark.parametrize("source", ["import json\njson.load(f)", "import yaml\nyaml.safe_load('x')", "store.load('x')"])
def test_the_search_lets_other_loads_pass(source):
    assert unpickles(source) == []


def test_saving_and_resuming_unpickle_nothing(model_folder, examples, lively, small, tmp_path, monkeypatch):
    import torch

    from medrl.grpo import GRPO
    from medrl.policy.policy import Policy
    from medrl.training.train import train

    def refused(*_, **__):
        raise AssertionError("something was unpickled")

    options = {"out": tmp_path / "run", "settings": small.model_copy(update={"steps": 2}), "quiet": True}
    objective = GRPO(group_size=2, kl_coef=0.04)
    monkeypatch.setattr(pickle, "load", refused)
    monkeypatch.setattr(pickle, "loads", refused)
    monkeypatch.setattr(torch, "load", refused)
    train(Policy.load(model_folder), examples, lively, objective, **options)
    train(Policy.load(model_folder), examples, lively, objective, resume="must", **options)
