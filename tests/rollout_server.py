"""A server for tests that speaks as vLLM or SGLang do, and runs the policy whose folder it was last handed.

It draws as the rollout engine would at the place that a request's seed stands for, so that a run with it and a run
without it can be compared token by token.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from chat_server import images_of, text_of

from medrl.policy.policy import Policy
from medrl.rollout.chat import draw_seed
from medrl.rollout.engine import generate
from medrl.rollout.sampling import Sampling
from medrl.types import Prompt

Fault = Callable[[str, int], object]
"""(path, how often it was asked for before) -> None, a status, close, half, or a function of the right answer."""


class RolloutServer:
    """``places`` are the (seed, step, prompt id, completion index) that may be asked for."""

    def __init__(self, kind: str, start: Policy, folder: Path, fault: Fault = lambda path, n: None) -> None:
        self.kind, self.start, self.folder, self.fault = kind, start, folder, fault
        self.policy = start
        self.places: dict[int, tuple[int, int, str, int]] = {}
        self.events: list[str] = []
        """Fingerprint of the weights at every hand-over, ``asked`` for every completion, in order."""
        self.counts: dict[str, int] = {}
        self.bodies: list[dict[str, Any]] = []
        self.turn = threading.Lock()
        self.port = 0
        self.http: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def expect(self, seed: int, steps: Sequence[int], prompt_ids: Sequence[str], group_size: int) -> None:
        places = [(seed, s, p, i) for s in steps for p in prompt_ids for i in range(group_size)]
        self.places |= {draw_seed(*place): place for place in places}

    def restart(self, after_s: float) -> None:
        """Be gone, and come back with the weights it was started with."""
        assert self.http is not None
        self.http.shutdown()
        self.http.server_close()
        self.policy = self.start
        self.events.append("restarted")
        threading.Timer(after_s, self.listen).start()

    def listen(self) -> None:
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), handler_of(self))
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any] | None]:
        """Status and body, in the server's own schema; a path that this kind of server lacks is 404."""
        if path == "/v1/chat/completions":
            return 200, self.complete(body)
        if self.kind == "vllm" and path == "/collective_rpc":
            assert body.keys() == {"method", "kwargs"} and body["method"] == "reload_weights"
            self.load(body["kwargs"]["weights_path"])
            return 200, {"results": [None]}
        if self.kind == "vllm" and path in ("/reset_prefix_cache", "/reset_encoder_cache"):
            self.events.append(path)
            return 200, None
        if self.kind == "sglang" and path == "/update_weights_from_disk":
            self.load(body["model_path"])
            return 200, {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}
        return 404, {"detail": "Not Found"}

    def load(self, folder: str) -> None:
        self.policy = Policy.load(folder)
        self.events.append(self.policy.fingerprint())

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.events.append("asked")
        self.bodies.append(body)
        seed, step, prompt_id, index = self.places[body["seed"]]
        paths = []
        for data in images_of(body):
            paths.append(self.folder / f"received-{len(list(self.folder.iterdir()))}.png")
            paths[-1].write_bytes(data)
        prompt = Prompt(id=prompt_id, text=text_of(body), images=tuple(paths), mode="no_think")
        sampling = Sampling(temperature=body["temperature"], max_new_tokens=body["max_tokens"])
        ((*_, drawn),) = generate(self.policy, [prompt], sampling, group_size=index + 1, seed=seed, step=step)
        tokenizer = self.policy.processor.tokenizer
        prompt_ids = self.policy.encode([prompt])[0].token_ids.tolist()
        words = [tokenizer.decode([token]) for token in drawn.token_ids]
        rows = [
            {"token": word, "logprob": logprob, "bytes": list(word.encode()), "top_logprobs": []}
            for word, logprob in zip(words, drawn.sampling_logprobs, strict=True)
        ]
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": tokenizer.decode(drawn.token_ids, skip_special_tokens=True)},
            "logprobs": {"content": rows},
            "finish_reason": drawn.finish_reason,
            "token_ids": list(drawn.token_ids),
        }
        lengths = len(prompt_ids), len(drawn.token_ids)
        usage = {"prompt_tokens": lengths[0], "completion_tokens": lengths[1], "total_tokens": sum(lengths)}
        reply = {"id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": body["model"], "usage": usage}
        # vLLM gives the prompt's tokens once, SGLang with every choice.
        if self.kind == "vllm":
            return {**reply, "choices": [choice], "prompt_token_ids": prompt_ids}
        return {**reply, "choices": [{**choice, "prompt_token_ids": prompt_ids}]}


def handler_of(server: RolloutServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.turn:
                number = server.counts.get(self.path, 0)
                server.counts[self.path] = number + 1
                fault = server.fault(self.path, number)
                if fault == "close":
                    self.connection.close()
                    return
                if fault == "hang":
                    time.sleep(30)
                status, answer = (fault, {"error": "?"}) if isinstance(fault, int) else server.answer(self.path, body)
                answer = fault(answer) if callable(fault) else answer
            data = b"" if answer is None else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if fault == "half" else data)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def running(server: RolloutServer) -> Iterator[RolloutServer]:
    server.listen()
    try:
        yield server
    finally:
        assert server.http is not None
        server.http.shutdown()
        server.http.server_close()
