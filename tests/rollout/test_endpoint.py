import base64
import hashlib
import io

import numpy as np
import pytest
from chat_server import ChatServer, chat, images_of, serving, text_of
from PIL import Image

from medrl.data.prompts import make_prompt
from medrl.errors import EndpointError, SettingsError
from medrl.rollout.endpoint import Endpoint, data_uri
from medrl.rollout.sampling import Sampling

GREEDY = Sampling(temperature=0.0, max_new_tokens=8)


@pytest.fixture(scope="module")
def prompts(make_examples, tmp_path_factory):
    return [make_prompt(row, "no_think") for row in make_examples(tmp_path_factory.mktemp("images"), 12)]


def echo(body):
    """What was asked about, in a word."""
    return chat(digest(images_of(body)[0]), tokens=5)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def sent(prompt) -> bytes:
    return base64.b64decode(data_uri(prompt.images[0]).partition(",")[2])


def ask(server, prompts, sampling=GREEDY, **options):
    """Replies by prompt id, of a server that is asked impatiently."""
    settings = {"timeout_s": 1.0, "first_wait_s": 0.01, **options}
    endpoint = Endpoint(server.url, "tiny", **{k: v for k, v in settings.items() if k in Endpoint.__slots__})
    call = {k: v for k, v in settings.items() if k not in Endpoint.__slots__}
    return {reply.prompt.id: reply for reply in endpoint.complete(prompts, sampling, **{"at_once": 3, **call})}


def test_every_prompt_gets_its_own_completion(prompts):
    with serving(ChatServer(echo)) as server:
        replies = ask(server, prompts)
    assert replies.keys() == {prompt.id for prompt in prompts}
    for prompt in prompts:
        (completion,) = replies[prompt.id].completions
        assert (completion.text, completion.mode, completion.finish_reason) == (
            digest(sent(prompt)),
            "no_think",
            "stop",
        )
        assert replies[prompt.id].tokens == (5,)


def test_what_is_sent_is_the_question_and_the_picture_and_nothing_that_names_them(prompts, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    with serving(ChatServer(echo)) as server:
        ask(server, prompts[:1])
    (body,) = server.bodies
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("tiny", 8, 0.0)
    assert "seed" not in body
    assert text_of(body) == prompts[0].text
    (data,) = images_of(body)
    received, original = Image.open(io.BytesIO(data)), Image.open(prompts[0].images[0])
    assert np.array_equal(np.asarray(received), np.asarray(original.convert("RGB")))
    assert prompts[0].id not in str(body) and prompts[0].images[0].name not in str(body)
    assert server.headers[0]["Authorization"] == "Bearer sesame"


def test_an_image_is_sent_upright_and_without_its_metadata(tmp_path):
    image = Image.new("RGB", (30, 20), (10, 200, 30))
    exif = image.getexif()
    exif[0x0112], exif[0x010E] = 6, "DOE^JANE"  # lies on its side; a description
    image.save(tmp_path / "a.jpg", exif=exif)
    data = base64.b64decode(data_uri(tmp_path / "a.jpg").partition(",")[2])
    assert b"DOE" not in data
    picture = Image.open(io.BytesIO(data))
    assert picture.size == (20, 30) and not picture.getexif()


FAULTS = ("close", 500, "half", 429, "empty", 503, "odd", 408)


def test_a_server_that_fails_now_and_then_loses_no_prompt(prompts):
    with serving(ChatServer(echo, lambda n, attempt: FAULTS[n % len(FAULTS)] if attempt < 2 else None)) as server:
        replies = ask(server, prompts)
    assert {id: reply.completions[0].text for id, reply in replies.items()} == {p.id: digest(sent(p)) for p in prompts}
    assert len(server.bodies) == 36  # each was answered at the third attempt


def test_a_server_that_hangs_is_asked_again(prompts):
    with serving(ChatServer(echo, lambda n, _: "hang" if n == 1 else None)) as server:
        replies = ask(server, prompts[:4], timeout_s=0.3)
    assert len(replies) == 4 and len(server.bodies) == 5


def test_the_wait_doubles_unless_the_server_names_one(prompts, monkeypatch):
    waits = []
    monkeypatch.setattr("threading.Event.wait", lambda self, seconds=None: waits.append(seconds) or True)
    with serving(ChatServer(echo, lambda n, _: (500, 500, 429, 500, None)[n])) as server:
        endpoint = Endpoint(server.url, "tiny", first_wait_s=0.5)
        list(endpoint.complete(prompts[:1], GREEDY, at_once=1))
    assert [wait for wait in waits if wait is not None and wait not in (0.01, 0.2)][:4] == [0.5, 1.0, 0.0, 4.0]


def test_a_server_that_is_gone_ends_with_what_was_answered_before(prompts):
    with serving(ChatServer(echo, lambda n, _: None if n < 5 else 500)) as server:
        found = []
        with pytest.raises(EndpointError, match=r"failed for good: HTTP 500.*asked 3 times.*same command again"):
            endpoint = Endpoint(server.url, "tiny", tries=3, first_wait_s=0.01)
            for reply in endpoint.complete(prompts, GREEDY, at_once=1):
                found.append(reply.prompt.id)
    assert found == [prompt.id for prompt in prompts[:5]]
    assert len(server.bodies) == 5 + 3
    with pytest.raises(EndpointError, match="no reply"):
        ask(server, prompts[:1], tries=2)


def test_a_request_that_alone_fails_is_reported_and_the_others_go_on(prompts):
    bad = prompts[3]

    def reply(body):
        return {"choices": []} if images_of(body)[0] == sent(bad) else echo(body)

    with serving(ChatServer(reply)) as server:
        replies = ask(server, prompts, tries=3)
    assert [id for id, found in replies.items() if found.refusal] == [bad.id]
    assert "3 times, while the server answered others" in replies[bad.id].refusal
    assert len(replies) == len(prompts)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_not_asked_again_and_the_others_go_on(prompts, status):
    with serving(ChatServer(echo, lambda n, _: status if n == 2 else None)) as server:
        replies = ask(server, prompts, at_once=1)
    assert [id for id, reply in replies.items() if reply.refusal] == [prompts[2].id]
    assert f"HTTP {status}" in replies[prompts[2].id].refusal and "made to fail" in replies[prompts[2].id].refusal
    assert len(server.bodies) == len(prompts)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_everybody_is_asked_once(prompts, status):
    with (
        serving(ChatServer(echo, lambda n, _: status)) as server,
        pytest.raises(EndpointError, match=f"refuses: HTTP {status}.*that address.*'tiny'.*OPENAI_API_KEY"),
    ):
        ask(server, prompts, at_once=1)
    assert len(server.bodies) == 1


def test_reasoning_that_the_server_took_out_is_put_back(prompts):
    with serving(ChatServer(lambda body: chat("<answer>B</answer>", reasoning_content="It is dark."))) as server:
        (reply,) = ask(server, prompts[:1]).values()
    assert reply.completions[0].text == "<think>It is dark.</think><answer>B</answer>"


def test_a_completion_that_was_filtered_is_refused_and_one_cut_off_is_not(prompts):
    with serving(ChatServer(lambda body: chat("I", finish_reason="content_filter"))) as server:
        (reply,) = ask(server, prompts[:1]).values()
    assert "content_filter" in reply.refusal
    with serving(ChatServer(lambda body: chat("I", finish_reason="length"))) as server:
        (reply,) = ask(server, prompts[:1]).values()
    assert reply.completions[0].truncated


def test_samples_have_seeds_of_their_own_that_a_second_call_repeats(prompts):
    warm = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=8)
    with serving(ChatServer(echo)) as server:
        replies = ask(server, prompts[:3], warm, group_size=4, seed=5)
        first = sorted(body["seed"] for body in server.bodies)
        ask(server, prompts[:3], warm, group_size=4, seed=5)
        again = sorted(body["seed"] for body in server.bodies[12:])
        ask(server, prompts[:3], warm, group_size=4, seed=6)
    assert all(len(reply.completions) == 4 for reply in replies.values())
    assert len(set(first)) == 12 and first == again
    assert not set(first) & {body["seed"] for body in server.bodies[24:]}
    assert {(body["temperature"], body["top_p"]) for body in server.bodies} == {(0.7, 0.9)}


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "file:///etc/passwd"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(SettingsError, match="http://localhost:8000/v1"):
        Endpoint(url, "tiny")


@pytest.mark.parametrize("url", ["http://me:secret@host:8/v1", "https://host/v1?key=secret"])
def test_an_address_with_a_key_in_it_is_refused_without_repeating_the_key(url):
    with pytest.raises(SettingsError, match="OPENAI_API_KEY") as refused:
        Endpoint(url, "tiny")
    assert "secret" not in str(refused.value)
