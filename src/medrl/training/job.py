"""What stands around the loop: the job, checked before anything is written, and the work on it, with its run folder
open."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medrl import stopping
from medrl.data.prompts import make_prompt
from medrl.data.sampler import Sampler
from medrl.data.store import store_of
from medrl.policy.lengths import check_room
from medrl.policy.policy import Policy
from medrl.progress import Progress
from medrl.provenance import describe_machine, describe_versions
from medrl.rewards import guarded
from medrl.rollout.collect import Ask
from medrl.rollout.served import Rollouts, Server
from medrl.runs import Run
from medrl.settings import Settings
from medrl.training import distributed
from medrl.training.ahead import Ahead, choose_processes, make_foresight
from medrl.training.batches import Objective
from medrl.training.budget import Budget
from medrl.training.determinism import deterministic_kernels
from medrl.training.distributed import Scale
from medrl.training.group_relative import Draw
from medrl.training.learner import make_learner
from medrl.training.methods import Method, make_method
from medrl.training.metrics import Entry
from medrl.training.optim import AdamW
from medrl.training.scorer import Scorer
from medrl.training.serving import hand_over, make_server
from medrl.training.settings import Training
from medrl.training.start import Complete, Resume, check_inputs, choose_curriculum, describe, fingerprint, open_run
from medrl.training.state import RunState
from medrl.training.trackers import Tracker, tracking
from medrl.types import Example, Prompt, Reward

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be trained, on what and how. It can be done, as far as that shows beforehand."""

    policy: Policy
    train_set: Sequence[Example]
    ask: Ask
    reward: Reward
    settings: Training
    method: Method
    server: Server | None
    """Writes the completions; None: the policy does, in this process."""
    out: Path
    root: Path | None
    recipe: Mapping[str, Any]
    """What the run folder keeps as its recipe."""
    complete: Complete
    provenance: Mapping[str, Any]


def make_job(
    policy: Policy,
    train_set: Sequence[Example],
    reward: Reward,
    objective: Objective,
    settings: Training,
    *,
    out: Path,
    root: Path | None = None,
    recipe: Settings | None = None,
    provenance: Mapping[str, Any] | None = None,
    rollout: Rollouts | None = None,
) -> Job:
    """Look at everything that was given; arguments and errors as in ``train``. Nothing is written."""
    if policy.trained:
        policy.freeze_reference()  # a second training starts where the first one ended
    weights = getattr(reward, "weights", None)  # a reward that is a plain function cannot say what it is
    reward = guarded(reward)
    check_inputs(train_set, reward, settings, objective)
    ask = functools.partial(make_prompt, mode=settings.mode, template=settings.template)
    check_room(policy, [ask(example) for example in train_set], settings.sampling.max_new_tokens)
    server = make_server(rollout, settings.sampling, out)
    method = make_method(
        policy, objective, ask, reward, settings.sampling, settings.seed, settings.prompts_per_step, server
    )
    kept, complete = describe(recipe, settings, objective, weights)
    facts = {
        **describe_versions(),
        **describe_machine(),
        "data_fingerprint": fingerprint(train_set),
        "attention": policy.attention,
        "compiled": policy.compiled,
        **(provenance or {}),
        "world_size": distributed.world_size(),
    }
    return Job(
        policy=policy, train_set=train_set, ask=ask, reward=reward, settings=settings, method=method, server=server,
        out=out, root=root or store_of(train_set), recipe=kept, complete=complete, provenance=facts,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A run under way: what its steps use, and what happens before and after each of them."""

    job: Job
    run: Run
    state: RunState
    learner: Scorer
    optimizer: AdamW
    budget: Budget
    draw: Draw
    first_step: int
    coming: Callable[[int], list[Prompt]]
    ahead: Ahead
    progress: Progress
    track: Callable[[int, Mapping[str, Any]], None]

    def begin(self, step: int) -> Entry:
        """Wait for the step's images, start on the next one's, and give a server the weights it samples from."""
        entry = Entry(step, self.job.root)
        self.state.begin(step)
        distributed.gather(self.ahead.wait)  # an image that one rank cannot read stops all
        if step + 1 < self.job.settings.steps:
            self.ahead.start(self.coming(1))
        entry.lap("data")
        if self.job.server is not None:
            hand_over(self.job.server, self.job.policy, step)
            entry.lap("handover")
        return entry

    def record(self, entry: Entry) -> None:
        """Write the step down, and show it."""
        entry.lap("update")
        row = entry.row()
        self.run.append_metrics({**row, "eta_s": self.progress.advance(row)})
        self.track(entry.step, row)
        self.run.append_rollouts(entry.rollouts)

    def due(self, step: int) -> bool:
        """Whether to save after this step."""
        settings = self.job.settings
        return (step + 1) % settings.save_every == 0 or step + 1 == settings.steps


@contextmanager
def at_work(
    job: Job,
    *,
    resume: Resume,
    deadline: stopping.Deadline | None,
    scale: Scale,
    trackers: Sequence[Tracker],
    quiet: bool,
) -> Iterator[Work]:
    """Within, the run folder is open and locked, and the run stands where it was left; a stop saves it."""
    policy, settings = job.policy, job.settings
    with ExitStack() as held, deterministic_kernels(settings.deterministic):
        facts = {**job.provenance, "model_fingerprint": policy.fingerprint()}
        run = distributed.open_together(lambda: open_run(job.out, job.recipe, facts, resume, job.complete, held=held))
        with stopping.at_safe_points(deadline):
            train_set, ranks = choose_curriculum(
                run, policy, job.train_set, job.ask, job.reward, settings, job.server, quiet=quiet
            )
        sampler = Sampler(len(train_set), settings.seed, ranks=ranks)
        coming = make_foresight(train_set, sampler, job.ask, settings.prompts_per_step)
        learner, optimizer = make_learner(policy, job.method.policy, settings, scale)
        state = RunState(run, policy, optimizer, sampler, job.method, settings, deadline)
        first_step = state.restore()
        distributed.check_same("weights", policy.fingerprint)
        if first_step == settings.steps:
            log.info("%s was finished already, with all %d steps", run.path, settings.steps)
        policy.trained = True
        workers = settings.data_workers
        processes = choose_processes(settings.data_processes, workers, policy.device)
        with (
            Progress(settings.steps, first_step, quiet=quiet) as progress,
            state.saved_when_stopped(),
            stopping.at_safe_points(deadline),
            Ahead(job.method.policy, workers, processes=processes) as ahead,
            tracking(trackers if distributed.first() else (), run, first_step) as track,
        ):
            ahead.start(coming(0))
            yield Work(
                job=job,
                run=run,
                state=state,
                learner=learner,
                optimizer=optimizer,
                budget=Budget(policy, settings.tokens_per_micro_batch),
                draw=lambda count: [train_set[index] for index in sampler.next(count)],
                first_step=first_step,
                coming=coming,
                ahead=ahead,
                progress=progress,
                track=track,
            )
        run.update_provenance(seconds=state.seconds)
