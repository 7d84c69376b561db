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
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from medrl.data.images import open_image
from medrl.errors import EndpointError, SettingsError
from medrl.rollout.requests import Work, each
from medrl.rollout.sampling import Sampling
from medrl.types import Completion, Prompt

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable that holds the endpoint's key, where it wants one."""
_MAY_PASS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_OF_THIS_REQUEST = frozenset({400, 413, 415, 422})
"""Refusals of one request, e.g. of a prompt that is too long; any other refusal is of all requests."""
_LONGEST_WAIT_S = 60.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What the server gave for one prompt: its completions, or why there are none."""

    prompt: Prompt
    completions: tuple[Completion, ...] = ()
    tokens: tuple[int, ...] = ()
    """Length of each completion as the server counted it; its token ids are not known."""
    refusal: str = ""


class Refused(Exception):
    """The server will not answer this request, and others may fare better."""


class MayPass(Exception):
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
        work = Work()

        def reply(prompt: Prompt) -> Reply:
            body = describe_chat(self.model, prompt, sampling)
            bodies = [{**body, **_draw(sampling, seed, prompt, i)} for i in range(group_size)]
            try:
                answers = [self.ask(work, body, lambda data: _read(data, prompt)) for body in bodies]
            except Refused as refusal:
                return Reply(prompt=prompt, refusal=str(refusal))
            work.answered += 1
            completions, tokens = zip(*answers, strict=True)
            return Reply(prompt=prompt, completions=completions, tokens=tokens)

        yield from each(prompts, reply, work, at_once=at_once)

    def ask(
        self,
        work: Work,
        body: Mapping[str, Any],
        read: Callable[[bytes], T],
        url: str | None = None,
        *,
        patient_with_500: bool = True,
    ) -> T:
        """What ``read`` makes of the reply to ``body``; asked again while what went wrong may pass.

        ``url`` None is that of chats; an error within the server (500) is of those where a call does not change it.
        Raises ``Refused`` for what the server will not do, ``EndpointError`` when it is
        the server that fails.
        """
        answered_before, attempts, problem = work.answered, 0, ""
        url = url or self.url.rstrip("/") + "/chat/completions"
        while attempts < self.tries and not work.leaving.is_set():
            try:
                return read(self._post(url, body, _MAY_PASS if patient_with_500 else _MAY_PASS - {500}))
            except MayPass as error:
                work.away |= isinstance(_root(error), ConnectionRefusedError)
                attempts, problem = attempts + 1, str(error)
                wait_s = self.first_wait_s * 2 ** (attempts - 1) if error.wait_s is None else error.wait_s
            if attempts < self.tries:
                work.leaving.wait(min(wait_s, _LONGEST_WAIT_S))
        if attempts == self.tries and work.answered > answered_before:  # it is about this request, not about the server
            raise Refused(f"{problem} ({attempts} times, while the server answered others)")
        raise EndpointError(
            f"the endpoint {self.url} failed for good: {problem} (asked {attempts} times). Finished answers are kept; "
            "see to the server and run the same command again"
        )

    def _post(self, url: str, body: Mapping[str, Any], may_pass: frozenset[int]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            said = f"HTTP {error.code} ({error.reason}): {_excerpt(error)}"
            if error.code in may_pass:
                raise MayPass(said, _retry_after(error)) from error
            if error.code in _OF_THIS_REQUEST:
                raise Refused(said) from error
            raise EndpointError(f"the endpoint {self.url} refuses: {said}. Check that address, the model's name "
                                f"{self.model!r} and {KEY_VARIABLE}") from error  # fmt: skip
        except (OSError, HTTPException) as error:  # refused, reset, timed out, cut off
            raise MayPass(f"no reply ({getattr(error, 'reason', None) or error or type(error).__name__})") from error


def _root(error: BaseException) -> BaseException | None:
    """What lies under a request that got no reply."""
    cause = error.__cause__
    return cause.reason if isinstance(cause, urllib.error.URLError) and isinstance(cause.reason, OSError) else cause


def data_uri(image: Path) -> str:
    """The picture as the policy sees it, upright and with its gray levels stretched, as a PNG without metadata."""
    data = io.BytesIO()
    open_image(image).save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def describe_chat(model: str, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
    """What every request for a completion of ``prompt`` says."""
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
    """Completion and its tokens. Raises ``MayPass`` for what is no whole reply, ``Refused`` for one without text."""
    try:
        reply = json.loads(data)
        choice = reply["choices"][0]
        message, finish_reason = choice["message"], choice["finish_reason"]
        text, reasoning = message["content"], message.get("reasoning_content") or message.get("reasoning")
        tokens = reply["usage"]["completion_tokens"]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise MayPass(f"its reply is no chat completion ({type(error).__name__}: {error})") from error
    if finish_reason not in ("stop", "length"):
        raise Refused(f"the server ended the completion with {finish_reason!r}")
    if not isinstance(text, str | None) or not isinstance(reasoning, str | None) or not isinstance(tokens, int):
        raise MayPass("its reply is no chat completion (content or usage are of another type)")
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
