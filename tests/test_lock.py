"""Two processes never train into one folder; a process that was killed blocks nobody."""

import errno
import os
import signal
import socket
import subprocess
import sys

import pytest

from medrl import runs
from medrl.errors import RunError
from medrl.runs import Run, check_unlocked, check_vacant, locked

HOLDER = """
import sys, time
from pathlib import Path
from medrl.runs import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has the lock of ``tmp_path / "run"``."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_that_another_process_trains_into_is_refused_naming_it(holder, tmp_path):
    message = rf"process {holder.pid} on {socket.gethostname()}.*end it; or choose another"
    with pytest.raises(RunError, match=message), locked(tmp_path / "run"):
        pass


def test_who_has_it_can_be_asked_before_anything_is_loaded(holder, tmp_path):
    with pytest.raises(RunError, match=f"process {holder.pid}"):
        check_unlocked(tmp_path / "run")
    check_unlocked(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_process_that_was_killed_blocks_nobody(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / runs.LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_what_is_held_is_let_go_at_the_end_and_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        _ = 1 / 0
    with locked(tmp_path), pytest.raises(RunError, match=f"process {os.getpid()}"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_lock_does_not_fill_a_folder(tmp_path):
    with locked(tmp_path / "run"):
        check_vacant(tmp_path / "run")
        Run.create(tmp_path / "run", {"steps": 1}, {})


def test_a_file_system_without_locks_is_named_and_goes_on(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.fcntl, "flock", refuse)
    with locked(tmp_path):
        pass
    assert "cannot be locked" in caplog.text and "No locks available" in caplog.text
