"""Prompts -> completions by an OpenAI-compatible server (vLLM, SGLang, transformers serve), images as data URIs.

Sent: the prompt's text and its images as the policy would see them, encoded anew: no id, no file name, no metadata of
an image file. A request that fails for a reason that may pass (429, 5xx, no connection, no reply in time, a reply that
is cut off) is sent again, later and later; one that the server refuses is reported by name; and when the server itself
is gone, what was asked before is still handed over.
"""

import base64
import hashlib
import io
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from medrl.data.images import open_image
from medrl.errors import EndpointError, SettingsError
from medrl.rollout.sampling import Sampling
from medrl.types import Completion, Prompt

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable that holds the endpoint's key, where it wants one."""
_MAY_PASS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_OF_THIS_REQUEST = frozenset({400, 413, 415, 422})
"""Refusals of one request, e.g. of a prompt that is too long; any other refusal is of all requests."""
_LONGEST_WAIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What the server gave for one prompt: its completions, or why there are none."""

    prompt: Prompt
    completions: tuple[Completion, ...] = ()
    tokens: tuple[int, ...] = ()
    """Length of each completion as the server counted it; its token ids are not known."""
    refusal: str = ""


class _Refused(Exception):
    """The server will not answer this request, and others may fare better."""


@dataclass(slots=True)
class _Work:
    """What the requests of one call know of each other."""

    answered: int = 0
    leaving: threading.Event = field(default_factory=threading.Event)
    """Set once the call ends early: attempts that run are finished, no other is made."""


class _MayPass(Exception):
    """A failure that may pass; ``wait_s`` is how long the server asked to be left alone."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server that completes chats. Raises ``SettingsError`` for an address that is none."""

    url: str
    """Base address, e.g. ``http://localhost:8000/v1``."""
    model: str
    """Name of the model there."""
    timeout_s: float = 300.0
    """Longest wait for one reply."""
    tries: int = 6
    """Attempts before a request counts as failed for good."""
    first_wait_s: float = 1.0
    """Wait before the second attempt; doubled before each further one, and as long as the server says if it does."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(f"the endpoint is {self.url!r}; give an address like http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            raise SettingsError(
                f"the endpoint's address holds a name, a key or a query, and addresses are written into records: give "
                f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path} and put the key into {KEY_VARIABLE}"
            )
        if self.tries < 1:
            raise SettingsError(f"tries is {self.tries}, but the endpoint must be asked at least once")

    def complete(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, group_size: int = 1, seed: int = 0, at_once: int = 32
    ) -> Iterator[Reply]:
        """Complete each prompt ``group_size`` times; replies come as they are ready, ``at_once`` requests under way.

        Raises:
            EndpointError: the server cannot be reached, refuses everybody, or failed a request ``tries`` times while it
                answered no other. Replies that were under way then have been handed over before.
        """
        waiting, work, failure = iter(prompts), _Work(), None
        with ThreadPoolExecutor(at_once) as pool:
            under_way: set[Future[Reply]] = set()
            try:
                while True:
                    while failure is None and len(under_way) < at_once and (prompt := next(waiting, None)) is not None:
                        under_way.add(pool.submit(self._reply, work, prompt, sampling, group_size, seed))
                    if not under_way:
                        break
                    ready, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                    for future in ready:
                        if (error := future.exception()) is None:
                            work.answered += not future.result().refusal
                            yield future.result()
                        elif not isinstance(error, EndpointError):
                            raise error
                        elif failure is None:
                            failure = error
                            work.leaving.set()
            finally:
                work.leaving.set()
        if failure is not None:
            raise failure

    def _reply(self, work: _Work, prompt: Prompt, sampling: Sampling, group_size: int, seed: int) -> Reply:
        body = _request(self.model, prompt, sampling)
        try:
            answers = [self._ask(work, {**body, **_draw(sampling, seed, prompt, i)}, prompt) for i in range(group_size)]
        except _Refused as refusal:
            return Reply(prompt=prompt, refusal=str(refusal))
        completions, tokens = zip(*answers, strict=True)
        return Reply(prompt=prompt, completions=completions, tokens=tokens)

    def _ask(self, work: _Work, body: Mapping[str, Any], prompt: Prompt) -> tuple[Completion, int]:
        """Completion and its tokens; asked again while what went wrong may pass."""
        answered_before, attempts, problem = work.answered, 0, ""
        while attempts < self.tries and not work.leaving.is_set():
            try:
                return _read(self._post(body), prompt)
            except _MayPass as error:
                attempts, problem = attempts + 1, str(error)
                wait_s = self.first_wait_s * 2 ** (attempts - 1) if error.wait_s is None else error.wait_s
            if attempts < self.tries:
                work.leaving.wait(min(wait_s, _LONGEST_WAIT_S))
        if attempts == self.tries and work.answered > answered_before:  # it is about this request, not about the server
            raise _Refused(f"{problem} ({attempts} times, while the server answered others)")
        raise EndpointError(
            f"the endpoint {self.url} failed for good: {problem} (asked {attempts} times). Finished answers are kept; "
            "see to the server and run the same command again"
        )

    def _post(self, body: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        url = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            said = f"HTTP {error.code} ({error.reason}): {_excerpt(error)}"
            if error.code in _MAY_PASS:
                raise _MayPass(said, _retry_after(error)) from error
            if error.code in _OF_THIS_REQUEST:
                raise _Refused(said) from error
            raise EndpointError(f"the endpoint {self.url} refuses: {said}. Check --endpoint, the model's name "
                                f"{self.model!r} and {KEY_VARIABLE}") from error  # fmt: skip
        except (OSError, HTTPException) as error:  # refused, reset, timed out, cut off
            raise _MayPass(f"no reply ({getattr(error, 'reason', None) or error or type(error).__name__})") from error


def data_uri(image: Path) -> str:
    """The picture as the policy sees it, upright and with its gray levels stretched, as a PNG without metadata."""
    data = io.BytesIO()
    open_image(image).save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _request(model: str, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
    content = [
        *({"type": "image_url", "image_url": {"url": data_uri(image)}} for image in prompt.images),
        {"type": "text", "text": prompt.text},
    ]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
    }


def _draw(sampling: Sampling, seed: int, prompt: Prompt, index: int) -> dict[str, Any]:
    """How one completion is drawn; like the rollout engine's, a function of seed, prompt and completion index alone."""
    if sampling.temperature == 0:
        return {}
    digest = hashlib.blake2b(f"{seed}\0{prompt.id}\0{index}".encode(), digest_size=4).digest()
    draw = {"seed": int.from_bytes(digest, "little") >> 1, "top_p": sampling.top_p}  # servers take 31 bits
    return {**draw, "top_k": sampling.top_k} if sampling.top_k else draw


def _read(data: bytes, prompt: Prompt) -> tuple[Completion, int]:
    """Completion and its tokens. Raises ``_MayPass`` for what is no whole reply, ``_Refused`` for one without text."""
    try:
        reply = json.loads(data)
        choice = reply["choices"][0]
        message, finish_reason = choice["message"], choice["finish_reason"]
        text, reasoning = message["content"], message.get("reasoning_content") or message.get("reasoning")
        tokens = reply["usage"]["completion_tokens"]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _MayPass(f"its reply is no chat completion ({type(error).__name__}: {error})") from error
    if finish_reason not in ("stop", "length"):
        raise _Refused(f"the server ended the completion with {finish_reason!r}")
    if not isinstance(text, str | None) or not isinstance(reasoning, str | None) or not isinstance(tokens, int):
        raise _MayPass("its reply is no chat completion (content or usage are of another type)")
    whole = f"<think>{reasoning}</think>{text or ''}" if reasoning else text or ""  # as the model wrote it
    return Completion(text=whole, token_ids=(), finish_reason=_ended(finish_reason), mode=prompt.mode), tokens


def _ended(finish_reason: str) -> Literal["stop", "length"]:
    return "length" if finish_reason == "length" else "stop"


def _excerpt(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(300).decode(errors="replace")
    except (OSError, HTTPException):
        return "no explanation"


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    said = error.headers.get("Retry-After", "") if error.headers else ""
    return float(said) if said.isdigit() else None
