"""Rollouts on a server: the same run, corrected, handed over, resumed; and what is wrong with a server ends the run."""

import json
import math

import pytest
import torch
from rollout_server import RolloutServer, running

from medrl.errors import EndpointError, SettingsError
from medrl.grpo import GRPO
from medrl.policy.policy import Policy
from medrl.rollout import endpoint, served
from medrl.rollout.sampling import Sampling
from medrl.rollout.served import Rollouts
from medrl.sft import RFT, SFT
from medrl.stopping import Stopped
from medrl.training import start
from medrl.training.batches import Objective
from medrl.training.checkpoint import list_checkpoints
from medrl.training.curriculum import Curriculum
from medrl.training.train import train

OBJECTIVE = GRPO(group_size=3, kl_coef=0.04)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Waits between attempts are a hundredth of what they are outside."""
    monkeypatch.setattr(served, "Endpoint", lambda *a, **k: endpoint.Endpoint(*a, **k, first_wait_s=0.01))


@pytest.fixture
def make_server(make_policy, examples, small, tmp_path):
    """A server that starts with other weights than the run's."""

    def make(kind="vllm", fault=lambda path, n: None, name="server"):
        folder = tmp_path / name
        folder.mkdir()
        server = RolloutServer(kind, make_policy(torch.float32, seed=9), folder, fault)
        server.expect(small.seed, range(-1, small.steps), [e.id for e in examples], 4)
        return server

    return make


def run_with(server, model_folder, examples, reward, settings, out, objective: Objective = OBJECTIVE, **options):
    policy = Policy.load(model_folder)
    rollout = None if server is None else Rollouts(endpoint=server.url, server=server.kind, model="tiny")
    options = {"out": out, "settings": settings, "rollout": rollout, "quiet": True, **options}
    run = train(policy, examples, reward, objective, **options)
    return run, policy


@pytest.fixture(scope="module")
def alone(model_folder, examples, lively, small, tmp_path_factory):
    """The run that no server has a part in."""
    out = tmp_path_factory.mktemp("alone") / "run"
    return run_with(None, model_folder, examples, lively, small, out)[0]


def texts(run):
    """What was written and how it was rewarded; a reward may hold a KL, and so the rounding of log-probabilities."""
    return [(row["step"], row["prompt_id"], row["completion"], round(row["reward"], 5)) for row in run.rollouts()]


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("vllm", OBJECTIVE),
        ("sglang", GRPO(group_size=3, kl_coef=0.0, updates_per_rollout=2)),
        ("sglang", GRPO(algorithm="rloo", group_size=3)),
    ],
)
def test_a_run_on_a_server_is_the_run_without_one(
    kind, objective, make_server, model_folder, examples, lively, small, tmp_path
):
    alone, policy = run_with(None, model_folder, examples, lively, small, tmp_path / "alone", objective)
    with running(make_server(kind)) as server:
        run, with_server = run_with(server, model_folder, examples, lively, small, tmp_path / "run", objective)
    assert texts(run) == texts(alone)
    for ours, theirs in zip(run.metrics(), alone.metrics(), strict=True):
        for name in ("loss", "reward", "kl", "entropy", "grad_norm", "clip_fraction"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), (ours["step"], name)
        assert ours["sampling_gap"] < 1e-5 and ours["sampling_capped"] == 0
        assert ours["sampling_weight"] == pytest.approx(1, abs=1e-5)
        assert "sampling_weight" not in theirs
    for (name, ours), theirs in zip(with_server.model.named_parameters(), policy.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-4), name  # Adam makes a fifth of a step of a gradient's rounding


def test_before_each_step_the_server_gets_the_weights_that_the_step_begins_with(
    make_server, model_folder, examples, lively, small, tmp_path, monkeypatch
):
    begun = []
    give = served.Server.give

    def look(self, policy, step):
        begun.append(policy.fingerprint())
        return give(self, policy, step)

    monkeypatch.setattr(served.Server, "give", look)
    with running(make_server()) as server:
        run_with(server, model_folder, examples, lively, small, tmp_path / "run")
    asked = ["asked"] * small.prompts_per_step * OBJECTIVE.group_size
    caches = ["/reset_prefix_cache", "/reset_encoder_cache"]
    assert server.events == [event for weights in begun for event in (weights, *caches, *asked)]
    assert len(set(begun)) == small.steps
    assert len(list((tmp_path / "run" / "served").iterdir())) == 1  # only the last is kept


def test_what_is_asked_for_is_the_plain_distribution_with_tokens_and_log_probabilities(
    make_server, model_folder, examples, lively, small, tmp_path
):
    with running(make_server()) as server:
        run_with(server, model_folder, examples, lively, small.model_copy(update={"steps": 1}), tmp_path / "run")
    for body in server.bodies:
        assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (1.0, 1.0, -1, 0.0)
        assert (body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (1.0, 0.0, 0.0)
        assert body["logprobs"] is True and body["return_token_ids"] is True
        assert body["model"] == "tiny" and body["max_tokens"] == small.sampling.max_new_tokens
    assert len({body["seed"] for body in server.bodies}) == len(server.bodies)


def skew(by):
    """A server that is ``by`` nats too sure of every token."""

    def change(answer):
        rows = answer["choices"][0]["logprobs"]["content"]
        return json.loads(
            json.dumps(answer), object_hook=lambda d: d | {"logprob": d["logprob"] - by} if d in rows else d
        )

    return change


@pytest.mark.parametrize(("by", "weight", "capped"), [(0.5, math.exp(0.5), 0), (-0.5, math.exp(-0.5), 0), (1, 2, 1)])
def test_a_server_that_disagrees_is_corrected_up_to_the_cap_and_it_is_logged(
    by, weight, capped, make_server, model_folder, examples, lively, small, tmp_path
):
    one = small.model_copy(update={"steps": 1})
    objective = GRPO(group_size=3, kl_coef=0.0)
    alone, _ = run_with(None, model_folder, examples, lively, one, tmp_path / "alone", objective)
    fault = lambda path, n: skew(by) if "chat" in path else None  # noqa: E731
    with running(make_server(fault=fault)) as server:
        run, _ = run_with(server, model_folder, examples, lively, one, tmp_path / "run", objective)
    (ours,), (theirs,) = run.metrics(), alone.metrics()
    assert ours["sampling_gap"] == pytest.approx(abs(by), abs=1e-5)
    assert ours["sampling_weight"] == pytest.approx(weight, rel=1e-5)
    assert ours["sampling_capped"] == capped
    assert ours["grad_norm"] == pytest.approx(weight * theirs["grad_norm"], rel=1e-4)


def test_a_resumed_run_hands_over_its_weights_before_it_asks_and_ends_as_if_nothing_had_been(
    make_server, model_folder, examples, lively, small, tmp_path
):
    class Killed(BaseException):
        pass

    with running(make_server(name="whole")) as server:
        whole, policy = run_with(server, model_folder, examples, lively, small, tmp_path / "whole")
    seen = []

    def deadly(example, completion):
        seen.extend([example.id] if completion.token_ids else [])  # not those of the check before the first step
        if len(seen) > 3 * 2 * 3 + 1:  # in the fourth step
            raise Killed
        return lively(example, completion)

    with running(make_server(name="first")) as server, pytest.raises(Killed):
        run_with(server, model_folder, examples, deadly, small, tmp_path / "run")
    (*_, newest) = list_checkpoints(tmp_path / "run" / "checkpoints")
    saved = Policy.load(newest).fingerprint()
    with running(make_server(name="second")) as server:
        run, resumed = run_with(server, model_folder, examples, lively, small, tmp_path / "run", resume="must")
    assert server.events[0] == saved != Policy.load(model_folder).fingerprint()
    assert texts(run) == texts(whole)
    assert resumed.fingerprint() == policy.fingerprint()


FAULTS = ("close", 500, "half", lambda a: {**a, "choices": [{**a["choices"][0], "finish_reason": "abort"}]}, 429)


def test_a_server_that_fails_now_and_then_loses_no_sample(
    make_server, model_folder, examples, lively, small, alone, tmp_path
):

    def fault(path, n):
        return FAULTS[n // 2 % len(FAULTS)] if "chat" in path and n % 2 else "close" if n in (1, 3) else None

    with running(make_server(fault=fault)) as server:
        run, _ = run_with(server, model_folder, examples, lively, small, tmp_path / "run")
    assert texts(run) == texts(alone)
    assert len(server.bodies) > 5 * 2 * 3


def test_a_server_that_was_started_again_gets_the_weights_again_and_what_it_wrote_before_is_not_used(
    make_server, model_folder, examples, lively, small, alone, tmp_path
):
    restarted = []

    def fault(path, n):
        if "chat" in path and n == 9 and not restarted:
            restarted.append(n)
            server.restart(after_s=0.2)
            return "close"
        return None

    with running(make_server(fault=fault)) as server:
        run, _ = run_with(server, model_folder, examples, lively, small, tmp_path / "run")
    assert texts(run) == texts(alone)
    weights = [event for event in server.events if event not in ("asked",) and not event.startswith("/")]
    at = weights.index("restarted")
    assert weights[at + 1] == weights[at - 1]


@pytest.mark.parametrize(
    ("kind", "asked_as", "fault", "message"),
    [
        ("vllm", "sglang", lambda path, n: None, r"did not take .*update_weights_from_disk.*HTTP 404.*rollout.server"),
        ("sglang", "vllm", lambda path, n: None, r"collective_rpc.*HTTP 404.*VLLM_SERVER_DEV_MODE=1.*--resume auto"),
        ("vllm", "vllm", lambda path, n: 500 if "rpc" in path else None, r"HTTP 500.*same path"),
        (
            "sglang",
            "sglang",
            lambda path, n: (lambda a: {"success": False, "message": "no such folder"}) if "update" in path else None,
            "no such folder",
        ),
        ("sglang", "sglang", lambda path, n: 400 if "update" in path else None, "HTTP 400"),
    ],
)
def test_weights_that_a_server_does_not_take_end_the_run_before_it_is_asked(
    kind, asked_as, fault, message, make_server, model_folder, examples, lively, small, tmp_path
):
    with running(make_server(kind, fault)) as server, pytest.raises(EndpointError, match=message):
        server.kind, kind = asked_as, server.kind  # what the run believes
        rollout = Rollouts(endpoint=server.url, server=asked_as)
        server.kind = kind
        run_with(None, model_folder, examples, lively, small, tmp_path / "run", rollout=rollout)
    assert "asked" not in server.events


def test_a_server_that_is_gone_for_good_leaves_the_run_saved_where_it_was(
    make_server, model_folder, examples, lively, small, alone, tmp_path, monkeypatch
):
    monkeypatch.setattr(served, "TRIES", 3)
    gone = lambda path, n: 503 if "chat" in path and n > 3 * 6 + 1 else None  # noqa: E731  # in the fourth step
    with running(make_server(fault=gone)) as server, pytest.raises(EndpointError, match=r"HTTP 503.*--resume auto"):
        run_with(server, model_folder, examples, lively, small, tmp_path / "run")
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000002", "step-000003"]
    with running(make_server(name="other")) as server:
        run, _ = run_with(server, model_folder, examples, lively, small, tmp_path / "run", resume="must")
    assert texts(run) == texts(alone)


def changed(**fields):
    def change(answer):
        choice = {**answer["choices"][0], **{k: v for k, v in fields.items() if k != "prompt_token_ids"}}
        prompt = {k: v for k, v in fields.items() if k == "prompt_token_ids"}
        return {**answer, "choices": [choice], **prompt}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(token_ids=None), r"example-\d: its reply lacks token_ids.*return_token_ids"),
        (changed(logprobs=None), "lacks token_ids, prompt_token_ids or logprobs"),
        (changed(prompt_token_ids=None), "lacks token_ids, prompt_token_ids or logprobs"),
        (changed(prompt_token_ids=[1, 2, 3]), r"reads the prompt of example example-\d otherwise: 3 tokens where the"),
        (changed(finish_reason="tool_calls"), "it ended the completion with 'tool_calls'"),
        (lambda a: changed(token_ids=a["choices"][0]["token_ids"] + [5])(a), r"gave \d token ids and \d log-prob"),
        (
            lambda a: changed(
                token_ids=[7], finish_reason="length", logprobs={"content": a["choices"][0]["logprobs"]["content"][:1]}
            )(a),
            r"ended the completion of example example-\d after 1 tokens \('length'\).*longer context",
        ),
        (changed(finish_reason="stop", token_ids=[7] * 6), r"\('stop'\), neither at the end of the policy's turn"),
    ],
)
def test_what_cannot_be_trained_on_ends_the_run_naming_the_example(
    change, message, make_server, model_folder, examples, lively, small, tmp_path
):
    def long(answer):
        """Of the right length, whatever was drawn."""
        row = answer["choices"][0]["logprobs"]["content"][0]
        return changed(token_ids=[7] * 6, finish_reason="length", logprobs={"content": [row] * 6})(answer)

    fault = lambda path, n: (lambda a: change(long(a))) if "chat" in path else None  # noqa: E731
    with running(make_server(fault=fault)) as server, pytest.raises(EndpointError, match=message):
        run_with(server, model_folder, examples, lively, small, tmp_path / "run")


def test_a_prompt_whose_images_have_no_room_yet_is_the_same_prompt(
    make_server, model_folder, examples, lively, small, tmp_path
):
    image = Policy.load(model_folder).family.image_token_id

    def before_images(answer):
        ids = answer["prompt_token_ids"]
        kept = [token for i, token in enumerate(ids) if not (token == image and i and ids[i - 1] == image)]
        assert len(kept) < len(ids)
        return changed(prompt_token_ids=kept)(answer)

    fault = lambda path, n: before_images if "chat" in path else None  # noqa: E731
    with running(make_server(fault=fault)) as server:
        run, _ = run_with(
            server, model_folder, examples, lively, small.model_copy(update={"steps": 1}), tmp_path / "run"
        )
    assert len(run.metrics()) == 1


@pytest.mark.parametrize(
    ("objective", "sampling", "message"),
    [
        (OBJECTIVE, Sampling(temperature=0.7), "temperature 0.7.*must be 1, 1 and 0"),
        (OBJECTIVE, Sampling(top_p=0.9), "top_p 0.9"),
        (OBJECTIVE, Sampling(top_k=5), "top_k 5"),
        (SFT(), Sampling(), "samples nothing"),
    ],
)
def test_settings_that_a_server_cannot_serve_are_refused_before_anything_is_written(
    objective, sampling, message, model_folder, examples, lively, small, tmp_path
):
    settings = small.model_copy(update={"sampling": sampling})
    rollout = Rollouts(endpoint="http://127.0.0.1:9/v1")
    with pytest.raises(SettingsError, match=message):
        run_with(None, model_folder, examples, lively, settings, tmp_path / "run", objective, rollout=rollout)
    assert not (tmp_path / "run").exists()


def test_pass_rates_and_best_of_n_are_asked_of_the_server_too(
    make_server, model_folder, examples, lively, small, tmp_path
):
    order = small.model_copy(update={"curriculum": Curriculum(use="order", rollouts=4), "steps": 2})
    first = Policy.load(model_folder).fingerprint()
    with running(make_server()) as server:
        run, _ = run_with(server, model_folder, examples, lively, order, tmp_path / "run", RFT(group_size=4))
    assert len(run.pass_rates()) == 7
    assert server.events[0] == first  # the untrained policy is the one whose rates count
    assert server.events.count("asked") == 7 * 4 + 2 * 2 * 4


def test_a_run_that_waits_for_a_server_can_be_asked_to_stop(
    make_server, model_folder, examples, lively, small, tmp_path, monkeypatch
):
    monkeypatch.setattr(served, "TRIES", 1000)
    fault = lambda path, n: 503 if "chat" in path and n > 2 * 6 + 1 else None  # noqa: E731  # in the third step
    calls = []

    def check():
        calls.append(0)
        if server.counts.get("/v1/chat/completions", 0) > 2 * 6 + 4:
            raise Stopped

    monkeypatch.setattr("medrl.rollout.requests.stopping.check", check)
    with running(make_server(fault=fault)) as server, pytest.raises(Stopped):
        run_with(server, model_folder, examples, lively, small, tmp_path / "run")
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000002"]


def test_where_completions_are_written_may_change_on_resume():
    assert "rollout" in start.MAY_CHANGE
