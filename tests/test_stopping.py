import os
import signal
import subprocess
import sys
import threading

import pytest
from typer.testing import CliRunner

from medrl import stopping
from medrl.cli import app


@pytest.fixture(autouse=True)
def ctrl_c_is_not_ignored():
    """A shell starts what it runs in the background with SIGINT ignored, and then so it stays."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ask(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_waits_for_the_next_safe_point(number):
    passed = []
    with pytest.raises(stopping.Stopped), stopping.at_safe_points():
        stopping.check()
        ask(number)
        passed.append("work after the signal")
        stopping.check()
        passed.append("work after the safe point")
    assert passed == ["work after the signal"]


def test_outside_there_is_nothing_to_stop_and_the_handlers_are_as_before():
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with pytest.raises(stopping.Stopped), stopping.at_safe_points():
        ask()
        stopping.check()
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    stopping.check()
    with stopping.at_safe_points():
        stopping.check()


def test_a_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt) as raised, stopping.at_safe_points():
        ask(signal.SIGINT)
        ask(signal.SIGINT)
        pytest.fail("the second signal was swallowed")
    assert type(raised.value) is KeyboardInterrupt


def test_a_second_sigterm_ends_the_process_where_it_stands():
    code = (
        "import os, signal\nfrom medrl import stopping\nwith stopping.at_safe_points():\n"
        "    for _ in range(2):\n        os.kill(os.getpid(), signal.SIGTERM)\n        print('alive', flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "alive\n")
    assert "once more leaves at once" in done.stderr


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping.at_safe_points():
            ask(signal.SIGINT)
            stopping.check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_may_use_it_but_take_no_signals():
    seen = []

    def work() -> None:
        with stopping.at_safe_points():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_second_sigusr1_ends_the_process_too():
    code = (
        "import os, signal\nfrom medrl import stopping\nwith stopping.at_safe_points():\n"
        "    for _ in range(2):\n        os.kill(os.getpid(), signal.SIGUSR1)\n        print('alive', flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGUSR1, "alive\n")


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_deadline_leaves_time_for_the_longest_way_and_two_of_the_longest_saves():
    clock = Time()
    deadline = stopping.Deadline(60, clock)  # ends at 160
    deadline.saved(4)
    deadline.saved(3)  # the longest counts: 4
    near = []
    for now in (100, 110, 115, 140, 143):  # the longest way is 10, then 25
        clock.now = now
        near.append(deadline.is_near())
    assert near == [False, False, False, True, True]  # 140 + 25 + 8 > 160


def test_what_a_save_takes_is_no_way_to_a_safe_point():
    clock = Time()
    deadline = stopping.Deadline(60, clock)
    assert not deadline.is_near()
    clock.now = 130
    deadline.saved(5)
    clock.now = 131
    assert not deadline.is_near()  # 131 + 0 + 10


def test_work_stops_at_the_safe_point_where_its_time_is_nearly_up_and_says_so():
    clock = Time()
    with (
        pytest.raises(stopping.Stopped, match=r"^time is nearly up$"),
        stopping.at_safe_points(stopping.Deadline(1800, clock)),
    ):
        stopping.check()
        clock.now += 1801
        stopping.check()
    stopping.check()  # no deadline is left behind


@pytest.mark.parametrize(
    ("command", "where", "code", "words"),
    [
        (["plan", "recipe.yaml"], "medrl.bench.plan.measure", 130, "stopped; nothing was kept\n"),
        (
            ["train", "recipe.yaml", "--out", "run"],
            "medrl.training.recipe.run_recipe",
            143,
            "saved and stopped; continue",
        ),
    ],
)
def test_a_command_that_trains_ends_in_a_sentence_when_it_is_stopped(monkeypatch, command, where, code, words):
    def stopped(*_, **__):
        raise stopping.Stopped

    monkeypatch.setattr(where, stopped)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == code, done.output
    assert done.stderr.startswith(words)


def test_tidy_work_leaves_through_its_finally_clauses_and_with_the_signals_code():
    code = (
        "import os, signal\nfrom medrl import stopping\nwith stopping.tidily():\n    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n    finally:\n        print('cleared')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (143, "cleared\n")


def test_tidy_work_keeps_to_a_handler_that_is_there_already():
    with pytest.raises(stopping.Stopped), stopping.at_safe_points(), stopping.tidily():
        ask()
        stopping.check()
