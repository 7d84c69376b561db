"""What ``medrl bench`` prints: the keys programs rely on, and numbers that agree with each other."""

import gc
import json
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from medrl.bench.baselines import BASELINES, generate_with_transformers, placeholders
from medrl.bench.limits import Elapsed, Work
from medrl.bench.models import SIZES, ask, build_policy, make_examples, make_processor, question
from medrl.bench.step import PHASES, StepBench, bench_step, make_step
from medrl.cli import app
from medrl.errors import MedrlError
from medrl.phases import phase, timing
from medrl.rollout.engine import generate
from medrl.rollout.sampling import Sampling

SMALL = ["--model", "tiny", "--image-px", "56", "--prompt-tokens", "30", "--completion-tokens", "6"]


def run(*words: str) -> dict:
    result = CliRunner().invoke(app, ["bench", *words, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_timed_step_says_what_programs_rely_on():
    found = run("step", *SMALL, "--prompts", "2", "--group", "2", "--steps", "2", "--baseline", "naive")
    assert set(found["phases"]) == {*PHASES, "other"}
    assert all(found["phases"][name] > 0 for name in PHASES)
    assert found["tokens_per_s"] == pytest.approx(2 * 2 * 6 / found["seconds_per_step"])
    assert found["fraction_of_limit"] == pytest.approx(found["limit_seconds"] / found["seconds_per_step"])
    assert found["limit_seconds"] == pytest.approx(sum(found["limit_phases"].values()))
    assert set(found["limit_phases"]) == set(PHASES) - {"data"}  # row beside row
    assert found["limit_seconds"] > 0 and found["peak_gb"] > 0 and found["mfu"] > 0
    assert found["device"].startswith(("CPU", "NVIDIA"))
    assert found["baseline"]["name"] == "naive"
    assert found["speedup"] == pytest.approx(found["baseline"]["seconds_per_step"] / found["seconds_per_step"])
    assert found["sampling_gap"] < (1e-4 if found["device"].startswith("CPU") else 1e-1)


def test_no_kl_has_no_reference_and_no_baseline_no_ratio():
    found = run("step", *SMALL, "--prompts", "1", "--group", "2", "--steps", "1", "--kl", "0")
    assert found["phases"]["reference"] == 0 and "reference" not in found["limit_phases"]
    assert found["baseline"] is found["speedup"] is found["cpu_speedup"] is None


@pytest.mark.parametrize(
    ("words", "value", "turns"),
    [
        (("step", "--prompts", "1", "--group", "2", "--steps", "2", "--baseline", "naive"), "seconds_per_step", "step"),
        (("eval", "--items", "2", "--repeats", "2"), "items_per_s", "round"),
    ],
)
def test_what_is_measured_is_told_before_the_baseline_begins(words, value, turns, tables):
    result = CliRunner().invoke(app, ["bench", *words, *SMALL, "--json"])
    found = json.loads(result.stdout)
    lines = result.stderr.splitlines()
    (told,) = [number for number, line in enumerate(lines) if line.startswith(tables.MEASURED)]
    early = tables.found_in(lines[told].removeprefix(tables.MEASURED))
    assert set(early) == set(found) and early["baseline"] is None and early[value] == found[value] > 0
    # One line a turn: ours before, the baseline's behind.
    ours, theirs = lines[:told], lines[told:]
    for said in (ours, theirs):
        assert sum(f", {turns} " in line for line in said) == 2 and sum(", warm-up: " in line for line in said) == 1
    assert any(line.startswith(f"medrl, {turns} 2 of 2: ") for line in ours)
    without = CliRunner().invoke(app, ["bench", *words, *SMALL])
    assert tables.MEASURED not in without.output and found["baseline"]["name"] in without.stdout.splitlines()[-1]


def test_policy_and_reference_are_gone_before_the_baseline_begins(monkeypatch):
    made, alive = [], []

    def remembered(*given):
        policy = build_policy(*given)
        policy.freeze_reference()
        for model in (policy.model, policy.reference.model):
            made.extend(weakref.ref(weights) for weights in model.parameters())
        return policy

    def baseline(*_):
        alive.extend(weights() is not None for weights in made)
        return Elapsed(1.0, 1.0)

    monkeypatch.setattr("medrl.bench.step.build_policy", remembered)
    monkeypatch.setitem(BASELINES, "naive", baseline)
    shapes = Work(prompts=1, group=2, image_px=56, prompt_tokens=30, completion_tokens=4)
    gc.disable()  # it would come sooner or later; the baseline needs the room now
    try:
        bench_step(StepBench(model="tiny", work=shapes, steps=1, baseline="naive"))
    finally:
        gc.enable()
    assert alive and not any(alive)


def test_a_timed_evaluation_answers_what_transformers_answers():
    found = run("eval", *SMALL, "--items", "3", "--repeats", "1")
    assert found["same_tokens"] == 1.0
    assert found["items_per_s"] == pytest.approx(3 / found["seconds"])
    assert found["speedup"] == pytest.approx(found["items_per_s"] / found["baseline"]["items_per_s"])


def test_the_table_has_a_limit_beside_every_phase_and_no_time_that_reads_as_nothing(monkeypatch):
    monkeypatch.setattr("medrl.bench.step._peak_resident_bytes", lambda: 2_500_000_000)
    result = CliRunner().invoke(app, ["bench", "step", *SMALL, "--prompts", "1", "--group", "2", "--steps", "1"])
    cells = [[cell.strip() for cell in line.split("│")[1:4]] for line in result.stdout.splitlines() if "│" in line]
    assert [name for name, *_ in cells] == [*PHASES, "other", "step"]
    for name, spent, limit in cells:
        assert float(spent) > 0 or name == "other"
        assert limit == "" if name in ("data", "other") else float(limit) > 0
    assert torch.cuda.is_available() or "peak 2.5 GB" in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("step", "--model", "3b"), "choose tiny, 25m"),
        (("step", "--model", "tiny", "--prompt-tokens", "5"), "give at least 22"),
        (("step", "--model", "tiny", "--prompt-tokens", "40000"), "--prompt-tokens 40000 and --completion-tokens 64"),
        (("step", "--model", "tiny", "--image-px", "100000000"), "--image-px 100000000"),
        (("eval", "--model", "tiny", "--image-px", "100000000"), "--image-px 100000000"),
        pytest.param(
            ("step", "--model", "tiny", "--kernels", "on"),
            "--kernels is on, but",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has kernels"),
        ),
    ],
)
def test_words_that_mean_nothing_end_with_2_and_name_the_option(words, said):
    result = CliRunner().invoke(app, ["bench", *words])
    assert result.exit_code == 2 and said in result.stderr
    assert "max_new_tokens" not in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (None, "not installed"),
        ("import a_module_nobody_has", "cannot be imported: No module named 'a_module_nobody_has'"),
    ],
)
def test_a_trainer_that_is_not_there_and_one_that_is_broken_are_told_apart(monkeypatch, tmp_path, body, said):
    for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    if body is None:
        monkeypatch.setitem(sys.modules, "trl", None)
    else:
        (tmp_path / "trl.py").write_text(body)
        monkeypatch.syspath_prepend(str(tmp_path))
    work = Work(prompts=1, group=2, image_px=56, prompt_tokens=30, completion_tokens=3)
    with pytest.raises(MedrlError, match=said):
        BASELINES["trl"](StepBench(model="tiny", work=work), [], "cpu", torch.float32)


def test_prompts_are_as_long_as_asked_and_completions_too(tmp_path):
    policy = build_policy(SIZES["tiny"], 56, "cpu", torch.float32)
    text = question(policy.processor, 30)
    (example,) = make_examples(tmp_path, 1, 56, text)
    (prompt,) = policy.encode([ask(example)])
    assert len(prompt.token_ids) == 30 + 4
    ((completion,),) = generate(policy, [ask(example)], Sampling(max_new_tokens=9))
    assert len(completion.token_ids) == 9
    assert generate_with_transformers(policy, [prompt], 2, 5, sample=True).shape == (2, 5)


@pytest.mark.parametrize("image_px", [28, 56, 83, 84, 470, 475])
def test_images_are_as_large_as_the_limits_count_them(tmp_path, image_px):
    work = Work(prompts=1, group=2, image_px=image_px, prompt_tokens=40, completion_tokens=4)
    policy = build_policy(SIZES["tiny"], image_px, "cpu", torch.float32)
    (example,) = make_examples(tmp_path, 1, image_px, question(policy.processor, 40))
    (encoded,) = policy.encode([ask(example)])
    assert encoded.pixels is not None
    assert (len(encoded.pixels), len(encoded.token_ids)) == (work.patches, work.prompt_length)


def test_sampled_baselines_write_no_placeholder_of_an_image(tmp_path):
    # One token in 512 would be one: 800 draws without any are no accident.
    policy = build_policy(SIZES["tiny"], 56, "cpu", torch.float32)
    (example,) = make_examples(tmp_path, 1, 56, question(policy.processor, 30))
    written = generate_with_transformers(policy, policy.encode([ask(example)]), 40, 20, sample=True)
    assert not set(written.flatten().tolist()) & set(placeholders(policy.processor))


def test_the_processor_fills_the_vocabulary_exactly():
    assert len(make_processor(SIZES["25m"].vocabulary, 56).tokenizer) == SIZES["25m"].vocabulary


def test_a_bench_step_moves_the_weights(tmp_path):
    policy = build_policy(SIZES["tiny"], 56, "cpu", torch.float32)
    settings = StepBench(
        model="tiny",
        work=Work(prompts=2, group=2, image_px=56, prompt_tokens=30, completion_tokens=4),
        kl_coef=0.0,
    )
    examples = make_examples(tmp_path, 2, 56, question(policy.processor, 30))
    before = policy.fingerprint()
    update = make_step(policy, settings)(examples, 0)
    assert policy.fingerprint() != before and update.skipped_groups == 0
    assert replace(settings, steps=3).steps == 3


def test_trl_takes_a_step_on_the_same_shapes(tmp_path):
    pytest.importorskip("trl")
    policy_settings = StepBench(
        model="tiny", work=Work(prompts=1, group=2, image_px=56, prompt_tokens=30, completion_tokens=3)
    )
    processor = make_processor(SIZES["tiny"].vocabulary, 56)
    examples = make_examples(tmp_path, 3, 56, question(processor, 30))
    took = BASELINES["trl"](policy_settings, examples, "cpu", torch.float32)
    assert took.seconds > 0


def test_seconds_go_to_the_innermost_phase(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(now)))
    with timing() as spent, phase("policy"), phase("vision"):  # 0; 1; 2
        pass  # vision ends at 3, policy at 4
    assert spent == {"policy": 2.0, "vision": 1.0}


def test_phases_cost_nothing_where_nobody_listens():
    with phase("policy"):
        pass
    with timing() as spent:
        pass
    assert spent == {}
