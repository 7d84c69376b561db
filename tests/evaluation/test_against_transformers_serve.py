"""Behind `transformers serve`, a real server, greedy answers are those of the policy in this process."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from medrl.data.demo import build_examples
from medrl.data.store import write_store
from medrl.evaluation.evaluate import EvalSettings, evaluate_store
from medrl.policy.loading import resolve_model
from medrl.policy.policy import Policy
from medrl.rollout.endpoint import Endpoint

NEEDED = ("fastapi", "uvicorn", "openai")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED),
        reason="needs pip install 'transformers[serving]'",
    ),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    code = "from transformers.cli.transformers import main; main()"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    log = (tmp_path_factory.mktemp("serve") / "log.txt").open("w+")
    server = subprocess.Popen([sys.executable, "-c", code, *words], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                assert server.poll() is None, Path(log.name).read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()
        log.close()


@pytest.mark.parametrize(("mode", "template"), [("think", "plain"), ("no_think", "plain-no-think")])
def test_greedy_answers_are_those_of_the_policy_in_this_process(url, tmp_path, mode, template):
    examples = build_examples("test", 12, seed=0, folder=tmp_path / "images")
    write_store(tmp_path / "store", examples, source="demo", license="none")
    settings = EvalSettings(mode=mode, template=template, max_new_tokens=64, batch_size=4, option_probs=False)
    model = resolve_model("demo-base")
    ours, theirs = (
        evaluate_store(policy, tmp_path / "store", out=tmp_path / name, model=model, settings=settings, quiet=True)
        for name, policy in (("ours", Policy.load(model)), ("theirs", Endpoint(url, model, timeout_s=120)))
    )
    assert [r.completion for r in theirs.records] == [r.completion for r in ours.records]
    assert [r.answer for r in theirs.records] == [r.answer for r in ours.records]
    assert len({record.completion for record in ours.records}) > 3
