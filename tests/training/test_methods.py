"""How a step gets its groups and advantages: sampling again, shaping rewards, balancing, moving the reference,
imitating."""

import warnings
from dataclasses import replace

import pytest
import torch

from medrl.data.prompts import demonstration, make_prompt
from medrl.errors import DataError, SettingsError
from medrl.grpo import GRPO, domain_scales
from medrl.policy.lora import Lora
from medrl.policy.naive import naive_logprobs
from medrl.rewards import well_formed
from medrl.rollout.sampling import Sampling
from medrl.sft import RFT, SFT
from medrl.training.curriculum import Curriculum, arrange
from medrl.training.group_relative import GroupRelative, charge_kl, mix_into, shape_overlong
from medrl.training.methods import check_demonstrations, demonstrate, keep_best, make_method
from medrl.training.metrics import rollout_rows, step_metrics
from medrl.training.optim import AdamW, Optim
from medrl.training.released import SYSTEM, ReleasedTurns
from medrl.training.setup import Setup
from medrl.training.totals import Update
from medrl.training.update import update_policy
from medrl.types import Completion, Example, Group, Groups, Prompt, Rollout, Score

SAMPLING = Sampling(max_new_tokens=4)
UPDATE = Update(
    loss=0.0, policy_loss=0.0, kl=0.0, clip_fraction=0.0, entropy=0.0, grad_norm=0.0, lr=0.0, sampling_gap=None,
    skipped_groups=0, tokens=0,
)  # fmt: skip


def ask(example):
    return make_prompt(example, "no_think", "plain-no-think")


def group(name: str, rewards: list[float], *, lengths=None, answers=None, modality="CT") -> Group:
    example = Example(id=name, source="s", images=(), question="?", options=("a", "b"), target="A", modality=modality)
    lengths, answers = lengths or [2] * len(rewards), answers or ["A" if reward else "B" for reward in rewards]
    rollouts = tuple(
        Rollout(
            completion=Completion(
                text="x", token_ids=tuple(range(n)), finish_reason="stop", sampling_logprobs=(-1.0,) * n
            ),
            score=Score(value=reward, parts={"right": reward}, answer=answer),
        )
        for reward, n, answer in zip(rewards, lengths, answers, strict=True)
    )
    return Group(example=example, prompt=Prompt(id=name, text="?", images=(), mode="think"), rollouts=rollouts)


def reinforcement(policy=None, **settings) -> GroupRelative:
    objective = GRPO(group_size=2, **{"kl_coef": 0, **settings})
    setup = Setup(policy=policy, ask=ask, reward=None, sampling=SAMPLING, seed=0, prompts_per_step=2)  # type: ignore[arg-type]
    return GroupRelative(objective, setup)


# ---------------------------------------------------------------- dynamic sampling


def drawn_from(monkeypatch, rounds: list[list[Group]]):
    """The groups that each call of ``collect`` finds, and a log of how many were asked for."""
    asked = []
    supply = iter(rounds)

    def collect(policy, examples, *rest, **named):
        asked.append(len(examples))
        return Groups(tuple(next(supply)))

    monkeypatch.setattr("medrl.training.group_relative.collect", collect)
    return asked


def draw(count):
    return [None] * count


IDLE, LIVE = [1.2, 1.2], [0.0, 1.0]


def test_groups_that_teach_nothing_are_drawn_again_until_the_step_is_full(monkeypatch):
    rounds = [[group("a", IDLE), group("b", LIVE)], [group("c", IDLE)], [group("d", LIVE)]]
    asked = drawn_from(monkeypatch, rounds)
    groups = reinforcement(dynamic_sampling=5).collect(draw, 0)
    assert asked == [2, 1, 1]
    assert [g.example.id for g in groups] == ["b", "d"] and [g.example.id for g in groups.dropped] == ["a", "c"]


def test_the_rounds_end_and_the_step_goes_on_with_what_there_is(monkeypatch):
    asked = drawn_from(monkeypatch, [[group("a", IDLE), group("b", LIVE)], [group("c", IDLE)]])
    groups = reinforcement(dynamic_sampling=2).collect(draw, 0)
    assert asked == [2, 1] and [g.example.id for g in groups] == ["b"]
    drawn_from(monkeypatch, [[group("a", IDLE), group("b", IDLE)], [group("c", IDLE), group("d", IDLE)]])
    nothing = reinforcement(dynamic_sampling=2)
    groups = nothing.collect(draw, 0)
    assert len(groups) == 1 and len(groups.dropped) == 3
    assert nothing.advantages(groups).tolist() == [[0.0, 0.0]]


def test_without_it_every_group_is_kept(monkeypatch):
    drawn_from(monkeypatch, [[group("a", IDLE), group("b", LIVE)]])
    groups = reinforcement().collect(draw, 0)
    assert len(groups) == 2 and groups.dropped == ()


# ---------------------------------------------------------------- shaped rewards


def test_the_overlong_penalty_is_a_part_of_the_reward_that_can_be_read():
    groups = shape_overlong(Groups((group("a", LIVE, lengths=[8, 10]),)), max_new_tokens=10, share=0.4)
    assert groups.rewards == [[-0.5, 0.0]]  # 8 of 10 tokens is half-way into the last four
    assert [r.score.parts["overlong"] for r in groups.rollouts] == [-0.5, -1.0]
    row = step_metrics(groups, UPDATE)
    assert (row["reward"], row["rewards/overlong/mean"]) == (0.5, -0.75)  # the answers are as right as they were


def test_the_kl_in_the_reward_is_the_sampler_s_log_probability_less_the_reference_s(make_policy, examples):
    policy = make_policy()
    policy.freeze_reference()
    ids = [(20, 21, 2), (30, 2)]
    sampled = [(-1.0, -2.0, -0.5), (-3.0, -0.25)]
    rollouts = tuple(
        Rollout(
            completion=Completion(text="x", token_ids=t, finish_reason="stop", sampling_logprobs=s),
            score=Score(value=1.0, parts={"right": 1.0}),
        )
        for t, s in zip(ids, sampled, strict=True)
    )
    prompt = ask(examples[0])
    groups = Groups((Group(example=examples[0], prompt=prompt, rollouts=rollouts),))
    charged = charge_kl(groups, policy, 0.1, 0.7)
    reference = naive_logprobs(policy.reference, policy.encode([prompt]), [ids], temperature=0.7)
    for rollout, s, row in zip(charged.rollouts, sampled, reference, strict=True):
        kl = sum(s) - float(row.sum())
        assert rollout.score.parts["kl"] == pytest.approx(kl, rel=1e-6)
        assert rollout.reward == pytest.approx(1.0 - 0.1 * kl, rel=1e-6)
    row = step_metrics(charged, UPDATE)
    assert (row["reward"], row["reward_std"], row["frac_reward_zero_std"]) == (1.0, 0.0, 1.0)  # both are as right
    assert len({row["reward"] for row in rollout_rows(0, charged, [[0.0, 0.0]])}) == 2


def test_a_kl_in_the_reward_needs_what_the_sampler_saw():
    bare = group("a", LIVE)
    bare = replace(
        bare, rollouts=tuple(replace(r, completion=replace(r.completion, sampling_logprobs=())) for r in bare.rollouts)
    )
    with pytest.raises(SettingsError, match="sampler's log-probabilities"):
        charge_kl(Groups((bare,)), None, 0.1, 1.0)  # type: ignore[arg-type]


# ---------------------------------------------------------------- domains


def test_rare_and_hard_domains_are_louder_and_the_count_is_kept_and_restored(monkeypatch):
    ct, mri = group("a", LIVE, modality="CT"), group("b", LIVE, modality="MRI")
    drawn_from(monkeypatch, [[ct, ct], [ct, mri]])
    method = reinforcement(balance="modality")
    method.collect(draw, 0)
    groups = method.collect(draw, 1)
    assert method.domains == {"CT": [3, 1.5], "MRI": [1, 0.5]}
    advantages = method.advantages(groups)
    scales = domain_scales([3, 1], [0.5, 0.5])
    assert (advantages[1] / advantages[0]).tolist() == pytest.approx([float(scales[0] / scales[1])] * 2)
    tensors, state = method.state()
    resumed = reinforcement(balance="modality")
    resumed.restore(tensors, state)
    assert torch.equal(resumed.advantages(groups), advantages)


# ---------------------------------------------------------------- a reference that moves


def test_the_reference_moves_part_of_the_way_every_so_many_steps(make_policy):
    policy = make_policy()
    policy.freeze_reference()
    method = reinforcement(policy, kl_coef=0.1, sync_reference_every=2, sync_reference_mix=0.25)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in policy.reference.model.parameters()]
    method.finish(0)
    assert all(torch.equal(a, b) for a, b in zip(policy.reference.model.parameters(), before, strict=True))
    method.finish(1)
    for now, then in zip(policy.reference.model.parameters(), before, strict=True):
        torch.testing.assert_close(now, then + 0.25, rtol=1e-12, atol=1e-12)
    mix_into(policy.reference, policy, 1.0)
    pairs = zip(policy.reference.model.parameters(), policy.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# ---------------------------------------------------------------- supervised


def test_the_answer_in_each_mode_with_and_without_its_rationale(policy, examples):
    example = replace(examples[1], rationale="Dark fluid. ")
    texts = {}
    for mode in ("think", "no_think", "think_after"):
        for rationale in ("none", "column"):
            groups = demonstrate(policy, [example], lambda e, m=mode: make_prompt(e, m), SFT(rationale=rationale))
            completion = groups.rollouts[0].completion
            texts[mode, rationale] = completion.text
            assert policy.decode(completion.token_ids) == completion.text
            assert completion.token_ids[-1] == policy.eos_token_id and completion.mode == mode
    letter = example.target
    assert texts == {
        ("think", "none"): f"<think></think><answer>{letter}</answer>",
        ("think", "column"): f"<think>Dark fluid.</think><answer>{letter}</answer>",
        ("no_think", "none"): f"<answer>{letter}</answer>",
        ("no_think", "column"): f"<answer>{letter}</answer>",
        ("think_after", "none"): f"<answer>{letter}</answer><think></think>",
        ("think_after", "column"): f"<answer>{letter}</answer><think>Dark fluid.</think>",
    }


def test_a_rationale_that_is_asked_for_and_missing_is_named(examples):
    some = [replace(examples[0], rationale="why"), examples[1], replace(examples[2], rationale="  ")]
    with pytest.raises(DataError, match=r"2 of 3 examples have no rationale \(example-1, example-2\)"):
        check_demonstrations(some, "think", SFT(rationale="column"))
    check_demonstrations(some, "no_think", SFT(rationale="column"))  # no reasoning is written there


@pytest.mark.parametrize("mode", ["think", "think_after"])
def test_imitating_an_empty_reasoning_block_is_warned_about_because_it_is_not_well_formed(examples, mode):
    with pytest.warns(UserWarning, match=f"mode is {mode}, .*set training.mode to no_think, or sft.rationale to col"):
        check_demonstrations(examples, mode, SFT())
    completion = Completion(text=demonstration(examples[0], mode, rationale=False), token_ids=(), finish_reason="stop")
    assert well_formed(examples[0], replace(completion, mode=mode)) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_demonstrations([replace(row, rationale="why") for row in examples], mode, SFT(rationale="column"))
        check_demonstrations(examples, "no_think", SFT())
        check_demonstrations(examples, mode, GRPO())


def test_emulation_goes_with_no_other_wish(examples):
    with pytest.raises(SettingsError, match="set it to no_think"):
        check_demonstrations(examples, "think", SFT(emulate="med-r1-released"))
    with pytest.raises(SettingsError, match="choose one"):
        check_demonstrations(examples, "no_think", SFT(emulate="med-r1-released", rationale="column"))


def test_the_released_script_trains_on_none_on_the_prompt_and_on_a_turn_that_never_ends(make_policy, examples):
    policy = make_policy()
    turns = ReleasedTurns(policy)
    groups = demonstrate(turns, examples[:1], ask, SFT(emulate="med-r1-released"))
    batch = turns.pack(groups)
    tokenizer = policy.processor.tokenizer
    before, after = (tokenizer.decode(part.completions[0]) for part in batch)
    target = examples[0].target
    assert before == f"system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nWhich modality was used? A)CT, B)MRI"
    assert after == (
        f"<|im_end|>\n<|im_start|>assistant\nNone\n\n<answer> {target} </answer><|im_end|>\n<|im_start|>assistant\n"
    )

    # The loss is the mean over every text token of the whole turn, as one plain pass over the sequence gives it.
    whole, answer = turns._turn(groups.items[0]), torch.tensor(groups.rollouts[0].completion.token_ids)
    first = replace(
        whole, token_ids=whole.token_ids[:1], positions=whole.positions[:, :1], pixels=None, grids=whole.grids[:0]
    )
    start, end = turns._image_span(whole.token_ids)
    through_image = replace(whole, token_ids=whole.token_ids[:end], positions=whole.positions[:, :end])
    labels = [whole.token_ids[1:start], torch.cat([whole.token_ids[end:], answer])]
    plain = [
        naive_logprobs(policy, [prompt], [[ids.tolist()]])[0]
        for prompt, ids in zip([first, through_image], labels, strict=True)
    ]
    expected = -torch.cat(plain).mean().item()
    optimizer = AdamW(policy.model.named_parameters(), Optim(lr=1e-3))
    update = update_policy(turns, batch, optimizer, SFT(emulate="med-r1-released"), lr=1e-3)
    assert update.loss == pytest.approx(expected, rel=1e-6)


def test_the_released_script_takes_one_image_per_question(policy, examples):
    none = replace(examples[0], images=())
    turns = ReleasedTurns(policy)
    with pytest.raises(DataError, match="has 0 images"):
        turns.pack(demonstrate(turns, [none], ask, SFT(emulate="med-r1-released")))


# ---------------------------------------------------------------- rejection sampling


@pytest.mark.parametrize(
    ("rewards", "answers", "lengths", "best", "kept"),
    [
        ([2.0, 1.0, 2.0], ["A", "A", "A"], [5, 2, 3], [0, 0, 1], [1, 1, 1]),  # the shorter of the two best
        ([2.0, 1.0, 0.0], ["B", "A", None], [5, 2, 3], [0, 1, 0], [0, 1, 0]),  # a high reward does not make it right
        ([0.0, 1.0, 0.0], ["B", "B", None], [5, 2, 3], [0, 0, 0], [0, 0, 0]),
    ],
)
def test_what_is_kept_of_a_group(rewards, answers, lengths, best, kept):
    one = group("a", rewards, answers=answers, lengths=lengths)
    assert keep_best(one, "best") == best
    assert keep_best(one, "all") == kept


def test_only_what_is_kept_is_trained_on(policy):
    method = make_method(policy, RFT(group_size=2), ask, None, SAMPLING, 0, 2)  # type: ignore[arg-type]
    groups = Groups((group("a", [0.0, 1.0]), group("b", [0.0, 0.0])))
    advantages = method.advantages(groups)
    assert advantages.tolist() == [[0.0, 1.0], [0.0, 0.0]]
    (packed,) = method.pack(groups, advantages)
    assert packed.prompt.id == "a" and packed.completions == (groups.items[0].rollouts[1].completion.token_ids,)


def test_a_step_without_a_right_answer_changes_no_weight(make_policy):
    policy = make_policy()
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    update = update_policy(policy, (), AdamW(policy.model.named_parameters(), Optim(lr=1.0)), RFT(), lr=1.0)
    assert (update.loss, update.tokens, update.skipped_groups) == (0.0, 0, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())


@pytest.mark.parametrize("objective", [GRPO(kl_coef=0), RFT()])
def test_greedy_sampling_is_refused_where_completions_are_compared(policy, objective):
    with pytest.raises(SettingsError, match="temperature is 0"):
        make_method(policy, objective, ask, None, Sampling(temperature=0), 0, 2)  # type: ignore[arg-type]


def test_float16_is_refused_for_training_whatever_the_method(make_policy):
    half = make_policy(torch.float16)
    for objective in (GRPO(kl_coef=0), RFT(), SFT()):
        with pytest.raises(SettingsError, match=r"float16 cannot be trained in: .* set it to bfloat16"):
            make_method(half, objective, ask, None, SAMPLING, 0, 2)  # type: ignore[arg-type]


# ---------------------------------------------------------------- curriculum


RATES = {"example-0": 0.0, "example-1": 0.5, "example-2": 1.0, "example-3": 0.25}


def test_filter_keeps_what_is_sometimes_right_and_order_asks_the_easy_first(examples):
    four = examples[:4]
    kept, ranks = arrange(four, RATES, Curriculum(use="filter"))
    assert [e.id for e in kept] == ["example-1", "example-3"] and ranks is None
    kept, ranks = arrange(four, RATES, Curriculum(use="order"))
    assert kept == four and ranks == [1.0, 0.5, 0.0, 0.75]
    kept, ranks = arrange(four, RATES, Curriculum(use="both", lowest=0.2, highest=1.0))
    assert [e.id for e in kept] == ["example-1", "example-2", "example-3"] and ranks == [0.5, 0.0, 0.75]


def test_bounds_that_leave_nothing_say_what_there_is(examples):
    with pytest.raises(DataError, match="of 4, 1 are never right and 1 always"):
        arrange(examples[:4], RATES, Curriculum(use="filter", lowest=0.6, highest=0.9))
    with pytest.raises(SettingsError, match="swap them"):
        Curriculum(lowest=0.9, highest=0.1)


def test_a_reference_that_is_the_model_without_its_adapters_cannot_move(make_policy):
    policy = make_policy()
    policy.add_lora(Lora(rank=2))
    with pytest.raises(SettingsError, match=r"policy\.lora .*set sync_reference_every to 0"):
        make_method(policy, GRPO(kl_coef=0.1, sync_reference_every=2), ask, None, Sampling(), 0, 2)  # type: ignore[arg-type]
