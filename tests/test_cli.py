"""The command line: what it prints, how it ends, and what it leaves behind when the words or the data are wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from medrl.cli import app
from medrl.data.prompts import make_prompt
from medrl.data.store import load, write_store
from medrl.runs import append_records, read_records
from medrl.types import Example

OPTIONS = ("CT", "MRI", "X-Ray")
N_ROWS = 12


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(code: int, *arguments: object) -> str:
    """stderr of a command that must fail; it must be a message and no traceback."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ") and "Traceback" not in result.output
    return result.stderr


def make_examples(folder: Path, question: str = "Which modality is this?") -> list[Example]:
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for number in range(N_ROWS):
        image = folder / f"{number // 2:02}.png"
        Image.new("RGB", (40, 32), (20 * number, 60, 90)).save(image)
        examples.append(
            Example(
                id=f"row-{number:02}",
                source="made up",
                images=(image,),
                question=question,
                options=OPTIONS,
                target="ABC"[number % 3],
                modality=("CT", "MRI")[number // 6],
                question_type="Modality Recognition",
            )
        )
    return examples


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A store, a tiny model and a recipe of two steps; tests must not change them."""
    from medrl.policy.policy import Policy
    from medrl.policy.tiny import build_model, train_processor

    home = tmp_path_factory.mktemp("home")
    examples = make_examples(home / "raw")
    write_store(home / "store", examples, source="made up", license="CC0")
    processor = train_processor([make_prompt(row, "think", "plain").text for row in examples], vocab_size=400)
    sizes = {"layers": 1, "heads": 2, "kv_heads": 1, "vision_layers": 1, "vision_heads": 2}
    model = build_model(processor, hidden=32, intermediate=64, vision_hidden=32, context_tokens=256, **sizes)
    Policy(model, processor).save(home / "model")
    recipe = {
        "policy": {"model": str(home / "model"), "dtype": "float32"},
        "data": {"train": str(home / "store")},
        "grpo": {"group_size": 2},
        "training": {
            "steps": 2,
            "prompts_per_step": 2,
            "template": "plain",
            "sampling": {"max_new_tokens": 8},
            "save_every": 1,
        },
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return home


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    result = run("train", home / "recipe.yaml", "--out", home / "run")
    assert result.exit_code == 0, result.output
    return home / "run"


@pytest.fixture(scope="module")
def evaluated(home: Path, trained: Path) -> Path:
    for name, model in (("before", home / "model"), ("after", trained)):
        ask = ("--template", "plain", "--max-new-tokens", 8) if name == "before" else ()
        result = run("eval", model, home / "store", "--out", trained / "eval" / name, *ask)
        assert result.exit_code == 0, result.output
    return trained / "eval"


def every_command(group, words: tuple[str, ...] = ()):
    """The words of each command and group below ``group``."""
    for name, command in group.commands.items():
        yield (*words, name)
        if hasattr(command, "commands"):
            yield from every_command(command, (*words, name))


def test_every_command_has_help_with_an_example_whose_options_it_has():
    for words in every_command(get_command(app)):
        shown = run(*words, "--help").stdout
        example, _, rest = shown.partition("Example:")[2].partition("\n\n")
        assert f"medrl {' '.join(words)} " in example, words
        ours = "\n".join(line for line in example.splitlines() if line.strip().startswith("medrl "))
        options = set(re.findall(r"(?<=\s)--[a-z-]+", ours))
        assert all(f" {option} " in rest for option in options) or "Commands:" in rest, (words, options)


def test_a_list_of_commands_says_each_in_a_whole_sentence_and_the_first_is_in_the_order_of_the_work():
    for words in [
        (),
        *(words for words in every_command(get_command(app)) if "Commands:" in run(*words, "--help").stdout),
    ]:
        listed = run(*words, "--help").stdout.split("Commands:\n")[1].split("\n\n")[0].splitlines()
        assert all(line.endswith(".") and "..." not in line for line in listed), words
    shown = run("--help").stdout
    places = [
        shown.index(f"\n  {name} ")
        for name in ("demo", "import", "split", "audit", "train", "eval", "compare", "report")
    ]
    assert places == sorted(places)


def test_the_shell_completes_commands_and_choices():
    def completes(line: str) -> list[str]:
        words = line.split(" ")
        environment = {"_MEDRL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        return CliRunner().invoke(app, [], prog_name="medrl", env=environment).stdout.split()

    assert completes("medrl com") == ["compare"]
    assert completes("medrl eval --mode no") == ["no_think"]


def test_the_version_is_the_package_s():
    import medrl

    assert run("--version").stdout == f"medrl {medrl.__version__}\n"


def test_wrong_words_end_with_2():
    assert run("tain").exit_code == 2
    assert run("eval", "model").exit_code == 2
    assert run("split", "store", "--by", "color", "--out", "x").exit_code == 2


# ---------------------------------------------------------------- import


def omnimedvqa(root: Path, rows: list[dict[str, str]]) -> Path:
    folder = root / "QA_information" / "Open-access"
    folder.mkdir(parents=True)
    (root / "Images").mkdir()
    Image.new("L", (16, 16), 80).save(root / "Images" / "a (1).png")
    (folder / "Made up.json").write_text(json.dumps(rows))
    return root


def row(number: int, **changes: str) -> dict[str, str]:
    return {
        "dataset": "Made up",
        "question_id": f"q{number}",
        "question_type": "Modality Recognition",
        "question": "Which modality is this?",
        "gt_answer": "CT",
        "image_path": "Images/a (1).png",
        "option_A": "CT",
        "option_B": "MRI",
        "modality_type": "CT(Computed Tomography)",
    } | changes


def test_import_counts_rows_and_lists_what_it_left_out(tmp_path):
    source = omnimedvqa(tmp_path / "omni", [row(0), row(1), row(2, gt_answer="PET"), row(3, image_path="Images/b.png")])
    result = run("import", "omnimedvqa", source, "--out", tmp_path / "store", "--max-bad", 0.5, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["rows"] == 2 == len(load(tmp_path / "store"))
    assert report["by_modality"] == {"CT": 2} and report["by_question_type"] == {"Modality Recognition": 2}
    places = [(bad["file"], bad["position"]) for bad in report["bad"]]
    assert places == [("QA_information/Open-access/Made up.json", position) for position in (2, 3)]
    assert "'PET'" in report["bad"][0]["reason"] and "b.png" in report["bad"][1]["reason"]


def test_import_shows_its_counts_and_bad_rows_as_text(tmp_path):
    source = omnimedvqa(tmp_path / "omni", [row(0), row(1, gt_answer="PET")])
    result = run("import", "omnimedvqa", source, "--out", tmp_path / "store", "--max-bad", 1)
    assert "CT" in result.stdout and "Modality Recognition" in result.stdout
    assert "bad: QA_information/Open-access/Made up.json, row 1: answer 'PET'" in result.stdout


def test_import_with_too_many_bad_rows_leaves_no_store(tmp_path):
    source = omnimedvqa(tmp_path / "omni", [row(0), row(1, image_path="Images/missing.png")])
    message = fails(1, "import", "omnimedvqa", source, "--out", tmp_path / "store")
    assert "Images/missing.png does not exist" in message and "--max-bad" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["omni"]


def test_import_from_the_wrong_folder_says_which_would_do(tmp_path):
    assert "QA_information/Open-access" in fails(1, "import", "omnimedvqa", tmp_path, "--out", tmp_path / "store")


def test_import_into_a_taken_folder_is_refused(tmp_path):
    source = omnimedvqa(tmp_path / "omni", [row(0)])
    assert "choose another --out" in fails(1, "import", "omnimedvqa", source, "--out", source)


# ---------------------------------------------------------------- split


def test_split_by_modality_writes_train_and_test_per_domain_without_shared_images(home, tmp_path):
    result = run("split", home / "store", "--by", "modality", "--test", 0.4, "--out", tmp_path / "by")
    assert result.exit_code == 0, result.output
    sides = {f"{d}/{s}": load(tmp_path / "by" / d / s) for d in ("ct", "mri") for s in ("train", "test")}
    assert sum(map(len, sides.values())) == N_ROWS and all(sides.values())
    for domain in ("ct", "mri"):
        train, test = ({r.images[0].name for r in sides[f"{domain}/{side}"]} for side in ("train", "test"))
        assert not train & test


def test_split_by_nothing_writes_train_and_test(home, tmp_path):
    assert run("split", home / "store", "--by", "none", "--out", tmp_path / "all").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "all" / "all").iterdir()) == ["test", "train"]


def test_split_of_what_is_no_store_leaves_nothing(tmp_path):
    assert "is not a store" in fails(1, "split", tmp_path / "nowhere", "--out", tmp_path / "by")
    assert "must lie between 0 and 1" in fails(2, "split", _store(tmp_path), "--test", 1.5, "--out", tmp_path / "by")
    assert "have no patient" in fails(
        1, "split", _store(tmp_path), "--keep-together", "patient", "--out", tmp_path / "b"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "store"]


def test_an_audit_writes_its_files_and_ends_with_3_when_a_rule_is_broken(home, tmp_path):
    words = ("audit", home / "store", home / "store", "--json", tmp_path / "a.json", "--html", tmp_path / "a.html")
    assert f"images_exact is {N_ROWS} of {N_ROWS} test examples" in fails(3, *words)
    assert json.loads((tmp_path / "a.json").read_text())["overlap"]["images_exact"] == N_ROWS
    assert "same pixels" in (tmp_path / "a.html").read_text()
    assert run(*words, "--fail-on", "patients,gold_rejected").exit_code == 0
    assert run(*words, "--fail-on", "nothing").exit_code == 0
    assert "is no rule" in fails(2, *words, "--fail-on", "pixels")


def test_an_audit_as_json_on_stdout_is_nothing_but_json(home):
    words = ("audit", home / "store", home / "store", "--json", "-")
    result = run(*words)
    assert result.exit_code == 3 and "unfit" in result.stderr
    assert json.loads(result.stdout)["overlap"]["images_exact"] == N_ROWS
    result = run(*words, "--fail-on", "nothing")
    assert result.exit_code == 0 and json.loads(result.stdout)["reasons"] == []


def test_errors_of_split_and_audit_name_the_options_and_the_stores_to_give(home, tmp_path):
    store = home / "store"
    assert "--test (test_fraction) is 1.5" in fails(2, "split", store, "--test", 1.5, "--out", tmp_path / "a")
    patient = fails(1, "split", store, "--keep-together", "patient", "--out", tmp_path / "a")
    assert "--keep-together image" in patient and "--map patient=COLUMN" in patient
    few = fails(1, "split", store, "--by", "none", "--train-size", 999, "--out", tmp_path / "a")
    assert "--train-size is 999" in few
    assert run("split", store, "--by", "none", "--out", tmp_path / "all").exit_code == 0
    message = fails(1, "audit", tmp_path / "all", store)
    assert "it holds stores: all/all/test, all/all/train" in message


def test_a_protocol_and_resampling_are_chosen_by_name(home, tmp_path):
    known = ("split", home / "store", "--by", "none", "--protocol", "med-r1")
    assert "leave those out" in fails(2, *known, "--test", 0.3, "--out", tmp_path / "a")
    medvlm = ("split", home / "store", "--protocol", "medvlm-r1", "--out", tmp_path / "m")
    assert "divides by modality, not by source" in fails(2, *medvlm, "--by", "source")
    assert "no examples of X-Ray" in fails(1, *medvlm)
    assert "goes with --resample-distractors" in fails(2, *known, "--drop-unbalanced", "--out", tmp_path / "a")
    result = run(*known, "--resample-distractors", "--out", tmp_path / "a")
    assert result.exit_code == 0 and "unchanged" in result.stdout
    split = json.loads((tmp_path / "a" / "all" / "test" / "store.json").read_text())["extra"]
    assert split["split"]["keep_together"] == "none" and "option_prior" in split["blind_before_resampling"]


def _store(folder: Path, question: str = "Which modality is this?") -> Path:
    if not (folder / "store").exists():
        write_store(folder / "store", make_examples(folder / "raw", question), source="made up", license="CC0")
    return folder / "store"


# ---------------------------------------------------------------- train


def test_train_leaves_a_run_with_its_resolved_recipe(trained):
    assert yaml.safe_load((trained / "recipe.yaml").read_text())["grpo"]["group_size"] == 2
    assert len((trained / "metrics.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


def test_train_into_a_folder_that_holds_a_run_is_refused(home, trained):
    assert "--resume auto" in fails(1, "train", home / "recipe.yaml", "--out", trained)


@pytest.mark.parametrize(
    ("override", "code", "said"),
    [
        ("grpo.grup_size=4", 2, "did you mean group_size?"),
        ("grpo.group_size=1", 2, "at least 2 completions"),
        ("grpo.group_size", 2, "is not key=value"),
        ("data.train=nowhere", 1, "nowhere is not a store"),
        ("data.modality=[PET]", 1, "has CT, MRI"),
        ("policy.model=./nowhere", 1, "there is no model folder ./nowhere"),
        ("training.template=r2", 2, "r1-v"),
        ("training.sampling.max_new_tokens=250", 1, "do not fit the context of 256"),
    ],
)
def test_train_names_what_is_wrong_and_writes_nothing(home, tmp_path, override, code, said):
    assert said in fails(code, "train", home / "recipe.yaml", override, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_recipe_names_its_neighbors(home):
    assert "recipe.yaml" in fails(2, "train", home / "recipes.yaml", "--out", home / "never")


def test_resume_must_demands_a_run(home, tmp_path):
    assert "holds no run" in fails(1, "train", home / "recipe.yaml", "--out", tmp_path / "run", "--resume", "must")


def test_a_model_folder_without_a_processor_is_named_with_the_fix(home, tmp_path):
    shutil.copytree(home / "model", tmp_path / "model")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / "model" / name).unlink(missing_ok=True)
    said = fails(1, "train", home / "recipe.yaml", f"policy.model={tmp_path / 'model'}", "--out", tmp_path / "run")
    assert "has no processor" in said and "copy the processor" in said
    assert not (tmp_path / "run").exists()


def test_a_missing_image_is_named(home, tmp_path):
    store = _store(tmp_path)
    (store / "images" / "00.png").unlink()
    assert "00.png" in fails(1, "train", home / "recipe.yaml", f"data.train={store}", "--out", tmp_path / "run")
    assert "00.png" in fails(1, "eval", home / "model", store, "--out", tmp_path / "eval")
    assert not (tmp_path / "run").exists() and not (tmp_path / "eval").exists()


def test_an_image_that_was_cut_off_shows_before_a_run_is_made(home, tmp_path):
    store = _store(tmp_path)
    image = store / "images" / "03.png"
    image.write_bytes(image.read_bytes()[:60])
    said = fails(1, "train", home / "recipe.yaml", f"data.train={store}", "--out", tmp_path / "run")
    assert f"store {store} has changed since it was written" in said and "import the data again" in said
    ask = ("--template", "plain", "--max-new-tokens", 8)
    said = fails(1, "eval", home / "model", store, *ask, "--out", tmp_path / "eval")
    assert "03.png" in said and "damaged or cut off" in said
    assert not (tmp_path / "run").exists() and not (tmp_path / "eval").exists()


# ---------------------------------------------------------------- eval, compare, report


def test_eval_of_a_run_asks_as_the_run_was_trained_and_fits_the_blind_baselines_on_its_data(evaluated, home):
    summary = json.loads((evaluated / "after" / "summary.json").read_text())
    assert (summary["mode"], summary["template"]) == ("think", "plain")
    assert summary["train_store"] == str(home / "store")
    assert summary["model"].endswith("checkpoints/step-000002")
    assert max(json.loads(line)["tokens"] for line in (evaluated / "after" / "records.jsonl").open()) <= 8
    assert {"value", "low", "high", "n"} == set(summary["accuracy"]) == set(summary["by_source"]["made up"])


def test_eval_of_a_checkpoint_and_of_its_run_agree(evaluated, trained, home, tmp_path):
    checkpoint = trained / "checkpoints" / "step-000002"
    result = run("eval", checkpoint, home / "store", "--out", tmp_path / "e", "--limit", 4, "--json")
    assert json.loads(result.stdout)["n"] == 4
    lines = (evaluated / "after" / "records.jsonl").read_text().splitlines()
    assert (tmp_path / "e" / "records.jsonl").read_text().splitlines() == lines[:4]


def test_eval_into_another_model_s_evaluation_is_refused(evaluated, home):
    said = fails(1, "eval", home / "model", home / "store", "--out", evaluated / "after", "--template", "plain")
    assert "holds the evaluation of" in said


def test_eval_refuses_what_it_cannot_do_and_leaves_nothing(home, tmp_path):
    out = tmp_path / "eval"
    assert "is not a store" in fails(1, "eval", home / "model", tmp_path / "nowhere", "--out", out)
    assert "is not a store" in fails(1, "eval", home / "model", home / "store", "--train", tmp_path, "--out", out)
    assert "has no config.json" in fails(1, "eval", tmp_path, home / "store", "--out", out)
    assert "no model folder" in fails(1, "eval", "./nowhere", home / "store", "--out", out)
    assert "asks for mode" in fails(2, "eval", home / "model", home / "store", "--mode", "no_think",
                                    "--template", "plain", "--out", out)  # fmt: skip
    long = _store(tmp_path, "Which modality is this? " * 200)
    assert "do not fit the context of 256" in fails(1, "eval", home / "model", long, "--out", out)
    assert not out.exists()


def test_a_run_without_a_checkpoint_cannot_be_evaluated(trained, home, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(trained / "recipe.yaml", tmp_path / "run")
    assert "has no checkpoint yet" in fails(1, "eval", tmp_path / "run", home / "store", "--out", tmp_path / "e")


def test_compare_prints_a_verdict_and_json(evaluated):
    text = run("compare", evaluated / "before", evaluated / "after").stdout
    assert "McNemar" in text and "before" in text and "after" in text
    found = json.loads(run("compare", evaluated / "before", evaluated / "after", "--json").stdout)
    assert found["n"] == N_ROWS and 0 <= found["mcnemar_p"] <= 1
    assert found["difference"]["low"] <= found["difference"]["value"] <= found["difference"]["high"]


def test_compare_ends_with_0_only_when_the_second_is_shown_to_be_better(evaluated, tmp_path):
    records = read_records(evaluated / "before")
    for name, n_right in (("bad", 0), ("good", len(records)), ("slightly", 2)):
        append_records(
            tmp_path / name, [replace(record, correct=number < n_right) for number, record in enumerate(records)]
        )
    codes = {pair: run("compare", *(tmp_path / name for name in pair)).exit_code for pair in (
        ("bad", "good"), ("good", "bad"), ("good", "good"), ("bad", "slightly"),
    )}  # fmt: skip
    assert codes == {("bad", "good"): 0, ("good", "bad"): 3, ("good", "good"): 3, ("bad", "slightly"): 3}
    answered = run("compare", tmp_path / "good", tmp_path / "bad", "--json")
    assert answered.exit_code == 3 and json.loads(answered.stdout)["difference"]["value"] == -1


def test_compare_over_different_examples_is_refused(evaluated, home, tmp_path):
    part = tmp_path / "part"
    ask = ("--template", "plain", "--max-new-tokens", 8, "--limit", 4)
    assert run("eval", home / "model", home / "store", "--out", part, *ask).exit_code == 0
    assert "different examples" in fails(1, "compare", evaluated / "before", part)
    assert "not an evaluation folder" in fails(1, "compare", evaluated, part)
    assert "names no patient" in fails(1, "compare", part, part, "--cluster", "patient")


def test_report_writes_one_file(evaluated, trained, tmp_path):
    result = run("report", trained, "--out", tmp_path / "new" / "report.html")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "new" / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")


def test_report_on_a_wrong_folder_leaves_nothing(home, tmp_path):
    assert "neither a run folder" in fails(1, "report", home / "store", "--out", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


# ---------------------------------------------------------------- the program as a whole


def test_light_commands_import_neither_torch_nor_transformers(evaluated, tmp_path):
    pytest.importorskip("torch")
    calls = [
        ["--help"],
        ["--version"],
        ["compare", str(evaluated / "before"), str(evaluated / "after")],
        ["report", str(evaluated / "before"), "--out", str(tmp_path / "report.html")],
    ]
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom medrl.cli import app\n"
        f"for words in {calls!r}:\n    assert CliRunner().invoke(app, words).exit_code in (0, 3), words\n"
        "print([name for name in ('torch', 'transformers', 'scipy.stats', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ctrl_c_says_how_to_continue(monkeypatch, home, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("medrl.training.recipe.run_recipe", interrupted)
    result = run("train", home / "recipe.yaml", "--out", tmp_path / "run")
    assert result.exit_code == 130 and "--resume auto" in result.stderr


def test_a_run_that_is_asked_to_stop_saves_ends_with_143_and_resumes_to_the_same_weights(home, tmp_path):
    words = ["train", home / "recipe.yaml", "training.steps=60", "training.save_every=100", "--out"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    command = [sys.executable, "-m", "medrl", *map(str, words), str(tmp_path / "run")]
    # Sums of floats depend on the number of threads; below the runs continue in this process, which has one.
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=one_thread) as process:
        while not metrics.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert "saved and stopped" in stderr and "--resume auto" in stderr and "Traceback" not in stderr
    done = len(metrics.read_text().splitlines())
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{done:06}"]
    assert run(*words, tmp_path / "run", "--resume", "auto").exit_code == 0
    assert run(*words, tmp_path / "whole").exit_code == 0
    for name in ("model.safetensors", "trainer/optimizer.safetensors"):
        ours, theirs = (tmp_path / out / "checkpoints" / "step-000060" / name for out in ("run", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_reader_that_goes_away_is_no_error(evaluated):
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "medrl", "compare", str(evaluated / "before"), str(evaluated / "after")]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


def test_a_disk_that_cannot_be_written_is_named(evaluated, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in fails(1, "report", evaluated / "before", "--out", tmp_path / "file" / "report.html")


def test_training_and_evaluation_keep_other_libraries_off_the_terminal(home, tmp_path):
    words = [
        sys.executable,
        "-m",
        "medrl",
        "train",
        home / "recipe.yaml",
        "training.steps=1",
        "--out",
        tmp_path / "run",
    ]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("step 1/1"), done.stderr
