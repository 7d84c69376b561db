"""Completions to learn from, by a vLLM or SGLang server that holds the policy's weights: tokens, log-probabilities.

    server = Server(Rollouts(endpoint="http://localhost:8000/v1"), sampling, run.path / "served")
    server.give(policy, step)                       # once per step, before the server is asked
    server.generate(policy, prompts, sampling, group_size=8, seed=seed, step=step)     # as engine.generate

Weights travel through a folder that the server reads under the same path. Nothing is taken on trust: a server that did
not take the weights, tokenizes a prompt otherwise, or cuts a completion short ends the run with the reason.
"""

import json
import logging
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors import SafetensorError

from medrl.errors import EndpointError, RunError, SettingsError
from medrl.policy.policy import EncodedPrompt, Policy
from medrl.rollout.chat import (
    Sample,
    describe_sample,
    draw_seed,
    first_difference,
    read_sample,
    with_one_token_per_image,
)
from medrl.rollout.endpoint import Endpoint, MayPass, Refused
from medrl.rollout.requests import Work, each
from medrl.rollout.sampling import Sampling
from medrl.settings import Settings
from medrl.types import Completion, Prompt

log = logging.getLogger(__name__)
TRIES = 10
"""Attempts before a request counts as failed: with their waits, four minutes in which a server may be started again."""
AT_ONCE = 128
"""Requests under way: a server fills its batch from them."""
RETURNS = 3
"""Times within one step that a server may be gone and come back."""


class Rollouts(Settings):
    """Who writes the completions that a run learns from: the training process itself, or a server."""

    endpoint: str | None = None
    """Base address of a vLLM or SGLang server, e.g. ``http://localhost:8000/v1``; None: the training process writes."""
    server: Literal["vllm", "sglang"] = "vllm"
    """What runs there: how it is handed new weights."""
    model: str = "policy"
    """Name of the model there (``--served-model-name``)."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Longest wait for one completion, and for new weights to be loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOver:
    """How a kind of server is handed new weights."""

    calls: Callable[[str], list[tuple[str, dict[str, Any]]]]
    """Folder of the weights -> paths below the server's root and what is posted there, in order."""
    fix: str


HAND_OVERS: dict[str, HandOver] = {
    # What was computed with the old weights is forgotten: keys and values of prompts, features of images.
    "vllm": HandOver(
        calls=lambda folder: [
            ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}),
            ("/reset_prefix_cache", {}),
            ("/reset_encoder_cache", {}),
        ],
        fix="start vLLM (0.22 or later) with VLLM_SERVER_DEV_MODE=1, which opens the calls that load weights",
    ),
    "sglang": HandOver(
        calls=lambda folder: [("/update_weights_from_disk", {"model_path": folder})],
        fix="look at SGLang's own log",
    ),
}


class Server:
    """A server, and the weights it was last given.

    Raises ``SettingsError`` for an address that is none, and for sampling whose log-probabilities servers report
    differently.
    """

    def __init__(self, settings: Rollouts, sampling: Sampling, folder: Path) -> None:
        assert settings.endpoint is not None
        if (sampling.temperature, sampling.top_p, sampling.top_k) != (1.0, 1.0, 0):
            raise SettingsError(
                f"sampling has temperature {sampling.temperature:g}, top_p {sampling.top_p:g} and top_k "
                f"{sampling.top_k}, but with rollout.endpoint it must be 1, 1 and 0: servers differ in whether their "
                "log-probabilities are those before or after these, so the correction could not be trusted"
            )
        self.endpoint = Endpoint(settings.endpoint, settings.model, timeout_s=settings.timeout_s, tries=TRIES)
        self.hand_over = HAND_OVERS[settings.server]
        self.folder = folder.absolute()
        """Holds the weights that the server was given last."""
        self.given: Path | None = None

    def give(self, policy: Policy, step: int) -> Path:
        """Write the policy's weights and have the server load them; returns where they lie.

        The name is new each time: a server may keep what it once read from a path. Raises ``EndpointError`` when it did
        not take them, ``RunError`` when they cannot be written.
        """
        weights = self.folder / f"step-{step:06d}-{uuid.uuid4().hex[:8]}"
        try:
            policy.save(weights)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(weights, ignore_errors=True)
            raise RunError(
                f"the weights for the server cannot be written to {weights}: {error}; make room there, then continue "
                "with --resume auto"
            ) from error
        self.load(weights)
        for old in self.folder.iterdir():
            if old != weights:
                shutil.rmtree(old)
        return weights

    def load(self, weights: Path) -> None:
        """Have the server load weights that were written before, and forget what it computed with others."""
        for _ in range(RETURNS):
            away = [self._call(path, body, weights) for path, body in self.hand_over.calls(str(weights))]
            if not any(away):
                self.given = weights
                return
        raise self._comes_and_goes()

    def _call(self, path: str, body: Mapping[str, Any], weights: Path) -> bool:
        """Post one call of the hand-over; returns whether the server was gone meanwhile."""
        root, work = self.endpoint.url.rstrip("/").removesuffix("/v1"), Work()

        def post(url: str) -> None:
            self.endpoint.ask(work, body, _check_taken, url, patient_with_500=False)

        try:
            list(each([root + path], post, work, at_once=1))
        except (EndpointError, Refused) as error:
            raise EndpointError(
                f"the server {root} did not take the policy's new weights from {weights} ({path}: {error}). It must be "
                f"of the kind that rollout.server says and read that folder under the same path; {self.hand_over.fix}. "
                "Then continue with --resume auto"
            ) from error
        return work.away

    def generate(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        group_size: int = 1,
        seed: int = 0,
        step: int = 0,
    ) -> list[list[Completion]]:
        """What ``engine.generate`` gives, written by the server with the weights it was given last.

        Raises ``EndpointError`` naming the example when a completion cannot be had; none is ever left out.
        """
        assert self.given is not None
        encoded = policy.encode(prompts, room_tokens=sampling.max_new_tokens)
        bodies = [describe_sample(self.endpoint.model, prompt, sampling) for prompt in prompts]
        places = [(n, i) for n in range(len(prompts)) for i in range(group_size)]
        for _ in range(RETURNS):
            work = Work()

            def ask(place: tuple[int, int], work: Work = work) -> tuple[tuple[int, int], Sample]:
                n, i = place
                body = {**bodies[n], "seed": draw_seed(seed, step, prompts[n].id, i)}
                try:
                    sample = self.endpoint.ask(work, body, read_sample)
                except Refused as refusal:
                    raise EndpointError(
                        f"the server {self.endpoint.url} gave no completion for example {prompts[n].id}: {refusal}. "
                        "See to that, then continue with --resume auto"
                    ) from refusal
                work.answered += 1
                return place, sample

            found = dict(each(places, ask, work, at_once=AT_ONCE))
            if not work.away:
                return [
                    [self._check(policy, prompts[n], encoded[n], found[n, i], sampling) for i in range(group_size)]
                    for n in range(len(prompts))
                ]
            # Started again, it has the weights it was started with, and nothing that it then wrote can be told apart.
            log.warning("%s was gone for a while: it gets the weights again, and is asked anew", self.endpoint.url)
            self.load(self.given)
        raise self._comes_and_goes()

    def _comes_and_goes(self) -> EndpointError:
        return EndpointError(
            f"the server {self.endpoint.url} was gone and came back {RETURNS} times within one step: look at its log, "
            "then continue with --resume auto"
        )

    def _check(
        self, policy: Policy, prompt: Prompt, encoded: EncodedPrompt, sample: Sample, sampling: Sampling
    ) -> Completion:
        """The completion, where the server read what the policy would have read and let it finish."""
        ours = encoded.token_ids.tolist()
        if sample.prompt_ids not in (ours, with_one_token_per_image(ours, policy.family.image_token_id)):
            raise EndpointError(
                f"the server {self.endpoint.url} reads the prompt of example {prompt.id} otherwise: "
                f"{first_difference(ours, sample.prompt_ids)}. Start it with the policy's own folder (chat template, "
                "processor) and the same min_pixels and max_pixels"
            )
        ended = sample.token_ids[-1] in policy.stop_token_ids
        if ended != (sample.finish_reason == "stop") or not (ended or len(sample.token_ids) == sampling.max_new_tokens):
            raise EndpointError(
                f"the server {self.endpoint.url} ended the completion of example {prompt.id} after "
                f"{len(sample.token_ids)} tokens ('{sample.finish_reason}'), neither at the end of the policy's "
                f"turn nor at sampling.max_new_tokens={sampling.max_new_tokens}: start it with a longer context and "
                "without stop words of its own"
            )
        return Completion(
            text=policy.decode(sample.token_ids),
            token_ids=tuple(sample.token_ids),
            finish_reason="stop" if ended else "length",
            mode=prompt.mode,
            sampling_logprobs=tuple(sample.logprobs),
        )


def _check_taken(data: bytes) -> None:
    """Raises ``Refused`` when the reply to an update says that it failed."""
    try:
        reply = json.loads(data) if data.strip() else {}
    except ValueError as error:
        raise MayPass(f"its reply is no JSON ({error})") from error
    if isinstance(reply, dict) and reply.get("success") is False:
        raise Refused(str(reply.get("message") or "it says that it failed"))
