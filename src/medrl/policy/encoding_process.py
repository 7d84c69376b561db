"""A process of one's own that encodes prompts: opening, resizing and tokenizing then never hold this one's lock."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

from PIL import Image, ImageFile

from medrl import errors
from medrl.errors import DataError, ImageError, MedrlError
from medrl.policy.channel import ClosedError, receive, send
from medrl.policy.encoding import EncodedPrompt, Encoder
from medrl.stopping import SIGNALS
from medrl.types import Prompt

PATIENCE_S = 5.0
"""Longest wait for processes that were killed to be gone: one that waits for a disk cannot go."""
LAST_WORDS = 1000
"""Bytes shown of what a process that failed said last."""
_ends_here: "WeakSet[socket.socket]" = WeakSet()  # forking is of the whole process, and so is this


def _let_go_in_child() -> None:
    """Close the copies that a forked child has: processes end when nobody holds the other end any more."""
    for end in _ends_here:
        end.close()


os.register_at_fork(after_in_child=_let_go_in_child)


class StartError(DataError):
    """A process that cannot be had, or that ended before it could be asked anything: others may do its work."""


def save_processor(encoder: Encoder) -> "tempfile.TemporaryDirectory[str]":
    """A folder that processes read their processors from. Raises ``StartError``."""
    with _OrNoStart(), ExitStack() as held:
        folder = tempfile.TemporaryDirectory(prefix="medrl-processor-", ignore_cleanup_errors=True)
        held.callback(folder.cleanup)
        encoder.processor.save_pretrained(folder.name)
        held.pop_all()
    return folder


class _OrNoStart:
    """Raises what goes wrong within as ``StartError``: processors are anyone's, and a full disk is a bare ``Exception``
    to tokenizers."""

    def __enter__(self) -> None:
        """There is nothing to do yet."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            raise StartError(f"the processor cannot be saved for another process ({_words_of(error)})") from error


class EncodingProcess:
    """Encodes as the encoder does that it is made from, bit for bit. Starting takes seconds; nobody waits for that.

    For one thread; ``ready`` and ``kill`` may come from others.
    """

    def __init__(self, encoder: Encoder, folder: Path) -> None:
        """Start it. Raises ``StartError``.

        Args:
            folder: where the encoder's processor was saved.
        """
        self._encoder = encoder
        self._ready = False
        self._failure: StartError | None = None
        self._starting = threading.Lock()
        try:
            with ExitStack() as held:
                self._said = held.enter_context(tempfile.TemporaryFile())
                self._channel, theirs = socket.socketpair()
                held.enter_context(self._channel)
                with theirs:
                    for end in (self._channel, theirs):
                        _ends_here.add(end)
                        end.settimeout(None)  # a library may have set another for all sockets; both ends are to wait
                    self._process = _start(encoder, folder, theirs, self._said)
                held.pop_all()
        except OSError as error:  # no memory, no room for a file, too many files or processes
            raise StartError(f"a process to prepare prompts cannot be started ({_words_of(error)})") from error

    def ready(self, *, wait: bool = False) -> bool:
        """Whether it has started; with ``wait``, once it has. Raises ``StartError`` if it ended instead."""
        if self._starting.acquire(blocking=wait):  # else somebody waits for it already
            try:
                if not self._ready and not self._failure and (wait or self._has_spoken()):
                    self._failure = self._hear_of_start()
                    self._ready = self._failure is None
            finally:
                self._starting.release()
        if self._failure is not None:
            raise self._failure
        return self._ready

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """As ``Encoder.encode``, with its errors.

        One that is none of ours comes as a ``RuntimeError`` that tells its kind. ``DataError`` if the process ended
        meanwhile.
        """
        self.ready(wait=True)
        asked = {
            "id": prompt.id,
            "text": prompt.text,
            "images": [str(path) for path in prompt.images],
            "mode": prompt.mode,
            "torn": ImageFile.LOAD_TRUNCATED_IMAGES,  # a library may have set both for all of Pillow, at any time
            "most_pixels": Image.MAX_IMAGE_PIXELS,
        }
        try:
            send(self._channel, asked)
            answer, tensors = receive(self._channel)
        except ClosedError as error:
            raise DataError(
                f"a process that prepares prompts failed at example {prompt.id} (images: {_images_of(prompt)}): "
                f"{self._its_end()}. With training.data_processes false (in an evaluation, "
                "EvalSettings.data_processes), this process prepares them itself. What was saved is whole"
            ) from error
        if "error" in answer:
            raise _error_from(answer["error"])
        if "mistake" in answer:
            mistake = RuntimeError(f"example {prompt.id} (images: {_images_of(prompt)}): {answer['mistake']}")
            mistake.add_note(f"in a process that prepares prompts:\n{answer['trace']}")
            raise mistake
        return EncodedPrompt(id=prompt.id, pixels=tensors.pop("pixels", None), **tensors)

    def kill(self) -> None:
        """End it at once, whatever it is at: it has nothing to save. Who waits for it gets a ``DataError``."""
        self._process.kill()

    def close(self, patience_s: float) -> None:
        """End it and let go of it, be it gone by then or not."""
        self.kill()
        self._wait(patience_s)
        self._channel.close()
        self._said.close()

    def _has_spoken(self) -> bool:
        try:
            self._channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True
        return True

    def _hear_of_start(self) -> StartError | None:
        try:
            loaded, _ = receive(self._channel)
        except ClosedError:
            return StartError(f"a process that prepares prompts failed at its start: {self._its_end()}")
        theirs, ours = loaded["image_processor"], type(self._encoder.processor.image_processor).__name__
        if theirs == ours:
            return None
        self.kill()
        return StartError(
            f"a process that prepares images does it with {theirs}, and this one with {ours}, which may differ by a "
            "rounding"
        )

    def _its_end(self) -> str:
        code = self._wait(PATIENCE_S)
        if code == -signal.SIGKILL:
            return "it was killed, as a rule because memory ran out: lower training.data_workers (--data-workers)"
        if code is not None and code < 0:
            return f"it ended by {signal.Signals(-code).name}"
        return f"it ended with code {code} and these words: {self._last_words() or '(none)'}"

    def _wait(self, patience_s: float) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(patience_s)

    def _last_words(self) -> str:
        end = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, end - LAST_WORDS))
        return self._said.read().decode(errors="replace").strip()


def close_all(processes: Sequence[EncodingProcess]) -> None:
    """Close them, with patience for all together: a stop may wait to be saved."""
    for process in processes:
        process.kill()
    ends = time.monotonic() + PATIENCE_S
    for process in processes:
        process.close(max(0.0, ends - time.monotonic()))


def _start(encoder: Encoder, folder: Path, channel: socket.socket, said: Any) -> "subprocess.Popen[bytes]":
    # -P and the path: what it imports is what this process imports, and nothing from the working directory.
    words = [sys.executable, "-P", "-m", "medrl.policy.encoding_worker", str(folder)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in sys.path),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    # Blocked signals stay blocked in a child: Ctrl-C goes to it as well, and may come before it can ignore it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return subprocess.Popen(
            [*words, str(encoder.image_token_id), str(encoder.merge_size)],
            stdin=channel.fileno(), stdout=said, stderr=said, env=environment,
        )  # fmt: skip
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _images_of(prompt: Prompt) -> str:
    return ", ".join(map(str, prompt.images)) or "none"


def _words_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _error_from(found: dict[str, Any]) -> MedrlError:
    """The error as it was raised in the other process."""
    if found["image"] is not None:
        path, reason, fix = found["image"]
        return ImageError(Path(path), reason, fix)
    kind = getattr(errors, found["kind"])
    error = kind.__new__(kind, found["message"])  # some are made from other words than they say
    assert isinstance(error, MedrlError)
    return error
