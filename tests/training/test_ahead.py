import threading

import pytest

from medrl.data.prompts import make_prompt
from medrl.errors import ImageError
from medrl.policy import policy as policy_module
from medrl.training.ahead import Ahead


@pytest.fixture
def prompts(make_examples, tmp_path):
    return [make_prompt(example, template="plain") for example in make_examples(tmp_path, 5)]


def test_what_was_prepared_is_what_would_have_been_encoded(make_policy, prompts, monkeypatch):
    expected = make_policy().encode(prompts)
    policy = make_policy()
    threads = set()
    inner = policy_module.open_image

    def open_image(path):
        threads.add(threading.current_thread().name)
        return inner(path)

    monkeypatch.setattr(policy_module, "open_image", open_image)
    with Ahead(policy) as ahead:
        ahead.start(prompts)
        ahead.wait()
        assert threads and threading.main_thread().name not in threads
        threads.clear()
        found = policy.encode(prompts)
        assert threads == set()  # nothing was opened again
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids.equal(theirs.token_ids) and ours.positions.equal(theirs.positions)
        assert ours.pixels is not None and theirs.pixels is not None and ours.pixels.equal(theirs.pixels)


def test_the_main_thread_may_use_the_tokenizer_meanwhile(make_policy, prompts):
    policy = make_policy()
    with Ahead(policy) as ahead:
        for _ in range(5):
            policy.forget_prompts()
            ahead.start(prompts)
            for _ in range(20):
                policy.tokenize("which modality was used")
                policy.decode([20, 21, 22])
            ahead.wait()


def test_an_image_that_cannot_be_read_is_named_where_it_is_waited_for(make_policy, prompts):
    prompts[2].images[0].write_bytes(b"not an image")
    with Ahead(make_policy()) as ahead:
        ahead.start(prompts)
        with pytest.raises(ImageError, match="example-2"):
            ahead.wait()
        ahead.start(prompts[:1])  # and the others are not held up
        ahead.wait()
