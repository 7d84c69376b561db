import random
import threading
import time
from pathlib import Path

import pytest
import torch

from medrl.data.prompts import make_prompt
from medrl.errors import DataError, ImageError
from medrl.policy import encoding
from medrl.training.ahead import Ahead
from medrl.types import Prompt


@pytest.fixture
def prompts(make_examples, tmp_path):
    return [make_prompt(example, template="plain") for example in make_examples(tmp_path, 5)]


def test_what_was_prepared_is_what_would_have_been_encoded(make_policy, prompts, monkeypatch):
    expected = make_policy().encode(prompts)
    policy = make_policy()
    threads = set()
    inner = encoding.open_image

    def open_image(path):
        threads.add(threading.current_thread().name)
        return inner(path)

    monkeypatch.setattr(encoding, "open_image", open_image)
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


def test_the_main_threads_operations_keep_all_cores_to_themselves(make_policy, prompts, monkeypatch):
    teams = []
    inner = encoding.open_image

    def open_image(path):
        teams.append(torch.get_num_threads())
        return inner(path)

    monkeypatch.setattr(encoding, "open_image", open_image)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with Ahead(make_policy()) as ahead:
            ahead.start(prompts)
            ahead.wait()
        assert set(teams) == {1}  # a second team of threads would slow every operation of the first
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_an_image_that_cannot_be_read_is_named_where_it_is_waited_for(make_policy, prompts):
    prompts[2].images[0].write_bytes(b"not an image")
    with Ahead(make_policy()) as ahead:
        ahead.start(prompts)
        with pytest.raises(ImageError, match="example-2"):
            ahead.wait()
        ahead.start(prompts[:1])  # and the others are not held up
        ahead.wait()


class Faulty:
    """A policy whose prompts are prepared as their texts say."""

    encoder = None

    def __init__(self) -> None:
        self.prepared: list[str] = []
        self.release = threading.Event()

    def prepare(self, prompt, encoder):
        if prompt.text == "hangs":
            self.release.wait(30)
        elif prompt.text == "dies":
            raise SystemExit
        elif prompt.text == "fails":
            raise OSError(5, "Input/output error")
        elif prompt.text == "is slow":
            time.sleep(0.001)
        self.prepared.append(prompt.id)


def turn(number: int, fate: str) -> Prompt:
    return Prompt(id=f"example-{number}", text=fate, images=(Path(f"image-{number}.png"),), mode="think")


FATES = {"hangs": DataError, "dies": SystemExit, "fails": OSError, "is slow": None, "is fine": None}


def test_fifty_faults_of_workers_end_with_an_error_or_with_every_prompt_ready_never_in_between():
    draw = random.Random(0)
    met = set()
    for _ in range(50):
        policy, fates = Faulty(), draw.choices(list(FATES), weights=[1, 1, 1, 6, 6], k=4)
        prompts = [turn(number, fate) for number, fate in enumerate(fates)]
        expected = [FATES[fate] for fate in fates if FATES[fate]]
        met |= set(fates)
        with Ahead(policy, limit_s=0.05 if "hangs" in fates else 30) as ahead:  # type: ignore[arg-type]
            ahead.start(prompts)
            if expected:
                with pytest.raises(expected[0]):
                    ahead.wait()
            else:
                ahead.wait()
                assert sorted(policy.prepared) == [prompt.id for prompt in prompts]
            policy.release.set()
    assert met == FATES.keys()


def test_a_worker_that_hangs_is_named_with_its_images_and_does_not_hold_the_end_up(monkeypatch):
    monkeypatch.setattr("medrl.training.ahead.GRACE_S", 0.05)
    policy = Faulty()
    with Ahead(policy, workers=1, limit_s=0.05) as ahead:  # type: ignore[arg-type]
        ahead.start([turn(3, "hangs"), turn(4, "is fine")])
        with pytest.raises(DataError, match=r"example-3 is not ready after 0\.05 s \(images: image-3\.png\)"):
            ahead.wait()
    assert policy.prepared == []  # it still hangs, and we are here
    policy.release.set()


def test_the_number_of_workers_changes_nothing(make_policy, prompts):
    expected = make_policy().encode(prompts)
    for workers in (1, 2, 7):
        policy = make_policy()
        with Ahead(policy, workers=workers) as ahead:
            ahead.start(prompts)
            ahead.wait()
        for ours, theirs in zip(policy.encode(prompts), expected, strict=True):
            assert ours.token_ids.equal(theirs.token_ids) and ours.pixels.equal(theirs.pixels)
