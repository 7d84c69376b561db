"""One optimizer step over packed groups -> Update.

The step's loss is one sum over all its completion tokens, with weights fixed before it is cut into micro-batches, so
the gradient does not depend on the cut.
"""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from medrl import stopping
from medrl.errors import NonFiniteError, PolicyError
from medrl.grpo import GRPO
from medrl.phases import phase
from medrl.policy.policy import ScoredCompletions
from medrl.training import distributed
from medrl.training.batches import Batch, MicroBatch, Objective, TrainingGroup, cut, learned_from
from medrl.training.budget import Budget, Pass
from medrl.training.objectives import TERMS, Terms
from medrl.training.optim import AdamW
from medrl.training.scorer import Scorer
from medrl.training.sharded import Sharded, idle_pass
from medrl.training.totals import Totals, Update

Divide = Callable[..., list[MicroBatch]]
"""Cuts the step into micro-batches that keep to a budget."""


def update_policy(
    policy: Scorer,
    batch: Batch,
    optimizer: AdamW,
    objective: Objective,
    *,
    lr: float,
    temperature: float = 1.0,
    tokens_per_micro_batch: int | Budget | None = None,
    max_tokens: int | None = None,
) -> Update:
    """Move the policy one step (``updates_per_rollout`` steps on the same completions) along the objective.

    Args:
        tokens_per_micro_batch: what goes through the model together, or the budget that remembers it from step to step:
            found here where it is not known, halved where it was too much for the memory. Neither changes the update.
        max_tokens: the longest allowed completion; only ``reduction: constant`` needs it.

    Raises ``NonFiniteError`` naming the examples when loss or gradient is NaN or infinite; that update has changed no
    weight then (with several updates per rollout, earlier ones have). Raises ``PolicyError`` when a single group is too
    much for the memory. Raises ``Stopped`` between micro-batches before any weight has moved.
    """
    given = tokens_per_micro_batch
    budget = given if isinstance(given, Budget) else Budget(policy, given)
    mine = own_groups(policy, batch, objective, budget)
    divide = functools.partial(cut, policy, batch, objective, max_tokens=max_tokens, mine=mine)
    rounds = objective.updates_per_rollout if isinstance(objective, GRPO) else 1
    totals, old = Totals(), []
    optimizer.zero_grad()  # what an update that was stopped half-way has left behind
    for number in range(rounds):
        # After the first the weights have moved, and the step must be finished.
        own: list[tuple[Totals, list[MicroBatch]]] = []

        def learn(own=own, old=old, may_stop=number == 0) -> dict[str, Any]:
            own.append(
                _accumulate(policy, batch, divide, optimizer, objective, temperature, budget, old, may_stop=may_stop)
            )
            return own[0][0].plain(batch)

        totals = Totals.together(distributed.gather(learn), batch)
        micro_batches = own[0][1]
        if rounds > 1 and number == 0:
            old = own[0][0].logprobs
        optimizer.sum_over_ranks()
        try:
            with phase("optimizer"):
                grad_norm = optimizer.step(lr)
        except NonFiniteError as error:
            optimizer.zero_grad()
            search = functools.partial(
                _non_finite_gradients, policy, micro_batches, objective, temperature, old, optimizer
            )
            found = [culprits for culprits in distributed.gather(search) if culprits]
            culprits = sorted({id for ids in found for id in ids} or {group.prompt.id for group in batch})
            raise NonFiniteError(f"{error}; it comes from example {' or '.join(culprits)}") from error
    return totals.update(grad_norm, lr, batch)


def own_groups(policy: Scorer, batch: Batch, objective: Objective, budget: Budget) -> set[int] | None:
    """Places in the batch of the groups this rank learns from; None on one process: all."""
    if distributed.world_size() == 1:
        return None

    def weigh(groups: list[TrainingGroup]) -> list[float]:
        encoded = policy.encode([group.prompt for group in groups])
        return [
            budget.cost(
                len(prompt.token_ids) + sum(len(ids) - 1 for ids in group.completions),
                0 if prompt.pixels is None else len(prompt.pixels),
            )
            for group, prompt in zip(groups, encoded, strict=True)
        ]

    costs, learned = distributed.spread(batch, weigh), set(learned_from(batch, objective))
    owners = distributed.balance([c if i in learned else 0.0 for i, c in enumerate(costs)], distributed.world_size())
    return {i for i, owner in enumerate(owners) if owner == distributed.rank()}


def _accumulate(
    policy: Scorer,
    batch: Batch,
    divide: Divide,
    optimizer: AdamW,
    objective: Objective,
    temperature: float,
    budget: Budget,
    old: list[Tensor],
    *,
    may_stop: bool,
) -> tuple[Totals, list[MicroBatch]]:
    """Sum the step's gradient; where memory runs out, from the start with smaller micro-batches."""
    if isinstance(policy, Sharded):
        return _accumulate_together(
            policy, batch, divide, optimizer, objective, temperature, budget, old, may_stop=may_stop
        )
    if budget.tokens is None:
        _find_budget(policy, divide, optimizer, objective, temperature, budget)
    while True:
        totals = Totals()
        micro_batches = divide(budget)
        whole = len(micro_batches) == 1 and distributed.world_size() == 1
        try:
            with nullcontext() if whole else optimizer.summing():
                for micro_batch, old_logprobs in zip(micro_batches, _spread(old, micro_batches), strict=True):
                    if may_stop:
                        stopping.check()
                    terms, scored = _backward(policy, micro_batch, objective, temperature, old_logprobs)
                    totals.add(terms, scored, micro_batch, old_logprobs)
            return totals, micro_batches
        except torch.OutOfMemoryError as error:
            # Nothing is kept of a sum that may hold half of a micro-batch's gradient.
            optimizer.zero_grad()
            if all(len(micro_batch.groups) == 1 for micro_batch in micro_batches):
                raise PolicyError(_describe_too_large(micro_batches)) from error
            budget.halve(max(budget.cost(micro_batch.tokens, micro_batch.patches) for micro_batch in micro_batches))
        # Outside of the handler, whose traceback holds the tensors of the pass that failed.
        terms = scored = None
        if policy.device.type == "cuda":
            torch.cuda.empty_cache()


def _accumulate_together(
    policy: Sharded,
    batch: Batch,
    divide: Divide,
    optimizer: AdamW,
    objective: Objective,
    temperature: float,
    budget: Budget,
    old: list[Tensor],
    *,
    may_stop: bool,
) -> tuple[Totals, list[MicroBatch]]:
    """The same under FSDP: every rank makes the same number of passes."""
    micro_batches: list[MicroBatch] = []

    def begin() -> int:
        if may_stop:
            stopping.check()
        micro_batches.extend(divide(budget))
        return len(micro_batches)

    missing = max(distributed.gather(begin)) - len(micro_batches)
    totals, late = Totals(), []
    for micro_batch, old_logprobs in zip(micro_batches, _spread(old, micro_batches), strict=True):
        terms, scored = _backward(policy, micro_batch, objective, temperature, old_logprobs, late)
        totals.add(terms, scored, micro_batch, old_logprobs)
    if missing:
        shortest = min(learned_from(batch, objective), key=lambda i: sum(len(ids) for ids in batch[i].completions))
        (filler,) = divide(budget, mine={shortest})
        for _ in range(missing):
            _backward(policy, idle_pass(filler), objective, temperature, None, late)
    if late:
        optimizer.zero_grad()
        raise late[0]
    return totals, micro_batches


def _find_budget(
    policy: Scorer, divide: Divide, optimizer: AdamW, objective: Objective, temperature: float, budget: Budget
) -> None:
    """Send one group through alone, and then two together, and see what they take."""
    groups = divide(budget)
    if not groups:
        return  # nothing to learn from in this step

    def take(micro_batch: MicroBatch) -> Pass:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        scored = policy.logprobs(micro_batch.encoded, micro_batch.completions, temperature=temperature)
        kept = torch.cuda.memory_allocated() - before
        del scored
        torch.cuda.reset_peak_memory_stats()
        _backward(policy, micro_batch, objective, temperature, None)
        optimizer.zero_grad()
        peak = torch.cuda.max_memory_allocated() - before
        return Pass(budget.cost(micro_batch.tokens, micro_batch.patches), kept, peak)

    try:
        take(groups[0])  # kernels are chosen and compiled, which is no part of the measure
        passes = [take(groups[0])]
    except torch.OutOfMemoryError as error:
        optimizer.zero_grad()
        raise PolicyError(_describe_too_large(groups[:1])) from error
    if len(groups) > 1:
        together = sum(budget.cost(group.tokens, group.patches) for group in groups[:2])
        try:
            passes.append(take(divide(Budget(policy, math.ceil(together)))[0]))
        except torch.OutOfMemoryError:
            optimizer.zero_grad()  # two do not fit together: what one took has to do
    budget.find(passes, to_stay=optimizer.moments_to_come(), sums=optimizer.bytes_of_sums())


def _spread(old: list[Tensor], micro_batches: Sequence[MicroBatch]) -> list[Tensor | None]:
    """The completions' old log-probabilities, as (R, T) of each micro-batch."""
    if not old:
        return [None] * len(micro_batches)
    rows = iter(old)
    return [pad_sequence([next(rows) for _ in micro_batch.ids], batch_first=True) for micro_batch in micro_batches]


def _backward(
    policy: Scorer,
    micro_batch: MicroBatch,
    objective: Objective,
    temperature: float,
    old: Tensor | None,
    late: list[NonFiniteError] | None = None,
) -> tuple[Terms, ScoredCompletions]:
    """Add a micro-batch's gradient. A loss that is not finite raises, or is put into ``late`` where that is given."""
    with phase("policy"):
        scored = policy.logprobs(micro_batch.encoded, micro_batch.completions, temperature=temperature)
        terms = TERMS[type(objective)](policy, micro_batch, scored, objective, temperature, old)
        terms.loss.backward()
        loss = float(terms.loss.detach())  # read here, where a GPU has all of the pass to do: reading waits for it
        if not math.isfinite(loss):
            error = NonFiniteError(_describe_loss(micro_batch, scored, loss))
            if late is None:
                raise error
            late.append(error)
    return terms, scored


def _describe_too_large(micro_batches: Sequence[MicroBatch]) -> str:
    largest = max(micro_batches, key=lambda micro_batch: micro_batch.tokens + micro_batch.patches)
    return (
        f"the memory is too small for one group of {len(largest.ids)} completions alone: example {largest.ids[0]}, "
        f"{largest.tokens} tokens and {largest.patches} image patches. Set policy.checkpoint_activations=true, or "
        "lower policy.max_pixels, grpo.group_size or sampling.max_new_tokens"
    )


def _describe_loss(micro_batch: MicroBatch, scored: ScoredCompletions, loss: float) -> str:
    finite = (scored.logprobs.isfinite() | (scored.completion_mask == 0)).all(dim=1).tolist()
    broken = sorted({id for id, fine in zip(micro_batch.ids, finite, strict=True) if not fine})
    if not broken:
        return (
            f"the loss is {loss}; the log-probabilities are finite, so it comes from an advantage or the reference, of "
            f"example {' or '.join(sorted(set(micro_batch.ids)))}. No weight was changed: look at that example's reward"
        )
    return (
        f"the loss is {loss}; its log-probabilities are not finite for example {' or '.join(broken)}. "
        "No weight was changed: look at that example's images, or lower optim.lr"
    )


def _non_finite_gradients(
    policy: Scorer,
    micro_batches: Sequence[MicroBatch],
    objective: Objective,
    temperature: float,
    old: list[Tensor],
    optimizer: AdamW,
) -> list[str]:
    """Examples of the micro-batches whose own gradient is not finite; none when only their sum is not.

    None either where all ranks pass together: what one of them adds cannot be told from what the others do.
    """
    if isinstance(policy, Sharded):
        return []
    culprits: list[str] = []
    for micro_batch, old_logprobs in zip(micro_batches, _spread(old, micro_batches), strict=True):
        _backward(policy, micro_batch, objective, temperature, old_logprobs)
        gradients = [p.grad for p in policy.model.parameters() if p.grad is not None]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            culprits += sorted(set(micro_batch.ids))
        optimizer.zero_grad()
    return culprits
