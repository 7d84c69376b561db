"""What ``medrl bench`` prints: the keys programs rely on, and numbers that agree with each other."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from medrl.bench.baselines import BASELINES, generate_with_transformers, placeholders
from medrl.bench.limits import Work
from medrl.bench.models import SIZES, ask, build_policy, make_examples, make_processor, question
from medrl.bench.step import PHASES, StepBench, make_step
from medrl.cli import app
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
    assert found["limit_seconds"] > 0 and found["peak_gb"] > 0 and found["mfu"] > 0
    assert found["device"].startswith(("CPU", "NVIDIA"))
    assert found["baseline"]["name"] == "naive"
    assert found["speedup"] == pytest.approx(found["baseline"]["seconds_per_step"] / found["seconds_per_step"])
    assert found["sampling_gap"] < (1e-4 if found["device"].startswith("CPU") else 1e-1)


def test_no_kl_has_no_reference_and_no_baseline_no_ratio():
    found = run("step", *SMALL, "--prompts", "1", "--group", "2", "--steps", "1", "--kl", "0")
    assert found["phases"]["reference"] == 0 and "reference" not in found["limit_phases"]
    assert "baseline" not in found and "speedup" not in found


def test_a_timed_evaluation_answers_what_transformers_answers():
    found = run("eval", *SMALL, "--items", "3", "--repeats", "1")
    assert found["same_tokens"] == 1.0
    assert found["items_per_s"] == pytest.approx(3 / found["seconds"])
    assert found["speedup"] == pytest.approx(found["items_per_s"] / found["baseline"]["items_per_s"])


def test_words_that_mean_nothing_end_with_2():
    for words in (["--model", "3b"], ["--prompt-tokens", "5"]):
        result = CliRunner().invoke(app, ["bench", "step", *words])
        assert result.exit_code == 2, result.output


def test_prompts_are_as_long_as_asked_and_completions_too(tmp_path):
    policy = build_policy(SIZES["tiny"], 56, "cpu", torch.float32)
    text = question(policy.processor, 30)
    (example,) = make_examples(tmp_path, 1, 56, text)
    (prompt,) = policy.encode([ask(example)])
    assert len(prompt.token_ids) == 30 + 4
    ((completion,),) = generate(policy, [ask(example)], Sampling(max_new_tokens=9))
    assert len(completion.token_ids) == 9
    assert generate_with_transformers(policy, [prompt], 2, 5, sample=True).shape == (2, 5)


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
