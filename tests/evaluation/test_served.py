"""An evaluation behind an endpoint, and one that several processes answer."""

import json
import shutil

import pytest
import torch
from chat_server import ChatServer, chat, images_of, policy_reply, serving

from medrl.data.store import load, write_store
from medrl.errors import EndpointError, RunError, SettingsError
from medrl.evaluation.evaluate import EvalSettings, evaluate, evaluate_store
from medrl.evaluation.shards import Shard, launched_shard, parse_shard
from medrl.rollout.endpoint import Endpoint
from medrl.runs import append_records, read_records, read_summary

SETTINGS = EvalSettings(mode="no_think", template="plain-no-think", max_new_tokens=8, batch_size=2)
OWN = {"started", "seconds", "decode_steps", "endpoint", "served_model"}
"""What the summaries of two evaluations of the same answers may differ in."""


@pytest.fixture(scope="module")
def tiny(make_policy):
    return make_policy(torch.float32)


@pytest.fixture(scope="module")
def test_store(make_examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("stores") / "test"
    write_store(out, make_examples(out.parent / "images", 9), source="noise", license="none")
    return out


@pytest.fixture(scope="module")
def in_process(tiny, test_store, tmp_path_factory):
    settings = SETTINGS.model_copy(update={"option_probs": False})
    out = tmp_path_factory.mktemp("eval") / "after"
    return evaluate_store(tiny, test_store, out=out, model="tiny", settings=settings, quiet=True), out


def start(url: str, test_store, out, settings=SETTINGS, tries: int = 4):
    endpoint = Endpoint(url, "tiny", timeout_s=5, tries=tries, first_wait_s=0.01)
    return evaluate_store(endpoint, test_store, out=out, model="tiny", name="after", settings=settings, quiet=True)


def without_own(summary):
    return {key: value for key, value in summary.items() if key not in OWN}


FAULTS = ("close", 500, "half", 429, 503)


def test_a_server_that_fails_now_and_then_gives_the_answers_of_the_policy_itself(
    in_process, tiny, test_store, tmp_path
):
    (tmp_path / "received").mkdir()
    reply = policy_reply(tiny, tmp_path / "received")
    with serving(ChatServer(reply, lambda n, attempt: FAULTS[n % 5] if attempt < 2 else None)) as server:
        evaluation = start(server.url, test_store, tmp_path / "eval")
    assert len(server.bodies) == 27  # each question was answered at the third attempt
    assert evaluation.records == in_process[0].records
    assert (tmp_path / "eval" / "records.jsonl").read_bytes() == (in_process[1] / "records.jsonl").read_bytes()
    assert without_own(evaluation.summary) == without_own(in_process[0].summary)
    assert (evaluation.summary["endpoint"], evaluation.summary["served_model"]) == (server.url, "tiny")


def test_a_server_that_dies_keeps_what_it_answered_and_the_next_one_is_asked_the_rest(
    in_process, tiny, test_store, tmp_path
):
    (tmp_path / "received").mkdir()
    dying = ChatServer(policy_reply(tiny, tmp_path / "received"), lambda n, _: None if n < 5 else 503)
    with serving(dying) as server:
        with pytest.raises(EndpointError, match="failed for good: HTTP 503"):
            start(server.url, test_store, tmp_path / "eval", tries=2)
        answered = {record.id for record in read_records(tmp_path / "eval")}
        assert len(answered) == 5
        assert not (tmp_path / "eval" / "summary.json").exists()
        server.fault = lambda n, _: None
        before = len(server.bodies)
        evaluation = start(server.url, test_store, tmp_path / "eval")
        assert len(server.bodies) - before == 4
        start(server.url, test_store, tmp_path / "eval")
        assert len(server.bodies) - before == 4  # finished: nobody is asked
        with pytest.raises(RunError, match="answers given with other served_model"):
            evaluate_store(
                Endpoint(server.url, "other"), test_store, out=tmp_path / "eval", model="tiny", settings=SETTINGS
            )
    assert evaluation.records == in_process[0].records


def test_a_refused_question_is_named_and_the_others_are_kept(tiny, test_store, tmp_path):
    with serving(ChatServer(lambda body: chat("A"), lambda n, _: 400 if n == 3 else None)) as server:
        with pytest.raises(EndpointError, match=r"refused 1 of 9 questions \(for one, example-\d: HTTP 400"):
            start(server.url, test_store, tmp_path / "eval", SETTINGS.model_copy(update={"batch_size": 1}))
        assert len(read_records(tmp_path / "eval")) == 8
        evaluation = start(server.url, test_store, tmp_path / "eval")
    assert [record.id for record in evaluation.records] == [example.id for example in load(test_store)]


def test_samples_are_asked_of_a_server_too(test_store, tmp_path):
    def odd_or_even(body):
        return chat("<answer>A</answer>" if body["seed"] % 4 else "<answer>B</answer>", tokens=body["seed"] % 7)

    settings = SETTINGS.model_copy(update={"samples": 5})
    with serving(ChatServer(odd_or_even)) as server:
        evaluation = start(server.url, test_store, tmp_path / "eval", settings)
    assert len(server.bodies) == 45
    assert all(len(record.samples) == 5 for record in evaluation.records)
    assert evaluation.summary["pass@k"].keys() == {"1", "2", "4", "5"}
    lengths = {one.tokens for record in evaluation.records for one in record.samples}
    assert len(lengths) > 3  # as the server counted them


def test_the_pictures_of_a_store_are_what_the_server_gets(test_store, tmp_path):
    with serving(ChatServer(lambda body: chat("A"))) as server:
        start(server.url, test_store, tmp_path / "eval")
    assert len({images_of(body)[0] for body in server.bodies}) == 9


def shard(tiny, test_store, out, text: str | None):
    settings = SETTINGS.model_copy(update={"option_probs": False})
    part = parse_shard(text) if text else None
    return evaluate_store(
        tiny, test_store, out=out, model="tiny", name="after", settings=settings, shard=part, quiet=True
    )


@pytest.mark.parametrize("order", [("1/3", "2/3", "3/3"), ("3/3", "1/3", "2/3")])
def test_the_last_shard_to_finish_leaves_what_one_process_would_have_left(
    in_process, tiny, test_store, tmp_path, order
):
    found = [shard(tiny, test_store, tmp_path / "eval", text) for text in order]
    assert [evaluation.unanswered for evaluation in found] == [6, 3, 0]
    assert found[-1].records == in_process[0].records
    assert (tmp_path / "eval" / "records.jsonl").read_bytes() == (in_process[1] / "records.jsonl").read_bytes()
    assert without_own(read_summary(tmp_path / "eval")) == without_own(read_summary(in_process[1]))
    parts = [read_records(tmp_path / "eval" / "shards" / f"{index}-of-3") for index in (1, 2, 3)]
    assert [len(part) for part in parts] == [3, 3, 3]


def test_a_lone_process_takes_over_what_shards_have_answered(in_process, tiny, test_store, tmp_path):
    shard(tiny, test_store, tmp_path / "eval", "2/3")
    own = tmp_path / "eval" / "shards" / "2-of-3" / "records.jsonl"
    own.write_bytes(own.read_bytes()[:-20])  # it was killed in the middle of a line
    evaluation = shard(tiny, test_store, tmp_path / "eval", None)
    assert evaluation.records == in_process[0].records
    assert read_records(tmp_path / "eval") == evaluation.records


def test_a_shard_of_other_answers_is_refused(in_process, tiny, test_store, make_policy, tmp_path):
    shard(tiny, test_store, tmp_path / "eval", "1/3")
    with pytest.raises(RunError, match="other weights"):
        shard(make_policy(torch.float32, seed=1), test_store, tmp_path / "eval", "2/3")
    foreign = tmp_path / "eval" / "shards" / "3-of-3"
    shutil.copytree(tmp_path / "eval" / "shards" / "1-of-3", foreign)
    records = [json.loads(line) for line in (foreign / "records.jsonl").read_text().splitlines()]
    (foreign / "records.jsonl").write_text("".join(json.dumps({**r, "id": f"other-{r['id']}"}) + "\n" for r in records))
    with pytest.raises(RunError, match="records of other prompts"):
        shard(tiny, test_store, tmp_path / "eval", "2/3")


def test_shards_divide_the_questions_among_them(monkeypatch):
    items = list(range(11))
    parts = [Shard(index, 4).of(items) for index in (1, 2, 3, 4)]
    assert sorted(item for part in parts for item in part) == items
    assert {len(part) for part in parts} == {2, 3}
    for text in ("0/4", "5/4", "1", "1/0", "a/b", "-1/4", "1/4/2"):
        with pytest.raises(SettingsError, match="shard"):
            parse_shard(text)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched_shard() is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert launched_shard() == Shard(1, 4)


def test_records_in_any_order_end_in_that_of_the_examples(in_process, tiny, test_store, tmp_path):
    out = tmp_path / "eval"
    append_records(out, in_process[0].records[:5][::-1])
    settings = SETTINGS.model_copy(update={"option_probs": False})
    evaluate(tiny, load(test_store), out=out, root=test_store, settings=settings, quiet=True)
    assert (out / "records.jsonl").read_bytes() == (in_process[1] / "records.jsonl").read_bytes()
