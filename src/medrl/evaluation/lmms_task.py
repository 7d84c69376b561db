"""A store as a task of lmms-eval, asked in our wording and graded by our parser, for benchmarks that it lacks.

`write_task` writes a folder for ``lmms-eval --include_path``; what the folder's ``utils.py`` imports is `Task`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medrl.data import store as stores
from medrl.data.prompts import find_template, make_prompt
from medrl.errors import DataError, SettingsError
from medrl.evaluation.grading import grade
from medrl.files import write_text_atomically
from medrl.types import Completion, Mode

if TYPE_CHECKING:
    from PIL.Image import Image

_NAME = re.compile(r"[\w.-]+")
_YAML = """\
# Written by medrl {version} from the store {fingerprint}. Research use only.
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: target
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
  do_sample: false
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: well_formed
    aggregation: mean
    higher_is_better: true
metadata:
  version: 0.0
"""
_UTILS = '''\
"""What lmms-eval calls; it needs medrl installed beside it."""

from medrl.evaluation.lmms_task import Task

_task = Task({store!r}, {mode!r}, {template!r})
doc_to_visual, doc_to_text, process_results = _task.doc_to_visual, _task.doc_to_text, _task.process_results
'''


class Task:
    """The functions of a task; a ``doc`` is a row of the store."""

    def __init__(self, store: str | Path, mode: Mode, template: str | None) -> None:
        self.mode: Mode = mode
        self.template = template
        self.examples = {example.id: example for example in stores.load(Path(store))}

    def doc_to_visual(self, doc: Mapping[str, Any]) -> "list[Image]":
        """The pictures as the policy sees them."""
        from medrl.data.images import open_image

        return [open_image(image) for image in self.examples[doc["id"]].images]

    def doc_to_text(self, doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
        """The prompt's text; the template decides it, so lmms-eval's own additions are not used."""
        return make_prompt(self.examples[doc["id"]], self.mode, self.template).text

    def process_results(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        """``acc`` and ``well_formed`` of the first completion."""
        completion = Completion(text=results[0], token_ids=(), finish_reason="stop", mode=self.mode)
        graded = grade(self.examples[doc["id"]], completion, tokens=0)
        return {"acc": float(graded.correct), "well_formed": graded.parts["well_formed"]}


def write_task(
    store: Path, out: Path, *, name: str | None = None, mode: Mode = "think", template: str | None = None,
    max_new_tokens: int = 256,
) -> list[Path]:  # fmt: skip
    """Write ``<name>.yaml`` and ``utils.py`` into ``out``; the task reads ``store`` where it lies.

    Raises ``DataError`` when ``store`` is none, ``SettingsError`` for names and templates that will not do.
    """
    info, store = stores.read_info(store), store.resolve()
    name = name or store.name
    if not _NAME.fullmatch(name):
        raise SettingsError(f"the task's name is {name!r}; it may hold letters, digits, '.', '-' and '_'")
    find_template(mode, template)
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; a task needs a folder: choose another --out")
    rows = str(store / "data.parquet").replace("'", "''")
    task, utils = out / f"{name}.yaml", out / "utils.py"
    write_text_atomically(
        task,
        _YAML.format(
            version=info.created_by.removeprefix("medrl "), fingerprint=info.fingerprint[:16], name=name,
            rows=f"'{rows}'", max_new_tokens=max_new_tokens,
        ),
    )  # fmt: skip
    write_text_atomically(utils, _UTILS.format(store=str(store), mode=mode, template=template))
    return [task, utils]
