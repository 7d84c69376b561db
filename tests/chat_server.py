"""A chat server for tests: real HTTP in a thread, a policy or a rule behind it, and faults where a test wants them."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from medrl.policy.policy import Policy
from medrl.rollout.engine import generate
from medrl.rollout.sampling import Sampling
from medrl.types import Prompt

Reply = Callable[[dict[str, Any]], dict[str, Any]]
"""Body of a request -> body of the reply."""


class ChatServer:
    """``fault(n, attempt)`` says what the n-th request meets, the ``attempt``-th of its kind, both from 0: None, a
    status, or close, half, hang, empty, odd."""

    def __init__(self, reply: Reply, fault: Callable[[int, int], object] = lambda n, attempt: None) -> None:
        self.reply, self.fault = reply, fault
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.url = ""


@contextmanager
def serving(server: ChatServer) -> Iterator[ChatServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                number, attempt = len(server.bodies), server.bodies.count(body)
                server.bodies.append(body)
                server.headers.append(dict(self.headers))
            fault = server.fault(number, attempt)
            if fault == "close":
                self.connection.close()
                return
            if fault == "hang":
                time.sleep(2)
                return
            status = fault if isinstance(fault, int) else 200
            if isinstance(fault, int):
                answer = {"error": {"message": "made to fail"}}
            else:
                answer = {"empty": {}, "odd": {"choices": [{"message": "?"}]}}.get(str(fault)) or server.reply(body)
            data = json.dumps({} if fault == "empty" else answer).encode()
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "0")
            cut = data[: len(data) // 2] if fault == "half" else data
            self.send_header("Content-Length", str(len(cut if fault == "half" else data)))
            self.end_headers()
            self.wfile.write(cut)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def chat(text: str | None, finish_reason: str = "stop", tokens: int = 3, **message: Any) -> dict[str, Any]:
    """The body of a reply."""
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text, **message}}
    return {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 9 + tokens}}


def text_of(body: dict[str, Any]) -> str:
    """What was asked."""
    return body["messages"][0]["content"][-1]["text"]


def images_of(body: dict[str, Any]) -> list[bytes]:
    """The files that were sent."""
    uris = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    assert all(uri.startswith("data:image/png;base64,") for uri in uris)
    return [base64.b64decode(uri.partition(",")[2]) for uri in uris]


def policy_reply(policy: Policy, folder: Path) -> Reply:
    """What ``policy`` writes, one request at a time."""
    turn = threading.Lock()

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        with turn:
            paths = []
            for number, data in enumerate(images_of(body)):
                paths.append(folder / f"received-{len(list(folder.iterdir()))}-{number}.png")
                paths[-1].write_bytes(data)
            prompt = Prompt(id="asked", text=text_of(body), images=tuple(paths), mode="think")
            sampling = Sampling(temperature=body["temperature"], max_new_tokens=body["max_tokens"])
            ((completion,),) = generate(policy, [prompt], sampling, seed=body.get("seed", 0))
            return chat(completion.text, completion.finish_reason, len(completion.token_ids))

    return reply
