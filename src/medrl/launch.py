"""Launching a run or a study on a Slurm cluster through submitit: a task per GPU, saved and requeued when time is up.

The tasks of a run are its ranks; the tasks of a study are workers, each with a GPU of its own, that take cells from one
folder. Slurm sends SIGUSR2 before the end (and at preemption). The work then goes on to its next safe point, saves, and
submitit requeues the job, which continues where it was. A job that is cancelled saves too, and is not requeued.
"""

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from medrl import stopping
from medrl.errors import MissingExtraError, RunError, SettingsError
from medrl.settings import read_recipe
from medrl.stopping import Stopped

Work = Literal["train", "study"]
SECONDS_TO_SAVE = 180
"""Between Slurm's signal and the end of the job."""


@dataclass
class Job:
    """What every task of the job runs; submitit pickles it into the job's folder, which only its owner can write."""

    recipe: str
    overrides: tuple[str, ...]
    out: str
    work: Work = "train"
    _asked: list[int] = field(default_factory=list)

    def __call__(self) -> str:
        from submitit import JobEnvironment

        environment = JobEnvironment()
        preempted = environment._usr_sig()
        requeue: Any = signal.getsignal(preempted)

        def ask(number: int, frame: Any) -> None:
            self._asked.append(number)
            os.kill(os.getpid(), signal.SIGTERM)  # which work that is under way takes as a request

        signal.signal(preempted, ask)
        # submitit would pass over it; a run that is asked before it has begun has nothing to save.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            return WORK[self.work](self, environment)
        except Stopped:
            if self._asked and callable(requeue):
                requeue(preempted, None)  # on rank 0 it does not return
            return "saved"

    def checkpoint(self) -> Any:
        """What goes into the queue again: the same, it resumes by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Job(self.recipe, self.overrides, self.out, self.work))


def _train(job: Job, environment: Any) -> str:
    from submitit.helpers import TorchDistributedEnvironment

    from medrl.training.recipe import run_recipe

    if environment.num_tasks > 1:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    return str(run_recipe(Path(job.recipe), job.overrides, out=Path(job.out), resume="auto").path)


def _study(job: Job, environment: Any) -> str:
    gpus = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if len(gpus) > 1:  # Slurm shows a node's GPUs to all of its tasks; here each works alone
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[environment.local_rank]
    from medrl.study.study import open_study, run_study

    with stopping.at_safe_points():  # between cells and while it waits, too
        outcome = run_study(open_study(Path(job.recipe), job.overrides, out=Path(job.out)), say=print)
    if outcome.failed:
        raise RunError(f"{len(outcome.failed)} cells of {job.out} failed; medrl study --retry-failed tries them again")
    return job.out


WORK: dict[str, Callable[[Job, Any], str]] = {"train": _train, "study": _study}


def slurm_parameters(
    *,
    nodes: int,
    gpus: int,
    hours: float,
    partition: str | None,
    account: str | None,
    name: str,
    work: Work = "train",
    cpus: int = 8,
    more: Sequence[str] = (),
) -> dict[str, Any]:
    """Parameters of sbatch, as submitit names them.

    Args:
        cpus: cores of each task.
        more: further options of sbatch, as ``qos=long`` or ``exclusive``.

    Raises ``SettingsError`` for less than a minute, and for options that are none.
    """
    if hours * 60 < 1:
        raise SettingsError(f"--hours is {hours:g}, but a job needs at least a minute")
    options = {key.strip(): value if equals else True for key, equals, value in (each.partition("=") for each in more)}
    if wrong := [key for key in options if not key or key.startswith("-")]:
        raise SettingsError(f"--sbatch {wrong[0]} is no option; write it as in --sbatch qos=long, without dashes")
    # Since Slurm 22.05 steps do not inherit the cores of a task. And of a run, no rank can go on without the others.
    step = [f"--cpus-per-task={cpus}", *(["--kill-on-bad-exit=1"] if work == "train" else [])]
    wanted = {
        "job_name": name,
        "nodes": nodes,
        "ntasks_per_node": gpus,
        "gpus_per_node": gpus,
        "cpus_per_task": cpus,
        "srun_args": step,
        "time": int(hours * 60),
        "signal_delay_s": SECONDS_TO_SAVE,
        "partition": partition,
        "account": account,
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, **options},
    }
    return {key: value for key, value in wanted.items() if value is not None}


def slurm_script(folder: Path, parameters: dict[str, Any]) -> str:
    """The sbatch script that ``submit`` would hand in."""
    _require_submitit()
    from submitit.slurm.slurm import _make_sbatch_string

    folder = folder.resolve()
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return _make_sbatch_string(command=command, folder=folder, **parameters)


def submit(job: Job, folder: Path, parameters: dict[str, Any], cluster: str = "slurm") -> Any:
    """Hand the job in. Returns submitit's job. ``cluster`` "local" runs its tasks on this machine.

    Raises ``SettingsError`` where there is no Slurm.
    """
    _require_submitit()
    import submitit

    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise SettingsError(
            "there is no sbatch here: run this on the cluster's login node, or look at the script with --dry-run"
        )
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    if cluster == "slurm":
        executor.update_parameters(**{f"slurm_{key}": value for key, value in parameters.items()})
    else:
        executor.update_parameters(tasks_per_node=parameters["ntasks_per_node"], timeout_min=parameters["time"])
    return executor.submit(job)


def describe(recipe: Path, overrides: Sequence[str], out: Path) -> Job:
    """The job of a recipe, or of a study, which is known by its methods; with paths that hold wherever it starts.

    Raises ``SettingsError`` for a recipe that is missing or no YAML.
    """
    work: Work = "study" if "methods" in read_recipe(recipe) else "train"
    return Job(str(recipe.resolve()), tuple(overrides), str(out.resolve()), work)


def _require_submitit() -> None:
    if find_spec("submitit") is None:
        raise MissingExtraError("submitit", "cluster")
