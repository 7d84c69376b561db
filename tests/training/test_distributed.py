"""Two real processes train what one trains: the same samples and rewards, the same loss and gradient up to rounding."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import medrl
from medrl.errors import SettingsError
from medrl.grpo import GRPO
from medrl.policy.policy import Policy
from medrl.runs import Run
from medrl.training import distributed
from medrl.training.checkpoint import list_checkpoints, read_manifest
from medrl.training.distributed import Scale, balance
from medrl.training.train import train

WORKER = Path(__file__).with_name("rank_worker.py")
GRPO_2 = {"group_size": 2, "kl_coef": 0.04}
CLOSE = 1e-5
SAMPLED = ("step", "prompt_id", "completion", "finish_reason", "reward", "parts", "answer", "advantage", "tokens")
"""What must be the same to the bit; entropy, KL and the sampler's gap are sums in another order."""


@pytest.fixture(scope="module")
def settings(small):
    """Five steps of three prompts, so that two ranks have different shares; every step is saved."""
    return small.model_copy(update={"prompts_per_step": 3, "save_every": 1, "keep_checkpoints": 10})


def one_process(model_folder, examples, lively, settings, out, dtype="float32", resume="never") -> Run:
    policy = Policy.load(model_folder, dtype=dtype, device="cpu")
    return train(policy, examples, lively, GRPO(**GRPO_2), out=out, settings=settings, quiet=True, resume=resume)


def forget_after(out: Path, step: int) -> None:
    """As if the run had been killed after its checkpoint of this step."""
    for folder in list_checkpoints(out / "checkpoints"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def start_two(folder: Path) -> list[dict]:
    """Run the worker on two ranks; what each wrote down."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(medrl.__file__).parent.parent),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder)],
            env={**shared, "RANK": str(n), "LOCAL_RANK": str(n)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    said = [process.communicate(timeout=280)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    return [json.loads((folder / f"rank-{n}.json").read_text()) for n in range(2)]


@pytest.fixture(scope="module")
def alone(model_folder, examples, lively, settings, tmp_path_factory):
    return one_process(model_folder, examples, lively, settings, tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture(scope="module")
def alone_in_half(model_folder, examples, lively, settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("half") / "run"
    return one_process(model_folder, examples, lively, settings, out, dtype="bfloat16")


@pytest.fixture(scope="module")
def two(model_folder, examples, settings, alone, alone_in_half, tmp_path_factory):
    """All jobs of the two ranks, in one start: the libraries take longer to load than the jobs to run."""
    folder = tmp_path_factory.mktemp("two")
    rows = [dataclasses.asdict(example) for example in examples]
    (folder / "examples.json").write_text(json.dumps(rows, default=str))
    resumed, resumed_in_half = folder / "resumed", folder / "resumed_in_half"
    for before, copied in ((alone, resumed), (alone_in_half, resumed_in_half)):
        shutil.copytree(before.path, copied)
        forget_after(copied, 2)
    job = {"model": str(model_folder), "settings": settings.model_dump(mode="json"), "grpo": GRPO_2}
    wide = {**job["settings"], "prompts_per_step": 1}
    fsdp = {"strategy": "fsdp"}
    jobs = {
        "ddp": {**job, "out": str(folder / "ddp")},
        "fsdp": {**job, "out": str(folder / "fsdp"), "scale": fsdp},
        "idle rank": {**job, "out": str(folder / "idle"), "settings": wide, "scale": fsdp},
        "resumed": {**job, "out": str(resumed)},
        "resumed in half": {**job, "out": str(resumed_in_half), "scale": fsdp, "dtype": "bfloat16"},
        "stopped": {**job, "out": str(folder / "stopped"), "reward": "stopping"},
        "broken": {**job, "out": str(folder / "broken"), "reward": "broken"},
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return folder, start_two(folder)


def sampled(run: Run) -> list[dict]:
    return [{name: row.get(name) for name in SAMPLED} for row in run.rollouts()]


def assert_same_run(found: Run, expected: Run, close: float = CLOSE) -> None:
    assert sampled(found) == sampled(expected)
    ours, theirs = found.metrics(), expected.metrics()
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("loss", "policy_loss", "kl", "entropy", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=close, abs=close), (mine["step"], name)
        for name in ("reward", "reward_std", "training_tokens", "skipped_groups", "pass@2", "completions/mean_length"):
            assert mine[name] == other[name]


def first_moments(run: Run) -> dict[str, torch.Tensor]:
    """After the first step: a tenth of the clipped gradient."""
    tensors = load_file(run.checkpoints / "step-000001" / "trainer" / "optimizer.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.endswith("exp_avg")}


# ---------------------------------------------------------------- what ranks tell each other


def test_every_rank_hears_the_same_and_work_comes_back_in_order(two):
    for told in two[1]:
        assert told["told"] == [0, 1]
        assert told["spread"] == ["A", "B", "C", "D", "E"]


def test_a_mistake_on_one_rank_is_told_to_the_others_instead_of_leaving_them_waiting(two):
    first, second = (told["mistake"] for told in two[1])
    assert second == "KeyError: 'PET'"
    assert first == "MedrlError: KeyError: 'PET' (on rank 1)"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_what_one_process_trains(two, alone, strategy):
    run = Run.open(two[0] / strategy)
    assert_same_run(run, alone)
    gradients, expected = first_moments(run), first_moments(alone)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=CLOSE, atol=CLOSE * float(expected[name].abs().max()))
    assert two[1][0][strategy]["fingerprint"] == two[1][1][strategy]["fingerprint"]
    assert read_manifest(run.checkpoints / "step-000005")["world_size"] == 2


def test_a_rank_without_a_prompt_of_its_own_takes_part(two, model_folder, examples, lively, settings, tmp_path):
    one_prompt = settings.model_copy(update={"prompts_per_step": 1})
    assert_same_run(
        Run.open(two[0] / "idle"), one_process(model_folder, examples, lively, one_prompt, tmp_path / "run")
    )


def test_a_run_goes_on_from_one_process_to_two_and_back(two, model_folder, examples, lively, settings, alone):
    out = two[0] / "resumed"
    assert_same_run(Run.open(out), alone)
    forget_after(out, 4)
    assert_same_run(one_process(model_folder, examples, lively, settings, out, resume="must"), alone)


def test_a_run_in_half_precision_goes_on_in_pieces_and_back(
    two, model_folder, examples, lively, settings, alone_in_half
):
    out = two[0] / "resumed_in_half"
    names = set(load_file(out / "checkpoints" / "step-000004" / "trainer" / "optimizer.safetensors"))
    theirs = alone_in_half.checkpoints / "step-000004" / "trainer" / "optimizer.safetensors"
    assert names == load_file(theirs).keys() and any(name.endswith(".master") for name in names)
    forget_after(out, 4)
    run = one_process(model_folder, examples, lively, settings, out, dtype="bfloat16", resume="must")
    # Sums of bfloat16 numbers in another order: what is sampled may differ once weights have moved.
    assert [row["step"] for row in run.metrics()] == [0, 1, 2, 3, 4]
    first = [row for row in sampled(run) if row["step"] <= 2]
    assert first == [row for row in sampled(alone_in_half) if row["step"] <= 2]
    ours, theirs_at_2 = run.metrics()[2], alone_in_half.metrics()[2]
    assert ours["loss"] == pytest.approx(theirs_at_2["loss"], abs=5e-3)
    assert ours["grad_norm"] == pytest.approx(theirs_at_2["grad_norm"], rel=0.05)


def test_what_goes_wrong_on_one_rank_stops_all_before_a_weight_moves_and_is_named(two, model_folder):
    start = Policy.load(model_folder, dtype="float32", device="cpu").fingerprint()
    told = [rank["broken"] for rank in two[1]]
    assert all("example-5" in rank["error"] for rank in told)
    assert sum("(on rank" in rank["error"] for rank in told) == 1  # the other one met it itself
    steps = len(Run.open(two[0] / "broken").metrics())
    assert told[0]["fingerprint"] == told[1]["fingerprint"]
    assert (told[0]["fingerprint"] == start) == (steps == 0)


def test_one_rank_that_is_asked_to_stop_stops_and_saves_all(two, model_folder, examples, lively, settings, alone):
    out = two[0] / "stopped"
    assert [rank["stopped"] for rank in two[1]] == [{"stopped": True}] * 2
    steps = len(Run.open(out).metrics())
    assert 0 < steps < 5
    assert [folder.name for folder in list_checkpoints(out / "checkpoints")][-1] == f"step-{steps:06d}"
    assert_same_run(one_process(model_folder, examples, lively, settings, out, resume="must"), alone)


def test_without_a_way_to_meet_the_start_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingsError, match="RANK, MASTER_ADDR, MASTER_PORT"), distributed.joined():
        pass


# ---------------------------------------------------------------- who learns from what


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=24), st.integers(1, 8))
def test_tokens_are_evened_out_and_no_group_is_lost(costs, ranks):
    owners = balance(costs, ranks)
    assert len(owners) == len(costs) and set(owners) <= set(range(ranks))
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == n) for n in range(ranks)]
    dealt = [sum(costs[n::ranks]) for n in range(ranks)]
    assert max(loads) <= max(dealt)
    # No group is left whose move to the emptiest rank would still pay.
    heavy = max(loads)
    for cost, owner in zip(costs, owners, strict=True):
        if loads[owner] == heavy:
            saved = heavy - max(heavy - cost, min(loads) + cost)
            assert owner != loads.index(heavy) or saved <= distributed.WORTH_A_MOVE * sum(costs) / ranks


def test_groups_stay_where_they_were_sampled_unless_a_move_pays():
    assert balance([100, 100, 100, 100], 2) == [0, 1, 0, 1]
    assert balance([100, 98, 100, 100], 2) == [0, 1, 0, 1]
    assert balance([100, 10, 100, 10], 2) == [1, 0, 0, 1]
    assert balance([0.0, 0.0, 50.0], 4) == [0, 1, 2]


def test_one_process_needs_no_meeting():
    assert (distributed.world_size(), distributed.rank(), distributed.first()) == (1, 0, True)
    assert distributed.spread([1, 2, 3], lambda mine: [10 * n for n in mine]) == [10, 20, 30]
    with distributed.joined():
        assert distributed.world_size() == 1
    assert Scale().strategy == "ddp"
