"""Claims: who works on what, agreed through files alone, so that processes on several machines can share a folder.

    claims/0001.json      the first holder; made with O_EXCL, so that one of two who try at once gets it
    claims/0001.released  that holder stopped without finishing
    claims/0002.json      who took over from a holder that had died or fallen silent

A claim is held by the highest number. Nothing is ever deleted or replaced, so taking over has no moment in which two
can win. A holder shows that it lives by touching its file; an observer counts the silence by its own clock, so that
clocks of different machines need not agree. On the same machine a holder whose process is gone is known to be dead at
once.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HEARTBEAT_S = 5.0
EXPIRY_S = 120.0
"""Silence after which a holder on another machine is taken for dead. Far longer than a heartbeat: a busy disk is no
death."""
LOST = 1
"""Exit code of a process that finds its claim taken over."""


class Claims:
    """The claims on one piece of work, as one worker sees them."""

    def __init__(self, folder: Path, expiry_s: float = EXPIRY_S) -> None:
        self.folder = folder
        self.expiry_s = expiry_s
        self._seen: tuple[int, int] | None = None  # number and mtime of the last sign of life
        self._since = 0.0

    def take(self) -> "Claim | None":
        """The claim, when nobody living holds it; None otherwise. Ask again later: silence needs time to show."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = self._highest()
        if number and not self._gone(number):
            return None
        file = self._file(number + 1)
        try:
            descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:  # another worker was faster
            return None
        with os.fdopen(descriptor, "w") as stream:
            json.dump({"machine": machine(), "pid": os.getpid(), "born": _born(os.getpid())}, stream)
        return Claim(self.folder, number + 1)

    def held(self) -> bool:
        """Whether somebody living holds the claim, as far as can be told yet."""
        number = self._highest()
        return bool(number) and not self._gone(number)

    def _gone(self, number: int) -> bool:
        file = self._file(number)
        if file.with_suffix(".released").exists():
            return True
        try:
            holder = json.loads(file.read_text())
        except ValueError:  # made a moment ago and not yet written, or its maker died in that moment: silence will tell
            holder = {}
        if holder.get("machine") == machine() and _born(holder["pid"]) != holder["born"]:
            return True
        sign = (number, file.stat().st_mtime_ns)
        if sign != self._seen:
            self._seen, self._since = sign, time.monotonic()
            return False
        return time.monotonic() - self._since > self.expiry_s

    def _highest(self) -> int:
        return max((int(file.stem) for file in self.folder.glob("*.json")), default=0)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:04d}.json"


class Claim:
    """A claim that is held: a thread of its own shows that its holder lives."""

    def __init__(self, folder: Path, number: int, on_lost: Callable[[], None] | None = None) -> None:
        self.file = folder / f"{number:04d}.json"
        self.next = folder / f"{number + 1:04d}.json"
        self.on_lost = on_lost or leave
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the claim back: whoever comes next need not wait."""
        self._ended.set()
        self._thread.join()
        self.file.with_suffix(".released").touch()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            if self.next.exists():  # this process was silent so long that another took over: two must not write on
                self.on_lost()
                return
            with suppress(FileNotFoundError):  # the folder was removed: there is nobody to show it to
                os.utime(self.file)


def leave() -> None:
    """End this process at once, without cleaning up: its work belongs to another now."""
    print("another worker has taken over: this one was silent for too long, and leaves", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(LOST)


@contextmanager
def exclusive(folder: Path, expiry_s: float = EXPIRY_S, poll_s: float = 0.5) -> Iterator[None]:
    """Within, this process is the only living one here; waits until it is."""
    claims = Claims(folder, expiry_s)
    while (claim := claims.take()) is None:
        time.sleep(poll_s)
    try:
        yield
    finally:
        claim.release()


def machine() -> str:
    """Where process ids mean something: the host, and the container where there is one."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{os.readlink(namespace) if namespace.exists() else ''}"


def _born(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks; None when there is none, or it is a zombie.

    Process ids are used again: a number alone does not tell the holder from a stranger.
    """
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():  # no Linux: the number must do
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return 0
        return 0
    try:
        fields = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
