import copy
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from medrl.data.prompts import make_prompt
from medrl.errors import PolicyError
from medrl.policy.policy import Policy
from medrl.rollout import scheduler
from medrl.rollout.captured import CapturedDecoder
from medrl.rollout.decoder import Decoder
from medrl.rollout.engine import complete, generate
from medrl.rollout.prefill import prefill
from medrl.rollout.rows import Rows
from medrl.rollout.sampling import Sampling
from medrl.rollout.scheduler import Tally

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
    monkeypatch.setattr("medrl.rollout.scheduler.REGROUP_AT", threshold)
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
    tokens_in_prompts = sum(len(encoded.token_ids) for encoded in policy.encode(prompts))
    assert spy.rows == [(1, tokens_in_prompts)]  # the prefill: each prompt once, not once per completion
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
    lengths = [len(encoded.token_ids) for encoded in ending.encode(prompts[:2])]
    assert lengths[0] != lengths[1] and spy.rows == [(1, sum(lengths))]  # and none of them is padded


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


def same(found, expected) -> None:
    """Tokens exactly, log-probabilities up to the rounding of another order of sums."""
    assert tokens(found) == tokens(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.sampling_logprobs == pytest.approx(other.sampling_logprobs, rel=1e-6, abs=1e-9)
            assert one.finish_reason == other.finish_reason


@pytest.mark.parametrize("every", [3, 8, 100])
def test_looking_for_stops_less_often_changes_nothing(ending, prompts, monkeypatch, every):
    expected = generate(ending, prompts, SAMPLING, group_size=3)
    monkeypatch.setattr(scheduler, "CHECK_EVERY", {"cpu": every})
    same(generate(ending, prompts, SAMPLING, group_size=3), expected)


def fix_shapes(policy, monkeypatch) -> list[Rows]:
    """Do as on a GPU, but uncaptured: whole buffers under masks, rows moved between buckets and filled up.

    Gives the rows of every buffer that is opened, as they were then."""
    opened = []

    def record(policy, sampling, rows):
        opened.append(copy.deepcopy(rows))
        return Decoder(policy, sampling, rows, static=True)

    monkeypatch.setattr(policy, "decode_graphs", None)  # of this test alone
    monkeypatch.setattr(scheduler, "_open", record)
    monkeypatch.setattr(scheduler, "_static", lambda device: True)
    monkeypatch.setattr(scheduler, "CHECK_EVERY", {"cpu": 3})
    monkeypatch.setattr("medrl.rollout.captured.BUCKETS", (2, 8, 16, 24))
    monkeypatch.setattr("medrl.rollout.prefill.PROMPT_BLOCK", {"cpu": 128})
    return opened


@pytest.mark.parametrize("every", [1, 3])
def test_steps_of_fixed_shape_in_buckets_write_what_growing_ones_write(ending, prompts, monkeypatch, every):
    expected = generate(ending, prompts, SAMPLING, group_size=4)
    opened = fix_shapes(ending, monkeypatch)
    monkeypatch.setattr(scheduler, "CHECK_EVERY", {"cpu": every})
    same(generate(ending, prompts, SAMPLING, group_size=4), expected)
    sizes = [len(rows.t) for rows in opened]
    assert sizes == sorted(set(sizes), reverse=True) and set(sizes) <= {2, 8, 16, 24, 32}
    assert len(sizes) > 2 and any(rows.ended.any() for rows in opened)  # some rows fill a bucket up
    assert every > 1 or 24 in sizes  # three quarters of 32: whoever looks at every token finds as many


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("at_once", "group_size"), [(1, 1), (3, 1), (2, 4), (8, 2)])
def test_prompts_that_take_the_places_of_finished_ones_are_completed_alike(
    ending, prompts, monkeypatch, static, at_once, group_size
):
    expected = [generate(ending, [prompt], SAMPLING, group_size=group_size, seed=4)[0] for prompt in prompts]
    opened = fix_shapes(ending, monkeypatch) if static else []
    spy = Spy(ending, monkeypatch)
    batches = list(complete(ending, prompts, SAMPLING, at_once=at_once, group_size=group_size, seed=4))
    found = {one.number: one.completions for batch in batches for one in batch}
    assert sum(map(len, batches)) == len(found) == len(prompts)  # each once
    same([found[number] for number in range(len(prompts))], expected)
    assert max(rows for rows, length in spy.rows if length == 1) <= at_once * group_size
    assert len({rows.prompts.keys.shape[1:4] for rows in opened}) <= 1  # one shape of prompts for one captured graph


def test_a_long_completion_does_not_hold_those_that_wait(ending, prompts):
    """Rows that share a clock take, batch by batch, the steps of the longest; others are begun meanwhile here."""
    at_once, tally = 2, Tally()
    sampling = Sampling(max_new_tokens=24)
    order = [one.number for batch in complete(ending, prompts, sampling, at_once=at_once, tally=tally) for one in batch]
    lengths = [len(completion.token_ids) for (completion,) in generate(ending, prompts, sampling)]
    together = sum(max(lengths[n : n + at_once]) - 1 for n in range(0, len(prompts), at_once))
    least = max(max(lengths) - 1, (sum(lengths) - len(lengths)) / at_once)
    assert least <= tally.decode_steps < together
    assert tally.decode_rows <= at_once * tally.decode_steps
    assert order != sorted(order)  # who is done is handed over, not held


def test_each_prompt_is_computed_once_and_asked_for_when_there_is_a_place(ending, prompts, monkeypatch):
    encoded, asked = ending.encode(prompts), []

    def encode(numbers):
        asked.append(list(numbers))
        return [encoded[number] for number in numbers]

    spy = Spy(ending, monkeypatch)
    answers = complete(ending, prompts, SAMPLING, at_once=3, encode=encode)
    next(answers)
    assert asked[0] == [0, 1, 2] and len(asked) <= 2
    list(answers)
    assert [number for numbers in asked for number in numbers] == list(range(8))
    prefilled = [length for rows, length in spy.rows if length > 1]
    assert sum(prefilled) == sum(len(prompt.token_ids) for prompt in encoded)


@pytest.mark.parametrize("failing", ["prefill", "decode"])
def test_where_memory_runs_out_fewer_are_completed_at_a_time_and_alike(ending, prompts, monkeypatch, caplog, failing):
    expected = generate(ending, prompts, SAMPLING, group_size=2)
    inner = ending.family.hidden

    def hidden(embedded, *rest):
        rows, length = embedded.shape[:2]
        if (rows > 4) if failing == "decode" else (length > 200):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(embedded, *rest)

    longest = max(len(prompt.token_ids) for prompt in ending.encode(prompts))
    assert longest <= 100
    monkeypatch.setattr(ending.family, "hidden", hidden)
    monkeypatch.setattr(ending, "tokens_at_once", None)  # of this test alone
    with caplog.at_level(logging.WARNING, "medrl"):
        same(generate(ending, prompts, SAMPLING, group_size=2), expected)
        assert [record.args[0] for record in caplog.records] == [4, 2]
        same(generate(ending, prompts, SAMPLING, group_size=2), expected)  # the next step has learned from it
        if failing == "decode":
            generate(ending, prompts, SAMPLING, group_size=1)  # 4 at a time
    assert len(caplog.records) == 2 and ending.tokens_at_once == 2 * 2 * SAMPLING.max_new_tokens
    monkeypatch.setattr(ending.family, "hidden", lambda *_: hidden(torch.empty(99, 999)))
    with pytest.raises(PolicyError, match="example-0 alone"):
        generate(ending, prompts, SAMPLING, group_size=2)


def test_greedy_tokens_are_those_of_transformers(make_policy, make_model, prompts):
    policy = make_policy()
    encoded = policy.encode(prompts)
    found = generate(policy, prompts, Sampling(temperature=0, max_new_tokens=12))
    plain = make_model()
    settings = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=policy.eos_token_id, pad_token_id=0)
    for prompt, (completion,) in zip(encoded, found, strict=True):
        ids = prompt.token_ids[None]
        out = plain.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, pixel_values=prompt.pixels,
            image_grid_thw=prompt.grids, mm_token_type_ids=(ids == policy.family.image_token_id).int(),
        )  # fmt: skip
        assert out[0, ids.shape[1] :].tolist() == list(completion.token_ids)


def test_keys_of_a_prompt_are_kept_once_whatever_the_group_size(policy, prompts):
    encoded = policy.encode(prompts[:2])
    _, kept = prefill(policy, encoded)
    lengths = [len(prompt.token_ids) for prompt in encoded]
    assert kept.keys.shape[1] == 2 and kept.keys.shape[3] == max(lengths)
    assert (~kept.padding).sum((1, 2, 3)).tolist() == lengths


@pytest.fixture
def captured(monkeypatch) -> list[Rows]:
    """The buffers of each step that is captured. All of it but the capture: here a replay is the step itself, on the
    buffers that a capture would have held."""
    buffers = []

    def capture(decoder):
        buffers.append(decoder.rows)
        decoder.rows.t.fill_(1)
        for _ in range(2):  # as before a capture
            decoder.decoder.step()
        return SimpleNamespace(replay=decoder.decoder.step)

    monkeypatch.setattr(scheduler, "_static", lambda device: True)
    monkeypatch.setattr(scheduler, "CHECK_EVERY", {"cpu": 3})
    monkeypatch.setattr("medrl.rollout.captured.BUCKETS", (4, 8, 12))
    monkeypatch.setattr("medrl.rollout.prefill.PROMPT_BLOCK", {"cpu": 8})
    monkeypatch.setattr(CapturedDecoder, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    return buffers


def sizes(captured: list[Rows]) -> list[int]:
    return [len(rows.t) for rows in captured]


@pytest.fixture(scope="module")
def by_length(ending, prompts):
    return sorted(prompts, key=lambda prompt: len(ending.encode([prompt])[0].token_ids))


@pytest.fixture
def expected(ending, monkeypatch):
    """What is completed without any buffers."""

    def complete_plainly(some):
        with monkeypatch.context() as patch:
            patch.setattr(scheduler, "_static", lambda device: False)
            return generate(ending, some, SAMPLING, group_size=4)

    monkeypatch.setattr(ending, "decode_graphs", None)
    return complete_plainly


def test_what_was_captured_serves_later_batches_with_other_prompts(ending, by_length, expected, captured):
    first, later = by_length[4:], by_length[:4]
    assert len(ending.encode(first[-1:])[0].token_ids) > len(ending.encode(later[-1:])[0].token_ids)
    same(generate(ending, first, SAMPLING, group_size=4), expected(first))
    before = sizes(captured)
    assert before[0] == 16 and len(before) == len(set(before)) > 1  # one for every number of rows
    same(generate(ending, later, SAMPLING, group_size=4), expected(later))
    assert set(sizes(captured)[len(before) :]) <= {4, 8, 12} - set(before)  # no buffer is captured again
    same(generate(ending, first, SAMPLING, group_size=4), expected(first))
    assert len(captured) == len(set(sizes(captured)))


def test_what_was_captured_serves_fewer_prompts(ending, by_length, expected, captured):
    """A step that replaces what teaches nothing completes a few more prompts after the first ones, again and again."""
    for count in (8, 3, 8, 5, 1):
        some = by_length[-count:]
        same(generate(ending, some, SAMPLING, group_size=4), expected(some))
        assert len(captured) == len(set(sizes(captured))) and len(captured[0].t) == 32


def test_all_that_is_captured_shares_the_buffers_of_the_largest_batch(ending, by_length, expected, captured):
    generate(ending, by_length, SAMPLING, group_size=4)
    largest = max(captured, key=lambda rows: len(rows.t))
    assert len(captured) > 2 and len(largest.t) == 32
    for rows in captured:
        for name in ("keys", "values", "uniform", "written", "table"):
            ours, theirs = getattr(rows, name), getattr(largest, name)
            assert ours.data_ptr() == theirs.data_ptr() and ours.untyped_storage().nbytes() == theirs.nbytes
        assert rows.prompts is largest.prompts
        assert all(layer.is_contiguous() for layer in rows.keys)  # as the kernels want


def test_what_was_captured_is_given_up_where_it_does_not_serve(ending, by_length, expected, captured):
    generate(ending, by_length[:2], SAMPLING, group_size=4)
    more = by_length[:3]
    same(generate(ending, more, SAMPLING, group_size=4), expected(more))
    assert sizes(captured)[0] == 8 and 12 in sizes(captured)
    graphs, before = ending.decode_graphs, len(captured)
    for sampling, group_size in ((Sampling(max_new_tokens=9), 4), (SAMPLING, 2)):
        found = tokens(generate(ending, more, sampling, group_size=group_size))
        limit = sampling.max_new_tokens
        assert found == [[ids[:limit] for ids in group[:group_size]] for group in tokens(expected(more))]
        assert len(captured) > before
        before = len(captured)
    assert ending.decode_graphs is graphs


@pytest.mark.parametrize("meanwhile", ["other completions", "memory is given back"])
def test_what_happens_to_a_policy_between_two_answers_changes_none(ending, by_length, expected, captured, meanwhile):
    found = {}
    for finished in complete(ending, by_length, SAMPLING, at_once=3, group_size=4):
        found |= {one.number: one.completions for one in finished}
        if meanwhile == "memory is given back":
            ending.decode_graphs = None
        else:
            generate(ending, by_length[:1], SAMPLING, group_size=4)
            generate(ending, by_length[-2:], Sampling(max_new_tokens=5), group_size=4)
    same([found[number] for number in range(len(by_length))], expected(by_length))


@pytest.mark.gpu
def test_captured_steps_write_what_plain_ones_write(make_policy, prompts, monkeypatch):
    policy = make_policy(torch.float32)
    policy.model.to("cuda")
    policy = Policy(policy.model, policy.processor)
    captured = generate(policy, prompts, SAMPLING, group_size=4)
    again = generate(policy, prompts, SAMPLING, group_size=4)  # on graphs that are there already
    monkeypatch.setattr(scheduler, "_open", lambda policy, sampling, rows: Decoder(policy, sampling, rows))
    plain = generate(policy, prompts, SAMPLING, group_size=4)
    assert tokens(captured) == tokens(again) == tokens(plain)
