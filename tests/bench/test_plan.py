"""What a plan says of memory and time, held against models that exist and against arithmetic."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from typer.testing import CliRunner

from medrl.bench import plan as planning
from medrl.bench.limits import Work, parameters
from medrl.bench.memory import KEPT_FREE, Layout, cure, memory, peak, trained_weights
from medrl.bench.models import SIZES
from medrl.bench.plan import Cluster, plan, size_of
from medrl.cli import app
from medrl.data.store import write_store
from medrl.errors import RunError, SettingsError

TWO_B, SEVEN_B = SIZES["2b"], SIZES["7b"]
WORK = Work(prompts=1, group=8, image_px=448, prompt_tokens=80, completion_tokens=160)
GB = 2**30
"""Of a card, as it is sold."""


@pytest.fixture
def recipe(tmp_path):
    """A 2B in bfloat16 with a reference; nothing of it is loaded."""

    def write(**changes) -> str:
        values = {
            "policy": {"model": "Qwen/Qwen2-VL-2B-Instruct", "max_pixels": 401408},
            "data": {"train": "store"},
            "grpo": {"group_size": 8, "kl_coef": 0.04},
            "training": {"steps": 100, "prompts_per_step": 8},
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(values | changes))
        return str(file)

    return write


def test_the_shapes_of_a_folder_are_those_of_the_model_in_it(policy, tmp_path):
    policy.save(tmp_path / "model")
    size = size_of(str(tmp_path / "model"))
    matrices = {id(p): p.numel() for p in policy.model.parameters() if p.ndim >= 2}
    assert parameters(size) == sum(matrices.values())
    assert (size.layers, size.kv_heads) == policy.family.cache_shape[:2]


def test_a_model_of_unknown_shape_and_images_of_unknown_size_are_refused(recipe):
    with pytest.raises(SettingsError, match="Qwen2-VL-2B-Instruct"):
        size_of("someone/some-model")
    without = recipe(policy={"model": "Qwen/Qwen2-VL-2B-Instruct"})
    with pytest.raises(SettingsError, match="--image-px"):
        plan(without, (), Cluster(gpus=1, gpu_gb=80))
    assert plan(without, (), Cluster(gpus=1, gpu_gb=80, image_px=448))["basis"]["image_px"] == 448


def test_memory_is_the_arithmetic_of_weights():
    n = parameters(TWO_B)
    parts = memory(TWO_B, WORK, Layout())
    assert parts["weights"] == parts["reference"] == parts["half gradients"] == 2 * n
    assert (parts["lower halves"], parts["moments"]) == (2 * n, 8 * n)  # with the weights, those of float32
    # One group is never cut, and a step that is not cut keeps no sums.
    assert "gradients" not in parts
    several = replace(WORK, prompts=4)
    whole = 4 * (WORK.prompt_length + 8 * 160 + WORK.patches)
    for asked, summed in ((None, 4 * n), (WORK.prompt_length + 8 * 160, 4 * n), (whole, None)):
        cut = memory(TWO_B, several, Layout(tokens_per_micro_batch=asked))
        assert cut.get("gradients") == summed
        # Summed as they are made, no two of them are held: the embedding's is the largest.
        assert cut["half gradients"] == 2 * (n if summed is None else TWO_B.vocabulary * TWO_B.hidden)
    in_full = memory(TWO_B, WORK, Layout(element_bytes=4, reference=False))
    assert in_full["weights"] == 4 * n and "lower halves" not in in_full and "reference" not in in_full
    # Measured with a prototype of this engine on one H100: 3.3 MB a token and 1.9 MB a patch (bench/memory.py).
    tokens, patches = WORK.prompt_length + 8 * 160, WORK.patches
    assert parts["activations"] == pytest.approx(3.3e6 * tokens + 1.9e6 * patches, rel=0.05)


def test_rollouts_keep_the_buffers_of_all_rows_through_the_backward_pass():
    work = Work(prompts=5, group=8, image_px=448, prompt_tokens=80, completion_tokens=160)
    parts = memory(TWO_B, work, Layout())
    per_token = 2 * 28 * 2 * 128 * 2  # keys and values, layers, heads, width, bytes
    drawn = 8 * 40 * TWO_B.vocabulary  # logits and shares in float32, in memory that all graphs share
    assert parts["rollouts"] == per_token * (5 * work.prompt_length + 40 * 160) + drawn
    assert peak(parts) == sum(parts.values())
    assert "rollouts" not in memory(TWO_B, work, Layout(samples=False))


def test_where_nothing_is_sampled_here_rollouts_take_nothing(recipe):
    cluster = Cluster(gpus=1, gpu_gb=80)
    assert "rollouts" in plan(recipe(), (), cluster)["memory_gb"]
    for words in (["method=sft"], ["rollout.endpoint=http://localhost:8000/v1"]):
        assert "rollouts" not in plan(recipe(), words, cluster)["memory_gb"]


def test_each_setting_takes_from_its_own_part():
    plain = memory(SEVEN_B, WORK, Layout(gpus=8))
    pieces = memory(SEVEN_B, WORK, Layout(gpus=8, fsdp=True))
    for part in ("gradients", "moments"):
        assert pieces[part] == pytest.approx(plain[part] / 8, rel=1e-6)
    assert pieces["float32 weights"] == pytest.approx(4 * parameters(SEVEN_B) / 8, rel=1e-6)
    assert pieces["weights"] == plain["weights"]  # every rank samples with all of them
    again = memory(SEVEN_B, WORK, Layout(gpus=8, checkpoint_activations=True))
    assert again["activations"] < plain["activations"] / 5
    away = memory(SEVEN_B, WORK, Layout(gpus=8, offload_reference=True))
    assert away["reference"] < plain["reference"] / 5
    frozen = memory(SEVEN_B, WORK, Layout(gpus=8, freeze_vision=True))
    assert frozen["moments"] < plain["moments"] and frozen["activations"] < plain["activations"]
    adapters = memory(SEVEN_B, WORK, Layout(gpus=8, lora=True))
    assert adapters["moments"] < plain["moments"] / 50 and "reference" not in adapters


def test_the_cure_is_the_first_that_suffices_and_does():
    room = (1 - KEPT_FREE) * 80 * GB
    alone = Layout(gpus=8)
    assert peak(memory(SEVEN_B, WORK, alone)) > room
    found = cure(SEVEN_B, WORK, alone, room)
    assert found is not None
    names, cured = found
    assert names == ["scale.strategy=fsdp"] and cured.fsdp and peak(memory(SEVEN_B, WORK, cured)) <= room
    one = cure(SEVEN_B, WORK, Layout(gpus=1), room)
    assert one is not None and one[0] == ["policy.lora={}", "policy.checkpoint_activations=true"]
    assert cure(SEVEN_B, WORK, Layout(gpus=1), 10 * GB) is None
    assert trained_weights(SEVEN_B, one[1]) < parameters(SEVEN_B) / 50


def test_time_follows_a_measured_step_and_the_number_of_gpus(recipe, tmp_path):
    file = recipe()
    measured = tmp_path / "bench.json"
    told = {"copy_gb_per_s": 3000.0, "matrix_tflops": 800.0, "fraction_of_limit": 0.5, "device": "a card"}
    measured.write_text(json.dumps(told))
    half = plan(file, (), Cluster(gpus=1, gpu_gb=80, measured=measured))
    measured.write_text(json.dumps({**told, "fraction_of_limit": 0.25}))
    quarter = plan(file, (), Cluster(gpus=1, gpu_gb=80, measured=measured))
    assert quarter["seconds_per_step"] == pytest.approx(2 * half["seconds_per_step"])
    assert quarter["hours"] == pytest.approx(100 * quarter["seconds_per_step"] / 3600)
    eight = plan(file, (), Cluster(gpus=8, gpu_gb=80, measured=measured))
    assert eight["phases"]["policy"] == pytest.approx(quarter["phases"]["policy"] / 8)
    assert quarter["seconds_per_step"] / 8 < eight["seconds_per_step"] < quarter["seconds_per_step"]
    assert plan(file, (), Cluster(gpus=16, gpu_gb=80))["idle_gpus"] == 8
    measured.write_text("{}")
    with pytest.raises(RunError, match="is not what 'medrl bench step --json' prints"):
        plan(file, (), Cluster(gpus=1, gpu_gb=80, measured=measured))
    with pytest.raises(RunError, match=r"there is no file .*missing\.json"):
        plan(file, (), Cluster(gpus=1, gpu_gb=80, measured=tmp_path / "missing.json"))
    measured.write_text(json.dumps({**told, "device": "CPU, 2 threads"}))
    with pytest.warns(UserWarning, match="was measured on a CPU"):
        plan(file, (), Cluster(gpus=1, gpu_gb=80, measured=measured))


def test_gigabytes_are_those_of_1e9_bytes_and_a_card_holds_what_it_is_sold_by(recipe):
    found = plan(recipe(), (), Cluster(gpus=1, gpu_gb=80))
    assert found["memory_gb"]["weights"] == pytest.approx(2 * parameters(TWO_B) / 1e9)
    assert found["peak_gb"] == pytest.approx(sum(found["memory_gb"].values()))
    assert found["room_gb"] == pytest.approx((1 - KEPT_FREE) * 80 * GB / 1e9) and found["gpu_gb"] == 80


def test_the_command_says_what_fits_and_what_would_make_it_fit(recipe):
    runner = CliRunner()
    fits = runner.invoke(app, ["plan", recipe(), "--gpus", "8"])
    assert fits.exit_code == 0 and "it fits" in fits.output
    not_so = runner.invoke(app, ["plan", recipe(), "policy.model=Qwen/Qwen2-VL-7B-Instruct", "--gpus", "8"])
    assert not_so.exit_code == 3 and "scale.strategy=fsdp" in not_so.output and "so set, " in not_so.output
    never = runner.invoke(app, ["plan", recipe(), "--gpus", "1", "--gpu-gb", "2"])
    assert never.exit_code == 3 and "no setting makes it" in never.output
    assert "s per step" not in never.output  # of what cannot run
    told = runner.invoke(app, ["plan", recipe(), "--gpus", "8", "--gpu-gb", "24", "--json"])
    found = json.loads(told.output)
    assert told.exit_code == 3 and not found["fits"] and found["peak_gb"] > found["room_gb"]


def test_on_this_machine_the_first_steps_speak_for_all(make_examples, make_policy, tmp_path):
    make_policy(torch.float32).save(tmp_path / "model")
    write_store(tmp_path / "store", make_examples(tmp_path / "images", 6), source="noise", license="none")
    file = tmp_path / "recipe.yaml"
    training = {
        "steps": 70, "save_every": 20, "prompts_per_step": 2, "mode": "no_think", "template": "plain-no-think",
        "sampling": {"max_new_tokens": 4},
    }  # fmt: skip
    values = {
        "policy": {"model": str(tmp_path / "model"), "dtype": "float32"},
        "data": {"train": str(tmp_path / "store")},
        "grpo": {"group_size": 2, "kl_coef": 0.0},
        "training": training,
    }
    file.write_text(yaml.safe_dump(values))
    found = planning.measure(file, steps=3, quiet=True)
    assert found["measured_steps"] == 2 and found["steps"] == 70
    saving = 4 * found["seconds_per_checkpoint"]  # after steps 20, 40, 60 and the last
    assert found["hours_high"] == pytest.approx((70 * found["seconds_per_step_now"] + saving) / 3600)
    least = found["seconds_per_step_now"] - found["phases"]["update"]
    assert found["hours_low"] == pytest.approx((70 * least + saving) / 3600)
    assert found["hours"] == pytest.approx((found["hours_low"] + found["hours_high"]) / 2)
    # With a KL every group is learned from, so there is nothing to guess.
    sure = planning.measure(file, ["grpo.kl_coef=0.1"], steps=3, quiet=True)
    assert sure["hours_low"] == sure["hours"] == sure["hours_high"]
    with pytest.raises(SettingsError, match="warms up"):
        planning.measure(file, steps=1)
