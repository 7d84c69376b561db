"""`medrl eval` from outside: servers, parts, samples, several wordings; and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from chat_server import ChatServer, chat, policy_reply, serving
from typer.testing import CliRunner

from medrl.cli import app
from medrl.data.store import write_store
from medrl.runs import read_records, read_summary

ASK = ("--template", "plain", "--max-new-tokens", 8)


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(code: int, *arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stderr


@pytest.fixture(scope="module")
def home(make_policy, make_examples, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    make_policy(torch.float32).save(home / "model")
    write_store(home / "store", make_examples(home / "raw", 10), source="noise", license="none")
    return home


@pytest.fixture(scope="module")
def greedy(home):
    result = run("eval", home / "model", home / "store", "--out", home / "greedy", *ASK)
    assert result.exit_code == 0, result.output
    return read_records(home / "greedy")


def test_a_server_is_asked_by_its_models_name_alone(home, greedy, make_policy, tmp_path):
    (tmp_path / "received").mkdir()
    reply = policy_reply(make_policy(torch.float32), tmp_path / "received")
    with serving(ChatServer(reply, lambda n, attempt: 429 if n % 3 == 0 and not attempt else None)) as server:
        words = ("--endpoint", server.url, "--model", "tiny", home / "store", "--out", tmp_path / "a", *ASK)
        result = run("eval", *words)
        assert result.exit_code == 0, result.output
        result = run("eval", home / "model", home / "store", "--endpoint", server.url, "--out", tmp_path / "b", *ASK)
        assert result.exit_code == 0, result.output
        assert {body["model"] for body in server.bodies} == {"tiny", str(home / "model")}
    for out in ("a", "b"):
        assert [r.completion for r in read_records(tmp_path / out)] == [r.completion for r in greedy]


def test_a_server_that_fails_for_good_ends_in_exit_code_1_and_keeps_what_was_answered(home, tmp_path):
    server = ChatServer(lambda body: chat("A"), lambda n, _: 403 if n >= 4 else None)
    with serving(server):
        words = ("--endpoint", server.url, "--model", "tiny", home / "store", "--out", tmp_path / "eval")
        said = fails(1, "eval", *words, "--batch-size", 1)
    assert "refuses: HTTP 403" in said and "OPENAI_API_KEY" in said
    assert len(read_records(tmp_path / "eval")) == 4


def test_parts_are_put_together_by_the_last(home, greedy, tmp_path):
    for index in (2, 1):
        words = ("eval", home / "model", home / "store", "--shard", f"{index}/2", "--out", tmp_path / "eval", *ASK)
        result = run(*words)
        assert result.exit_code == 0, result.output
        assert ("5 questions are left to other shards" in result.stderr) == (index == 2)
    assert read_records(tmp_path / "eval") == greedy
    assert "no shard 5/4" in fails(2, *words[:4], "5/4", *words[5:])


def test_samples_show_pass_at_k(home, tmp_path):
    words = ("--samples", 3, "--temperature", 0.8, "--seed", 4)
    result = run("eval", home / "model", home / "store", "--out", tmp_path / "eval", *ASK, *words)
    assert result.exit_code == 0, result.output
    assert "majority of 3" in result.stdout and "pass@2" in result.stdout
    assert read_summary(tmp_path / "eval")["sampling"]["temperature"] == 0.8


def test_several_wordings_are_asked_in_one_run(home, greedy, tmp_path):
    words = ("--template", "plain", "--template", "plain-no-think", "--template", "medvlm-r1", "--max-new-tokens", 8)
    result = run("eval", home / "model", home / "store", "--out", tmp_path / "eval", *words)
    assert result.exit_code == 0, result.output
    assert read_records(tmp_path / "eval" / "plain") == greedy
    assert {record.mode for record in read_records(tmp_path / "eval" / "plain-no-think")} == {"no_think"}
    found = json.loads((tmp_path / "eval" / "templates.json").read_text())
    assert found["templates"].keys() == {"plain", "plain-no-think", "medvlm-r1"}
    values = [accuracy["value"] for accuracy in found["templates"].values()]
    assert found["spread"] == max(values) - min(values)
    assert found["right_in_all"]["value"] <= min(values) and found["right_in_any"]["value"] >= max(values)
    assert run("report", *(tmp_path / "eval").glob("*/"), "--out", tmp_path / "report.html").exit_code == 0


def test_words_that_mean_nothing_are_refused(home, tmp_path):
    out = ("--out", tmp_path / "eval")
    assert "--endpoint" in fails(2, "eval", home / "model", home / "store", "--model", "tiny", *out)
    assert "model and a store" in fails(2, "eval", home / "model", *out)
    behind = ("--endpoint", "http://localhost:1/v1", "--model", "tiny", home / "store", *out)
    assert "--dtype, --max-pixels cannot be chosen" in fails(
        2, "eval", *behind, "--dtype", "float32", "--max-pixels", 9
    )
    assert "all the same" in fails(2, "eval", home / "model", home / "store", "--samples", 2, "--temperature", 0, *out)
    assert not (tmp_path / "eval").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_ten_moments_it_ends_as_if_nothing_had_happened(home, greedy, tmp_path):
    out = tmp_path / "eval"
    words = [sys.executable, "-m", "medrl", "eval", str(home / "model"), str(home / "store"), "--out", str(out)]
    words += [*map(str, ASK), "--batch-size", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for lines in (1, 1, 2, 3, 4, 5, 6, 7, 8, 9):
        process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if (out / "records.jsonl").exists() and (out / "records.jsonl").read_bytes().count(b"\n") >= lines:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.005)
    assert subprocess.run(words, env=environment, capture_output=True).returncode == 0
    assert read_records(out) == greedy
    assert (out / "records.jsonl").read_bytes() == (home / "greedy" / "records.jsonl").read_bytes()
