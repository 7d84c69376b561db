"""The README's words, taken literally by somebody who has a folder in OmniMedVQA's layout and nothing else."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.main import get_group
from typer.testing import CliRunner

from medrl.cli import app

ROOT = Path(__file__).parent.parent
SHORTER = ["training.steps=2", "training.prompts_per_step=2", "training.save_every=1"]
N_IMAGES = 10


def omnimedvqa_folder(root: Path) -> Path:
    """Twenty questions about ten images."""
    (root / "QA_information" / "Open-access").mkdir(parents=True)
    (root / "Images").mkdir()
    rows = []
    for number in range(N_IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (60, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "Images" / f"{number}.png")
        for question in ("Which modality is this?", "How was this image made?"):
            rows.append(
                {
                    "dataset": "Noise",
                    "question_id": f"{number}-{len(question)}",
                    "question_type": "Modality Recognition",
                    "question": question,
                    "option_A": "CT",
                    "option_B": "MRI",
                    "gt_answer": ("CT", "MRI")[number % 2],
                    "modality_type": "CT(Computed Tomography)",
                    "image_path": f"Images/{number}.png",
                }
            )
    (root / "QA_information" / "Open-access" / "Noise.json").write_text(json.dumps(rows))
    return root


def walk_through() -> list[list[str]]:
    """The words of each command under "From your data to a report"."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## From your data to a report")[1]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return [words for line in block[1].replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def test_the_walk_through_works_as_it_is_written(tmp_path, monkeypatch):
    folder = omnimedvqa_folder(tmp_path / "omni")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    commands = walk_through()
    assert [words[1] for words in commands] == [
        "import",
        "split",
        "audit",
        "train",
        "eval",
        "eval",
        "compare",
        "report",
    ]
    for words in commands:
        arguments = [str(folder) if word == "DIR" else word for word in words[1:]]
        arguments += SHORTER if words[1] == "train" else []
        result = CliRunner().invoke(app, arguments)
        answered = (0, 3) if words[1] == "compare" else (0,)  # 3: two steps have not shown to help
        assert result.exit_code in answered, (words, result.output)
    assert "McNemar" in (tmp_path / "runs" / "tiny" / "report.html").read_text()
    after = json.loads((tmp_path / "runs" / "tiny" / "eval" / "after" / "summary.json").read_text())
    assert (after["template"], after["n"]) == ("plain", 4)


def test_the_documents_link_to_files_that_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    links = [(page, link) for page in pages for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text())]
    assert [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()] == []
    named = [
        name
        for page in pages
        for name in re.findall(r"`((?:recipes|examples|tests|src|docs)/[\w./-]+)`", page.read_text())
    ]
    assert [name for name in named if not (ROOT / name).exists()] == []


def commands_of(page: Path) -> list[list[str]]:
    """The words behind each ``medrl`` in shell blocks, in backticks, and in the comments of recipes."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".yaml":
        lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
        blocks = ["\n".join(re.sub(r"^.*? (?=medrl |torchrun )", "", line) for line in lines)]
    else:
        spans = re.findall(r"(?<!`)`(medrl [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        blocks = [*re.findall(r"```sh\n(.*?)```", text, re.DOTALL), *(span.replace("\n", " ") for span in spans)]
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    found = [match[1] for line in lines if (match := re.match(r"(?:[^#]*-m )?medrl (?=[a-z])(.*)", line.strip()))]
    return [shlex.split(re.split(r" [;>] |  +\(| {3,}", line)[0], comments=True) for line in found]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").glob("*.yaml"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_in_the_documents_parses(page):
    for words in commands_of(page):
        command, rest = get_group(app), list(words)
        while rest and hasattr(command, "commands"):
            name = rest.pop(0)
            command = command.commands["omnimedvqa" if name in ("NAME", "...") else name]
        if hasattr(command, "commands"):
            continue
        try:
            command.make_context(shlex.join(words), rest)
        except typer.BadParameter as error:
            # A sentence that names a command need not spell it out.
            assert type(error).__name__ == "MissingParameter", (words, error.message)


def test_every_command_the_documents_name_exists():
    known = {name.split("-")[0] for name in get_group(app).commands}
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").glob("*.yaml"))]
    for page in pages:
        assert set(re.findall(r"(?<![\w/.])medrl ([a-z]+)", page.read_text())) <= known | {"builds", "is", "yet"}, page
