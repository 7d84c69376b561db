"""What training asks of a chat server, and what it reads out of the replies of vLLM and SGLang."""

import hashlib
import json
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from medrl.rollout.endpoint import MayPass, Refused, describe_chat
from medrl.rollout.sampling import Sampling
from medrl.types import Prompt


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion as the server gave it."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


def describe_sample(model: str, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
    """What every request for a completion to learn from says: the plain distribution, tokens and log-probabilities."""
    # All that bends the distribution is switched off by name: servers take what is not said from the model's folder.
    plain = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    penalties = {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    wanted = {"logprobs": True, "return_token_ids": True}
    return {**describe_chat(model, prompt, sampling), **plain, **penalties, **wanted}


def draw_seed(seed: int, step: int, prompt_id: str, index: int) -> int:
    """31 bits, a function of where the draw is alone; a server that heeds it draws the same again."""
    digest = hashlib.blake2b(f"{seed}\0{step}\0{prompt_id}\0{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def read_sample(data: bytes) -> Sample:
    """Raises ``MayPass`` for what is no whole reply, ``Refused`` for one that cannot be trained on."""
    try:
        reply = json.loads(data)
        choice = reply["choices"][0]
        finish_reason = choice["finish_reason"]
        token_ids, prompt_ids = choice.get("token_ids"), reply.get("prompt_token_ids") or choice.get("prompt_token_ids")
        logprobs = [float(token["logprob"]) for token in (choice.get("logprobs") or {}).get("content") or []]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise MayPass(f"its reply is no chat completion ({type(error).__name__}: {error})") from error
    if finish_reason == "abort":
        raise MayPass("it aborted the request")
    if finish_reason not in ("stop", "length"):
        raise Refused(f"it ended the completion with {finish_reason!r}")
    if not token_ids or not prompt_ids or not logprobs:
        raise Refused(
            "its reply lacks token_ids, prompt_token_ids or logprobs: use a version that knows return_token_ids in "
            "chat completions (vLLM 0.22, SGLang of August 2026, or later)"
        )
    if len(token_ids) != len(logprobs):
        raise Refused(f"it gave {len(token_ids)} token ids and {len(logprobs)} log-probabilities")
    return Sample(prompt_ids=prompt_ids, token_ids=token_ids, logprobs=logprobs, finish_reason=finish_reason)


def with_one_token_per_image(token_ids: list[int], image_token_id: int) -> list[int]:
    """The prompt as it is before its images are given their room."""
    return [token for token, run in groupby(token_ids) for _ in (range(1) if token == image_token_id else run)]


def first_difference(ours: list[int], theirs: list[int]) -> str:
    """Where two prompts part."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"{len(theirs)} tokens where the policy has {len(ours)}, different from number {at} on"
