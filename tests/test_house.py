"""The house stays as it is planned: who may import whom, and what no module may do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "medrl"
MODULES = sorted(SOURCE.rglob("*.py"))

ROOMS = (
    ("types",),
    ("errors",),
    ("settings",),
    ("files",),
    ("runs", "provenance", "progress", "stopping", "phases"),
    ("data",),
    ("policy",),
    ("rollout",),
    ("rewards",),
    ("grpo", "sft"),
    ("training",),
    ("evaluation",),
    ("report",),
    ("study",),
    ("terminal",),
    ("cli_given",),
    ("api", "demo", "bench", "launch"),
    ("cli_bench", "cli_data", "cli_eval", "cli_import", "cli_records", "cli_scale", "cli_study", "cli_train"),
    ("cli",),
    ("__main__",),
)
"""A module imports from its own room and from rooms above it; rooms on one line do not import each other."""
ORDER = {name: place for place, names in enumerate(ROOMS) for name in names}

LEAVES = {
    "rewards": {"types", "errors"},
    "grpo": {"types", "errors", "settings"},
    "sft": {"types", "errors", "settings"},
}
"""Rooms that are kept apart from data, models and files, so that they can be tested in milliseconds."""

WITHOUT_TORCH = (
    "types", "errors", "settings", "files", "runs", "rewards", "data.prompts", "data.store", "data.splits",
    "data.split_store", "data.omnimedvqa", "data.sampler", "evaluation.metrics", "evaluation.intervals",
    "evaluation.blind", "evaluation.compare", "evaluation.rescore", "report.page", "api", "terminal", "cli",
    "provenance", "data.leaks", "data.near",
    "data.fingerprints", "data.resample", "evaluation.audit", "report.audit_page", "report.watch", "evaluation.samples",
    "evaluation.wordings", "evaluation.shards", "evaluation.grading", "evaluation.lmms_task", "report.interchange",
    "cli_eval",
)  # fmt: skip

FORBIDDEN_IMPORTS = {"pickle", "dill", "marshal", "shelve", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "np.load"}


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", ".")


def room(module: str) -> str:
    return module.split(".")[0]


def our_imports(tree: ast.AST) -> set[str]:
    """Modules of ours that a file imports, anywhere in it, as names below ``medrl``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "medrl":
            base = (node.module or "").removeprefix("medrl").removeprefix(".")
            found |= {base} if base else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("medrl.") for a in node.names if a.name.startswith("medrl.")}
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_every_module_has_a_room():
    unknown = {room(name_of(path)) for path in MODULES} - ORDER.keys() - {"__init__"}
    assert not unknown, f"rooms without a place in the order: {unknown}"


@pytest.mark.parametrize("path", [p for p in MODULES if name_of(p) != "__init__"], ids=name_of)
def test_a_module_imports_only_from_its_room_and_the_rooms_above_it(path):
    own = room(name_of(path))
    imported = {room(module) for module in our_imports(parse(path))} - {own}
    assert {other for other in imported if ORDER[other] >= ORDER[own]} == set()
    assert own not in LEAVES or imported <= LEAVES[own]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_runs_code_from_data_or_swallows_every_error(path):
    tree = parse(path)
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = [ast.unparse(kind) if kind else "everything" for kind in caught]
            faults += [f"except {name}" for name in names if name in ("everything", "Exception", "BaseException")]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            roots = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            faults += [f"import {name}" for name in roots if name.split(".")[0] in FORBIDDEN_IMPORTS]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            shell = any(word.arg == "shell" for word in node.keywords)
            faults += [called] if called in FORBIDDEN_CALLS | FORBIDDEN_METHODS or shell else []
    assert faults == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is_for_and_every_public_function_too(path):
    tree = parse(path)
    assert ast.get_docstring(tree)
    public = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert [node.name for node in public if not ast.get_docstring(node) and len(node.body) > 8] == []


def test_the_light_modules_import_no_heavy_library():
    code = (
        "import importlib, sys\n"
        f"for name in {WITHOUT_TORCH!r}:\n"
        "    importlib.import_module(f'medrl.{name}')\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'scipy', 'matplotlib', 'pyarrow'} & sys.modules.keys()\n"
        "    assert not heavy, (name, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_itself_imports_nothing_heavy_and_has_every_name_it_promises():
    code = (
        "import sys, medrl\n"
        "assert not {'torch', 'transformers', 'numpy', 'pydantic'} & sys.modules.keys()\n"
        "assert sorted(medrl.__all__) == sorted(dir(medrl))\n"
        "for name in medrl.__all__:\n    assert getattr(medrl, name) is not None"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_public_names_have_one_version():
    import importlib.metadata

    import medrl

    assert medrl.__version__ == importlib.metadata.version("medrl")
