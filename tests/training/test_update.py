import copy
import math
from dataclasses import replace

import pytest
import torch

from medrl.data.prompts import make_prompt
from medrl.errors import NonFiniteError, PolicyError
from medrl.grpo import GRPO
from medrl.policy.naive import naive_logprobs
from medrl.policy.policy import Policy
from medrl.rollout.collect import collect
from medrl.rollout.sampling import Sampling
from medrl.sft import SFT
from medrl.training.batches import TrainingGroup, cut, pack_groups
from medrl.training.budget import Budget, Pass, tokens_per_patch
from medrl.training.optim import AdamW, Optim
from medrl.training.update import update_policy
from medrl.types import Score

OPTIM = Optim(lr=0.01)
ADVANTAGES = ((1.2, -0.4, -0.8), (-1.0, 0.5, 0.5), (0.0, 0.0, 0.0), (0.3, 0.9, -1.2))
COMPLETIONS = (
    ((20, 21, 22), (30, 2), (40, 41, 42, 43, 2)),
    ((50, 2), (51, 52, 53, 2), (54, 55, 2)),
    ((60, 61, 2), (62, 2), (63, 2)),
    ((70,), (71, 72, 73, 74, 75, 76), (77, 78, 2)),
)
OBJECTIVES = {
    "GRPO without KL": GRPO(group_size=3, kl_coef=0),
    "GRPO with KL": GRPO(group_size=3, kl_coef=0.1),
    "GRPO by token": GRPO(group_size=3, kl_coef=0.1, reduction="token"),
    "SFT by token": SFT(),
    "SFT by answer": SFT(reduction="sequence"),
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())


class Recorder(AdamW):
    """An optimizer that remembers what it was given before each step."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.model.named_parameters(), OPTIM)
        self.policy = policy
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.starts: list[dict[str, torch.Tensor]] = []

    def step(self, lr: float) -> float:
        self.starts.append(weights_of(self.policy))
        self.gradients.append(gradients_of(self.policy))
        return super().step(lr)


def gradients_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in policy.model.named_parameters()
    }


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, relative to the second."""
    assert ours.keys() == theirs.keys()
    off = math.sqrt(sum(float((ours[name] - theirs[name]).norm()) ** 2 for name in theirs))
    return off / math.sqrt(sum(float(theirs[name].norm()) ** 2 for name in theirs))


@pytest.fixture
def moved(make_policy) -> Policy:
    """A policy that has left its reference."""
    policy = make_policy()
    policy.freeze_reference()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return policy


@pytest.fixture(scope="module")
def batch(make_examples, tmp_path_factory):
    examples = make_examples(tmp_path_factory.mktemp("images"), 4)
    return tuple(
        TrainingGroup(
            prompt=make_prompt(example, template="plain"),
            completions=completions,
            advantages=advantages,
            sampling_logprobs=(),
        )
        for example, completions, advantages in zip(examples, COMPLETIONS, ADVANTAGES, strict=True)
    )


def paper_loss(policy: Policy, batch, objective, temperature=1.0, old=None) -> torch.Tensor:
    """papers' trainer, written out: -(ratio * A - beta * KL), mean over tokens, mean over sequences (or over all)."""
    prompts = policy.encode([group.prompt for group in batch])
    completions = [group.completions for group in batch]
    logprobs = naive_logprobs(policy, prompts, completions, temperature=temperature)
    with torch.no_grad():
        reference = naive_logprobs(policy.reference, prompts, completions, temperature=temperature)
    advantages = [advantage for group in batch for advantage in group.advantages]
    sequences, n_tokens = [], 0
    for i, logprob in enumerate(logprobs):
        before = logprob.detach() if old is None else old[i]
        ratio = (logprob - before).exp()
        surrogate = torch.minimum(ratio * advantages[i], ratio.clamp(0.8, 1.2) * advantages[i])
        kl = (reference[i] - logprob).exp() - (reference[i] - logprob) - 1
        sequences.append(-(surrogate - objective.kl_coef * kl))
        n_tokens += len(logprob)
    if objective.reduction == "token":
        return torch.cat(sequences).sum() / n_tokens
    return torch.stack([sequence.mean() for sequence in sequences]).mean()


def gradients_of_loss(policy: Policy, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    policy.model.zero_grad()
    loss.backward()
    gradients = gradients_of(policy)
    policy.model.zero_grad()
    return gradients


# ---------------------------------------------------------------- the gradient


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["GRPO without KL", "GRPO with KL", "GRPO by token"])
def test_the_gradient_is_that_of_the_paper_s_loss_written_out(moved, batch, name, temperature):
    objective = OBJECTIVES[name]
    loss = paper_loss(moved, batch, objective, temperature)
    expected = gradients_of_loss(moved, loss)
    optimizer = Recorder(moved)
    update = update_policy(moved, batch, optimizer, objective, lr=0.01, temperature=temperature)
    assert distance(optimizer.gradients[0], expected) < 1e-6
    assert update.loss == pytest.approx(loss.item(), rel=1e-6)
    norm = math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in expected.values()))
    assert update.grad_norm == pytest.approx(norm, rel=1e-6)


def test_the_gradient_of_sft_is_that_of_cross_entropy(moved, batch):
    prompts = moved.encode([group.prompt for group in batch])
    logprobs = naive_logprobs(moved, prompts, [group.completions for group in batch])
    loss = -torch.cat(logprobs).mean()
    expected = gradients_of_loss(moved, loss)
    optimizer = Recorder(moved)
    update = update_policy(moved, batch, optimizer, SFT(), lr=0.01)
    assert distance(optimizer.gradients[0], expected) < 1e-6
    assert (update.loss, update.policy_loss) == (pytest.approx(loss.item(), rel=1e-6),) * 2
    assert (update.kl, update.clip_fraction, update.sampling_gap) == (0.0, 0.0, None)


@every_objective
def test_any_cut_into_micro_batches_gives_the_same_gradient(moved, batch, objective):
    start = weights_of(moved)
    found, updates = [], []
    for tokens in (1, 450, 1_000_000):
        moved.model.load_state_dict(start)
        optimizer = Recorder(moved)
        updates.append(update_policy(moved, batch, optimizer, objective, lr=0.01, tokens_per_micro_batch=tokens))
        found.append(optimizer.gradients[0])
    assert max(distance(gradients, found[0]) for gradients in found) < 1e-12
    for update in updates:
        for name in ("loss", "policy_loss", "kl", "entropy", "grad_norm"):
            assert getattr(update, name) == pytest.approx(getattr(updates[0], name), rel=1e-9, abs=1e-15)


def test_micro_batches_keep_groups_whole_and_within_the_budget(moved, batch):
    objective = GRPO(group_size=3)
    budget = Budget(moved, 1)
    sizes = [budget.cost(micro.tokens, micro.patches) for micro in cut(moved, batch, objective, budget)]
    assert len(sizes) == 4
    pairs = cut(moved, batch, objective, Budget(moved, math.ceil(sizes[0] + sizes[1])))
    assert len(pairs[0].groups) == 2
    assert all(micro.tokens <= sizes[0] + sizes[1] for micro in pairs)
    (whole,) = cut(moved, batch, objective, Budget(moved, math.ceil(sum(sizes))))
    assert budget.cost(whole.tokens, whole.patches) == pytest.approx(sum(sizes))
    assert whole.tokens == len(moved.layout(whole.encoded, whole.completions).group)
    # A group's weights do not depend on who travels with it: each of 12 completions counts a twelfth.
    lengths = torch.tensor([len(ids) for group in COMPLETIONS for ids in group])
    torch.testing.assert_close(whole.weights[:, 0] * lengths, torch.full((12,), 1 / 12, dtype=torch.float64))


# ---------------------------------------------------------------- groups that teach nothing


def test_groups_without_advantages_are_skipped_and_nothing_else_changes(moved, batch, monkeypatch):
    start, seen = weights_of(moved), []
    inner = moved.logprobs

    def logprobs(encoded, *rest, **named):
        seen.append([prompt.id for prompt in encoded])
        return inner(encoded, *rest, **named)

    monkeypatch.setattr(moved, "logprobs", logprobs)
    optimizer = Recorder(moved)
    update = update_policy(moved, batch, optimizer, GRPO(group_size=3, kl_coef=0), lr=0.01)
    assert seen == [["example-0", "example-1", "example-3"]]
    assert update.skipped_groups == 1
    skipped = weights_of(moved)
    moved.model.load_state_dict(start)
    # An advantage too small to matter, but not 0, keeps the group in.
    kept = tuple(replace(g, advantages=(1e-300,) * 3) if not any(g.advantages) else g for g in batch)
    complete = Recorder(moved)
    assert update_policy(moved, kept, complete, GRPO(group_size=3, kl_coef=0), lr=0.01).skipped_groups == 0
    assert distance(optimizer.gradients[0], complete.gradients[0]) < 1e-12
    after = weights_of(moved)
    assert max(float((skipped[name] - after[name]).abs().max()) for name in after) < 1e-9


def test_with_a_kl_term_groups_without_advantages_still_pull_to_the_reference(moved, batch):
    idle = tuple(group for group in batch if not any(group.advantages))
    update = update_policy(moved, idle, Recorder(moved), GRPO(group_size=3, kl_coef=0.1), lr=0.01)
    assert update.skipped_groups == 0 and update.grad_norm > 0 and update.kl > 0


def test_a_batch_of_nothing_but_skipped_groups_changes_no_weight(moved, batch):
    idle = tuple(replace(group, advantages=(0.0, 0.0, 0.0)) for group in batch)
    start = weights_of(moved)
    update = update_policy(moved, idle, Recorder(moved), GRPO(group_size=3, kl_coef=0), lr=0.01)
    assert (update.skipped_groups, update.tokens, update.loss, update.grad_norm) == (4, 0, 0.0, 0.0)
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights_of(moved).items())


# ---------------------------------------------------------------- several updates on the same completions


def test_later_updates_compare_with_the_first_pass_and_clip(moved, batch):
    objective = GRPO(group_size=3, kl_coef=0.05, updates_per_rollout=3)
    optimizer = Recorder(moved)
    update = update_policy(moved, batch, optimizer, objective, lr=0.01, tokens_per_micro_batch=450)
    assert len(optimizer.gradients) == 3
    oracle = Policy(copy.deepcopy(moved.model), moved.processor)
    oracle._reference = moved.reference
    prompts = oracle.encode([group.prompt for group in batch])
    oracle.model.load_state_dict(optimizer.starts[0])
    with torch.no_grad():
        old = naive_logprobs(oracle, prompts, [group.completions for group in batch])
    for weights, gradients in zip(optimizer.starts, optimizer.gradients, strict=True):
        oracle.model.load_state_dict(weights)
        expected = gradients_of_loss(oracle, paper_loss(oracle, batch, objective, old=old))
        assert distance(gradients, expected) < 1e-5
    assert 0 < update.clip_fraction < 1


# ---------------------------------------------------------------- what is reported


def test_the_sampling_gap_is_there_for_fresh_completions_and_almost_nothing(make_policy, make_examples, tmp_path):
    policy = make_policy()
    policy.freeze_reference()

    def reward(example, completion):
        return Score(value=float(completion.token_ids[0] % 7))

    sampling = Sampling(max_new_tokens=5, temperature=0.8)
    groups = collect(policy, make_examples(tmp_path, 3), make_prompt, reward, sampling, group_size=4, seed=0, step=0)
    batch = pack_groups(groups, torch.tensor(groups.rewards))
    assert batch[1].advantages == tuple(groups.rewards[1])
    assert [group.prompt.id for group in batch] == ["example-0", "example-1", "example-2"]
    update = update_policy(policy, batch, Recorder(policy), GRPO(group_size=4), lr=1e-3, temperature=0.8)
    assert update.sampling_gap is not None and 0 <= update.sampling_gap < 1e-6
    assert update.kl == pytest.approx(0, abs=1e-9)  # it has not left its reference yet
    assert update.tokens == sum(micro.tokens for micro in cut(policy, batch, GRPO(group_size=4), Budget(policy, 1)))
    # At a temperature the sampler did not have, the gap says so.
    other = update_policy(policy, batch, Recorder(policy), GRPO(group_size=4), lr=1e-3, temperature=1.5)
    assert other.sampling_gap is not None and other.sampling_gap > 0.01


# ---------------------------------------------------------------- what is not finite


def assert_stops_before_any_change(policy, batch, objective, match, **options):
    optimizer = Recorder(policy)
    start = weights_of(policy)
    with pytest.raises(NonFiniteError, match=match) as caught:
        update_policy(policy, batch, optimizer, objective, lr=0.01, **options)
    for name, tensor in weights_of(policy).items():
        torch.testing.assert_close(tensor, start[name], rtol=0, atol=0, equal_nan=True)
    assert optimizer.state_dict() == ({}, {})
    return str(caught.value)


@pytest.mark.parametrize("tokens", [1, 1_000_000])
def test_pixels_that_are_not_finite_stop_the_update_and_are_named(moved, batch, tokens):
    encoded = moved.encode([group.prompt for group in batch])
    encoded[1].pixels[3, 5] = math.nan  # what the policy remembers of this prompt
    objective = GRPO(group_size=3, kl_coef=0)
    message = assert_stops_before_any_change(moved, batch, objective, "example-1", tokens_per_micro_batch=tokens)
    assert "example-0" not in message and "example-3" not in message


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("tokens", [1, 1_000_000])
def test_advantages_that_are_not_finite_stop_the_update(moved, batch, tokens, value):
    broken = (*batch[:3], replace(batch[3], advantages=(value, 0.0, 0.0)))
    assert_stops_before_any_change(moved, broken, GRPO(group_size=3), "example-3", tokens_per_micro_batch=tokens)


def test_weights_that_are_not_finite_stop_the_update(moved, batch):
    with torch.no_grad():
        moved.model.model.language_model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    assert_stops_before_any_change(moved, batch, SFT(), "No weight was changed")


@pytest.mark.parametrize("tokens", [1, 1_000_000])
def test_a_gradient_that_is_not_finite_though_the_loss_is_stops_the_update(moved, batch, tokens):
    broken = (batch[0], replace(batch[1], advantages=(1e308, -1e308, 0.0)), *batch[2:])
    objective = GRPO(group_size=3, kl_coef=0)
    assert_stops_before_any_change(moved, broken, objective, "example-1", tokens_per_micro_batch=tokens)


def test_an_update_that_was_stopped_leaves_nothing_in_the_next(moved, batch):
    objective = GRPO(group_size=3, kl_coef=0)
    clean = Recorder(moved)
    start = weights_of(moved)
    update_policy(moved, batch, clean, objective, lr=0.01)
    moved.model.load_state_dict(start)
    optimizer = Recorder(moved)
    broken = (*batch[:3], replace(batch[3], advantages=(math.nan, 0.0, 0.0)))
    with pytest.raises(NonFiniteError):
        update_policy(moved, broken, optimizer, objective, lr=0.01, tokens_per_micro_batch=1)
    update_policy(moved, batch, optimizer, objective, lr=0.01)
    assert distance(optimizer.gradients[0], clean.gradients[0]) == 0


def run_out_of_memory_above(policy: Policy, monkeypatch, tokens: int) -> list[int]:
    """A memory that holds this many tokens; what goes beyond it fails after its gradients were half written."""
    inner, tried = policy.logprobs, []

    def logprobs(encoded, completions, **options):
        size = sum(len(prompt.token_ids) for prompt in encoded)
        size += sum(len(ids) - 1 for group in completions for ids in group)
        tried.append(size)
        if size > tokens:
            inner(encoded[:1], completions[:1], **options).logprobs.sum().backward()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(encoded, completions, **options)

    monkeypatch.setattr(policy, "logprobs", logprobs)
    return tried


@every_objective
def test_out_of_memory_makes_smaller_micro_batches_and_the_same_gradient(moved, batch, objective, monkeypatch):
    start = copy.deepcopy(moved.model.state_dict())
    whole = Recorder(moved)
    expected = update_policy(moved, batch, whole, objective, lr=0.01, tokens_per_micro_batch=100_000)
    moved.model.load_state_dict(start)
    sizes = [micro.tokens for micro in cut(moved, batch, objective, Budget(moved, 1))]
    tried = run_out_of_memory_above(moved, monkeypatch, max(sizes))
    budget, halved = Budget(moved, 100_000), Recorder(moved)
    update = update_policy(moved, batch, halved, objective, lr=0.01, tokens_per_micro_batch=budget)
    assert tried[0] == sum(sizes) and tried[-1] <= max(sizes)
    assert budget.tokens is not None and budget.tokens < 100_000  # remembered: the next step starts there
    assert distance(halved.gradients[0], whole.gradients[0]) < 1e-6
    assert update.loss == pytest.approx(expected.loss, rel=1e-9)
    assert update.tokens == expected.tokens


def test_out_of_memory_in_a_later_update_on_the_same_completions_keeps_the_old_logprobs(moved, batch, monkeypatch):
    objective = GRPO(group_size=3, kl_coef=0.1, updates_per_rollout=2)
    start = copy.deepcopy(moved.model.state_dict())
    whole = Recorder(moved)
    update_policy(moved, batch, whole, objective, lr=0.01, tokens_per_micro_batch=100_000)
    moved.model.load_state_dict(start)
    inner, calls = moved.logprobs, []

    def logprobs(*args, **options):
        calls.append(len(args[0]))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(*args, **options)

    monkeypatch.setattr(moved, "logprobs", logprobs)
    halved = Recorder(moved)
    update_policy(moved, batch, halved, objective, lr=0.01, tokens_per_micro_batch=100_000)
    assert calls[0] == calls[1] == 4 and sum(calls[2:]) == 4 and len(calls) > 3
    for ours, theirs in zip(halved.gradients, whole.gradients, strict=True):
        assert distance(ours, theirs) < 1e-6


def test_a_group_that_does_not_fit_alone_is_named_with_what_would_help(moved, batch, monkeypatch):
    run_out_of_memory_above(moved, monkeypatch, 10)
    before = weights_of(moved)
    with pytest.raises(PolicyError, match=r"one group of 3 completions.*policy\.checkpoint_activations"):
        update_policy(moved, batch, Recorder(moved), GRPO(group_size=3), lr=0.01)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(moved).items())


def test_patches_count_where_the_tower_learns(moved, batch):
    # 2 layers of q, k, v, o, gate, up, down (32 + 16 + 16 + 32 + 48 + 48 + 32) against 2 of qkv, proj, fc1, fc2.
    assert tokens_per_patch(moved) == pytest.approx((96 + 32 + 128 + 32) / (32 + 16 + 16 + 32 + 48 + 48 + 32))
    (micro, *_) = cut(moved, batch, GRPO(group_size=3), Budget(moved, 1))
    assert micro.patches == 16
    assert Budget(moved, 1).cost(10, 16) > 10
    moved.family.vision.requires_grad_(False)
    assert Budget(moved, 1).cost(10, 16) == 10


@pytest.mark.parametrize(("passes", "whole", "tokens"), [
    # 6 bytes a token and 400 whatever the size: 0.8 (9000 - 400) / 6; with sums 0.8 (9000 - 400 - 2600) / 6
    ([(100, 600, 1000), (200, 1200, 1600)], 1146, 800),
    # gradients are all of the peaks: 5 bytes a token all the same, and at most 5500 beside
    ([(100, 500, 6000), (200, 1000, 6000)], 560, 144),
    ([(100, 600, 1000)], 1146, 800),  # two groups did not fit
    ([(100, 600, 10_000), (200, 1200, 10_600)], 0, 1),  # nothing is left: a group at a time
])  # fmt: skip
def test_the_budget_is_what_is_free_over_what_a_token_keeps(moved, monkeypatch, passes, whole, tokens):
    says = {"mem_get_info": (10_000, 80_000), "memory_reserved": 500, "memory_allocated": 300}
    for name, value in says.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    budget = Budget(moved)
    budget.find([Pass(*taken) for taken in passes], to_stay=1200, sums=2600)
    assert (budget.whole, budget.tokens) == (whole, tokens)
    assert budget.of_step(whole) == whole and budget.of_step(whole + 1) == tokens


def test_a_step_that_has_grown_out_of_going_through_whole_is_cut_by_what_leaves_room_for_sums(moved, batch):
    budget = Budget(moved, 1)
    sizes = [micro.tokens for micro in cut(moved, batch, GRPO(group_size=3), budget)]
    total = sum(budget.cost(micro.tokens, micro.patches) for micro in cut(moved, batch, GRPO(group_size=3), budget))
    budget.whole = math.ceil(total)
    assert [micro.tokens for micro in cut(moved, batch, GRPO(group_size=3), budget)] == [sum(sizes)]
    budget.whole -= 1
    assert [micro.tokens for micro in cut(moved, batch, GRPO(group_size=3), budget)] == sizes
    budget.whole = math.ceil(total)
    budget.halve(total)
    assert len(cut(moved, batch, GRPO(group_size=3), budget)) > 1  # what ran out of memory is not tried again


@pytest.mark.gpu
def test_on_a_gpu_the_budget_is_found_from_the_memory_one_group_takes(make_policy, batch):
    policy = make_policy(torch.bfloat16)
    policy.model.to("cuda")
    policy = Policy(policy.model, policy.processor)
    policy.freeze_reference()
    budget = Budget(policy)
    assert budget.tokens is None
    update_policy(policy, batch, AdamW(policy.model.named_parameters(), OPTIM), GRPO(group_size=3), lr=1e-4,
                  tokens_per_micro_batch=budget)  # fmt: skip
    assert budget.tokens is not None and budget.tokens > 10_000
