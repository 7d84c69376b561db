import math

import pytest
import torch

from medrl.data.prompts import make_prompt
from medrl.policy.policy import Policy
from medrl.rollout.engine import generate
from medrl.rollout.sampling import Sampling

SAMPLING = Sampling(max_new_tokens=16)


@pytest.fixture(scope="module")
def prompts(make_examples, tmp_path_factory):
    """Eight prompts of different lengths and images."""
    examples = make_examples(tmp_path_factory.mktemp("images"), 8)
    return [make_prompt(example, template="plain") for example in examples]


@pytest.fixture(scope="module")
def ending(make_policy) -> Policy:
    """A policy that ends its turn about every sixth token, so that rows of a batch finish at different times."""
    policy = make_policy()
    favor(policy, policy.eos_token_id, 0.17)
    return policy


def favor(policy: Policy, token: int, probability: float) -> None:
    """Give a token about this probability after any prompt."""
    # There is no bias on the logits, so one is made: a last feature that is always 1 and that only this token sees.
    head, norm = policy.family.head, policy.model.model.language_model.norm
    inner = norm.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([inner(hidden)[..., :-1], torch.ones_like(hidden[..., :1])], dim=-1)

    norm.forward = forward
    with torch.no_grad():
        head[:, -1] = 0.0
        # The mean of exp(z) over the other tokens, were their logits normal.
        spread = 0.5 * float((head.norm(dim=1) ** 2).mean())
        head[token] = 0.0
        head[token, -1] = math.log((len(head) - 1) * probability / (1 - probability)) + spread


def tokens(completions) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in completions]


class Spy:
    """Counts the rows of every forward pass of the language model."""

    def __init__(self, policy: Policy, monkeypatch) -> None:
        self.rows: list[tuple[int, int]] = []
        inner = policy.family.hidden

        def hidden(embedded, *rest):
            self.rows.append(tuple(embedded.shape[:2]))
            return inner(embedded, *rest)

        monkeypatch.setattr(policy.family, "hidden", hidden)


def test_lengths_differ_so_that_the_tests_below_mean_something(ending, prompts):
    lengths = [c.token_ids for group in generate(ending, prompts, SAMPLING, group_size=4) for c in group]
    assert len({len(ids) for ids in lengths}) > 5
    assert len(set(lengths)) > 25


def test_a_completion_does_not_depend_on_the_batch_it_travels_in(ending, prompts):
    together = tokens(generate(ending, prompts, SAMPLING, group_size=3, seed=5, step=2))
    one_by_one = [tokens(generate(ending, [p], SAMPLING, group_size=3, seed=5, step=2))[0] for p in prompts]
    assert together == one_by_one
    backwards = tokens(generate(ending, prompts[::-1], SAMPLING, group_size=3, seed=5, step=2))
    assert together == backwards[::-1]
    fewer = tokens(generate(ending, prompts, SAMPLING, group_size=2, seed=5, step=2))
    assert [group[:2] for group in together] == fewer


@pytest.mark.parametrize("threshold", [0.0, 1.1])
def test_cutting_finished_rows_out_of_the_cache_changes_nothing(ending, prompts, monkeypatch, threshold):
    expected = generate(ending, prompts, SAMPLING, group_size=3)
    monkeypatch.setattr("medrl.rollout.engine.COMPACT_BELOW", threshold)
    found = generate(ending, prompts, SAMPLING, group_size=3)
    assert tokens(found) == tokens(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.sampling_logprobs == pytest.approx(other.sampling_logprobs, rel=1e-6)


def test_the_same_place_draws_the_same_and_any_other_place_draws_anew(ending, prompts):
    base = generate(ending, prompts, SAMPLING, group_size=2, seed=1, step=1)
    assert generate(ending, prompts, SAMPLING, group_size=2, seed=1, step=1) == base
    # Two that both end at once are equal by chance, one time in thirty.
    assert all(first != second or len(first) == 1 for first, second in tokens(base))
    for seed, step in ((2, 1), (1, 2)):
        other = generate(ending, prompts, SAMPLING, group_size=2, seed=seed, step=step)
        assert all(a != b for a, b in zip(tokens(base), tokens(other), strict=True))


def test_a_longer_limit_only_continues_what_was_cut(ending, prompts):
    short = generate(ending, prompts, Sampling(max_new_tokens=4))
    long = generate(ending, prompts, SAMPLING)
    assert [ids[:4] for (ids,) in tokens(long)] == [ids for (ids,) in tokens(short)]


def test_top_k_of_one_is_greedy(ending, prompts):
    sampled = generate(ending, prompts, Sampling(top_k=1, max_new_tokens=8))
    greedy = generate(ending, prompts, Sampling(temperature=0, max_new_tokens=8))
    assert tokens(sampled) == tokens(greedy)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_sampler_s_logprobs_are_those_of_the_training_pass(make_policy, prompts, dtype, tolerance, temperature):
    policy = make_policy(dtype)
    favor(policy, policy.eos_token_id, 0.1)
    sampling = Sampling(max_new_tokens=16, temperature=temperature, top_p=0.9, top_k=50)
    groups = generate(policy, prompts, sampling, group_size=3)
    scored = policy.logprobs(policy.encode(prompts), tokens(groups), temperature=temperature)
    for row, completion in enumerate(completion for group in groups for completion in group):
        trained = scored.logprobs[row, : len(completion.token_ids)].tolist()
        assert completion.sampling_logprobs == pytest.approx(trained, abs=tolerance)


def test_completions_say_how_they_ended(ending, prompts):
    completions = [c for group in generate(ending, prompts, SAMPLING, group_size=4) for c in group]
    eos = ending.eos_token_id
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        assert len(completion.token_ids) == len(completion.sampling_logprobs)
        assert eos not in completion.token_ids[:-1]
        assert (completion.token_ids[-1] == eos) == (completion.finish_reason == "stop")
        assert completion.truncated == (completion.finish_reason == "length")
        assert not completion.truncated or len(completion.token_ids) == 16
        assert "<|im_end|>" not in completion.text
        assert completion.text == ending.decode(completion.token_ids)


def test_completions_carry_the_mode_of_their_prompt(ending, make_examples, tmp_path):
    example = make_examples(tmp_path, 1)[0]
    for mode in ("think", "no_think", "think_after"):
        ((completion,),) = generate(ending, [make_prompt(example, mode)], Sampling(max_new_tokens=1))
        assert completion.mode == mode


def test_a_policy_that_ends_at_once_costs_one_pass(make_policy, prompts, monkeypatch):
    policy = make_policy()
    favor(policy, policy.eos_token_id, 1 - 1e-12)
    spy = Spy(policy, monkeypatch)
    groups = generate(policy, prompts, SAMPLING, group_size=2)
    assert [rows for rows, _ in spy.rows] == [8]  # the prefill: each prompt once, not once per completion
    assert {c.token_ids for group in groups for c in group} == {(policy.eos_token_id,)}
    assert {c.finish_reason for group in groups for c in group} == {"stop"}
    assert {c.text for group in groups for c in group} == {""}


def test_finished_rows_leave_the_batch(ending, prompts, monkeypatch):
    spy = Spy(ending, monkeypatch)
    groups = generate(ending, prompts, SAMPLING, group_size=4)
    lengths = [len(c.token_ids) for group in groups for c in group]
    decode_steps = [rows for rows, length in spy.rows if length == 1]
    assert len(decode_steps) == max(lengths) - 1
    for t, rows in enumerate(decode_steps, start=1):
        writing = sum(length > t for length in lengths)
        assert writing <= rows <= max(writing / 0.75, 1) + 1
    assert sum(decode_steps) < 0.75 * 32 * len(decode_steps)


def test_the_prompt_is_computed_once_whatever_the_group_size(ending, prompts, monkeypatch):
    spy = Spy(ending, monkeypatch)
    generate(ending, prompts[:2], Sampling(max_new_tokens=1), group_size=8)
    longest = max(len(encoded.token_ids) for encoded in ending.encode(prompts[:2]))
    assert spy.rows == [(2, longest)]


def test_nothing_is_written_for_no_prompts(ending):
    assert generate(ending, [], SAMPLING) == []


def test_no_gradient_is_kept(ending, prompts):
    generate(ending, prompts[:1], SAMPLING)
    assert all(parameter.grad is None for parameter in ending.model.parameters())


def test_any_stop_token_of_the_generation_config_ends_a_completion(make_policy, prompts):
    """Qwen2-VL's generation config names two tokens that end a turn; transformers stops at either."""
    policy = make_policy()
    other = policy.processor.tokenizer.pad_token_id
    policy.model.generation_config.eos_token_id = [policy.eos_token_id, other]
    favor(policy, other, 1 - 1e-12)
    for (completion,) in generate(policy, prompts, Sampling(max_new_tokens=6)):
        assert completion.token_ids == (other,)
        assert completion.finish_reason == "stop"
        assert completion.text == ""
