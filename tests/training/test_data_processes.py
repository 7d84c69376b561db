"""Processes that encode prompts: the same bits, the same errors, and nothing left behind however either side ends."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFile

from medrl import errors
from medrl.data.images import open_image
from medrl.data.prompts import make_prompt
from medrl.errors import DataError, ImageError, MedrlError, MissingExtraError
from medrl.evaluation.evaluate import evaluate
from medrl.evaluation.settings import EvalSettings
from medrl.grpo import GRPO
from medrl.policy import encoding, encoding_process
from medrl.policy.channel import ClosedError, receive, send
from medrl.policy.encoding import Encoder
from medrl.policy.encoding_process import EncodingProcess
from medrl.policy.encoding_worker import describe
from medrl.policy.policy import Policy
from medrl.training.ahead import Ahead, choose_processes
from medrl.training.train import train
from medrl.types import Prompt


def turn(id: str, *images: Path, text: str = "Which modality was used?") -> Prompt:
    return Prompt(id=id, text=text, images=images, mode="think")


@pytest.fixture(scope="module")
def any_size(make_policy):
    """A policy whose images keep their sizes, within bounds."""
    policy = make_policy()
    policy.processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    return policy


@pytest.fixture(scope="module")
def folder(any_size, tmp_path_factory):
    """Its processor, saved."""
    folder = tmp_path_factory.mktemp("processors")
    any_size.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def started(any_size, folder):
    """Starts processes, and ends them after the test."""
    processes = []

    def start(encoder: Encoder | None = None) -> EncodingProcess:
        processes.append(EncodingProcess(encoder or any_size.encoder, folder))
        return processes[-1]

    yield start
    encoding_process.close_all(processes)


def at_its_start(code: str, tmp_path: Path, monkeypatch) -> None:
    """Let processes that are started from now on run ``code`` first."""
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)


def same(ours, theirs) -> bool:
    pairs = [(getattr(ours, name), getattr(theirs, name)) for name in ("token_ids", "positions", "pixels", "grids")]
    return ours.id == theirs.id and all(
        (a is None and b is None) or (a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)) for a, b in pairs
    )


# ---------------------------------------------------------------- what comes back


def test_a_process_gives_the_same_bits_and_the_same_errors_and_may_hang_alone(any_size, noise, tmp_path):
    noise(1).save(tmp_path / "square.png")
    noise(2, 300, 90).save(tmp_path / "wide.jpg")
    noise(3, 40, 64).convert("L").save(tmp_path / "gray.png")
    Image.fromarray((torch.arange(64 * 64).reshape(64, 64) * 9).numpy().astype("uint16")).save(tmp_path / "deep é.png")
    names = ("square.png", "wide.jpg", "gray.png", "deep é.png")
    prompts = [
        *(turn(name, tmp_path / name) for name in names),
        turn("none", text="no image, but \u00e9\U0001f9e0"),
        turn("three", *(tmp_path / name for name in names[1:]), text=""),
    ]
    expected = any_size.encode(prompts)
    (tmp_path / "torn.png").write_bytes((tmp_path / "square.png").read_bytes()[:300])
    os.mkfifo(tmp_path / "hangs")  # as a disk that does not answer
    any_size.forget_prompts()

    with Ahead(any_size, workers=1, limit_s=60, processes=True) as ahead:
        ahead.wait_for_processes()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoding, "open_image", None)  # none is opened in this process
            ahead.start(prompts)
            ahead.wait()
            assert all(same(*pair) for pair in zip(any_size.encode(prompts), expected, strict=True))
            for bad in ("torn.png", "missing.png"):
                ahead.start([turn("bad", tmp_path / bad)])
                with pytest.raises(ImageError) as found:
                    ahead.wait()
                with pytest.raises(ImageError) as known:
                    open_image(tmp_path / bad)
                assert str(found.value) == str(known.value) and vars(found.value) == vars(known.value)
        ahead.limit_s = 0.2
        ahead.start([turn("slow", tmp_path / "hangs")])
        with pytest.raises(DataError, match=r"example slow is not ready after 0\.2 s"):
            ahead.wait()
        began = time.monotonic()
    assert time.monotonic() - began < 1.9  # sooner than a thread is given up: the process that hung was ended


def test_what_was_set_for_all_of_pillow_counts_there_too(any_size, started, noise, tmp_path, monkeypatch):
    whole, torn = tmp_path / "whole.png", tmp_path / "torn.jpg"
    noise(1).save(whole)
    noise(1, 64, 64).save(tmp_path / "image.jpg")
    torn.write_bytes((tmp_path / "image.jpg").read_bytes()[:1500])
    process = started()
    with pytest.raises(ImageError):
        process.encode(turn("torn", torn))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    any_size.forget_prompts()
    assert same(process.encode(turn("torn", torn)), any_size.encode([turn("torn", torn)])[0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError) as known:
        open_image(whole)
    with pytest.raises(ImageError) as found:
        process.encode(turn("whole", whole))
    assert str(found.value) == str(known.value)


def test_every_error_of_ours_comes_back_as_it_was():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MedrlError)]
    plain = [kind("what and why") for kind in kinds if kind not in (ImageError, MissingExtraError)]
    for error in [*plain, ImageError(Path("a.png"), "why", "what to do"), MissingExtraError("nibabel", "nifti")]:
        found = encoding_process._error_from(describe(error))
        assert type(found) is type(error) and str(found) == str(error) and vars(found) == vars(error)


def test_a_mistake_over_there_is_told_as_it_is_and_the_next_question_answered(any_size, started, tmp_path, monkeypatch):
    at_its_start(
        "from medrl.data import images\nimages.scan_kind = lambda path: {}[path.name] if 'bad' in path.name else None",
        tmp_path, monkeypatch,
    )  # fmt: skip
    process = started()
    with pytest.raises(RuntimeError) as found:
        process.encode(turn("one", tmp_path / "bad.png"))
    assert str(found.value) == f"example one (images: {tmp_path / 'bad.png'}): KeyError: 'bad.png'"
    assert "in open_slices" in found.value.__notes__[0]
    any_size.forget_prompts()
    assert same(process.encode(turn("two")), any_size.encode([turn("two")])[0])


def test_messages_travel_whole_or_are_missed():
    ours, theirs = socket.socketpair()
    tensors = {
        "large": torch.arange(300_000.0).reshape(2, 3, -1),
        "none": torch.empty(0, 3, dtype=torch.long),
        "turned": torch.arange(12).reshape(3, 4).T,
    }
    with ours, theirs:
        sender = threading.Thread(target=send, args=(theirs, {"path": "a\udcff \u00e9"}, tensors))
        sender.start()
        content, found = receive(ours)
        sender.join()
        assert content == {"path": "a\udcff \u00e9"} and found.keys() == tensors.keys()
        assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in tensors.items())
        theirs.sendall((100).to_bytes(8, "big") + b"{")
        theirs.close()
        with pytest.raises(ClosedError):
            receive(ours)
        with pytest.raises(ClosedError):
            send(ours, {})


# ---------------------------------------------------------------- how it lives


def test_what_libraries_print_and_ctrl_c_reach_nobody_and_its_death_is_told(
    any_size, started, noise, tmp_path, monkeypatch
):
    at_its_start("print('noise on stdout')", tmp_path, monkeypatch)
    noise(4).save(tmp_path / "image.png")
    process = started()
    pid = process._process.pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid, number)  # at once, when no handler can be there yet
    assert same(
        process.encode(turn("one", tmp_path / "image.png")), any_size.encode([turn("one", tmp_path / "image.png")])[0]
    )
    assert process._last_words().startswith("noise on stdout")
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert b"CUDA_VISIBLE_DEVICES=" in environment
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(
        DataError, match=r"example two \(images: .*image\.png\): it was killed, as a rule because memory"
    ):
        process.encode(turn("two", tmp_path / "image.png"))


def test_a_timeout_for_all_sockets_is_not_for_these(any_size, started, noise, tmp_path):
    noise(4).save(tmp_path / "image.png")
    socket.setdefaulttimeout(0.05)
    try:
        process = started()
        process.ready(wait=True)  # takes longer
        time.sleep(0.2)
        asked = turn("one", tmp_path / "image.png")
        assert same(process.encode(asked), any_size.encode([asked])[0])
    finally:
        socket.setdefaulttimeout(None)


def test_one_that_cannot_start_says_why(started, tmp_path, monkeypatch):
    at_its_start(
        "import os\nprint('no room for me')\nimport sys\nsys.stdout.flush()\nos._exit(3)", tmp_path, monkeypatch
    )
    with pytest.raises(DataError, match=r"failed at its start: it ended with code 3 and these words: no room for me$"):
        started().ready(wait=True)


def end_at_start(patch, tmp_path, policy):
    at_its_start("import os\nos._exit(3)", tmp_path, patch)


def kill_at_start(patch, tmp_path, policy):
    at_its_start("import os\nos.kill(os.getpid(), 9)", tmp_path, patch)


def fill_disk(patch, tmp_path, policy):
    patch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))


def fill_disk_of_tokenizers(patch, tmp_path, policy):
    def save_pretrained(folder):
        raise Exception("No space left on device (os error 28)")  # as tokenizers say it

    patch.setattr(policy.processor, "save_pretrained", save_pretrained)


def open_too_many_files(patch, tmp_path, policy):
    inner, count = encoding_process._start, iter(range(9))

    def start(*args):
        if next(count) == 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return inner(*args)

    patch.setattr(encoding_process, "_start", start)


@pytest.mark.parametrize(
    ("ail", "words"),
    [
        (end_at_start, "failed at its start: it ended with code 3"),
        (kill_at_start, "failed at its start: it was killed, as a rule because memory ran out"),
        (fill_disk, "the processor cannot be saved for another process (FileNotFoundError"),
        (fill_disk_of_tokenizers, "the processor cannot be saved for another process (Exception: No space left"),
        (open_too_many_files, "cannot be started (OSError: [Errno 24] Too many open files"),
    ],
)
def test_threads_do_the_work_of_processes_that_cannot_be_had_unless_they_were_asked_for(
    make_policy, make_examples, tmp_path, monkeypatch, caplog, ail, words
):
    prompts = [make_prompt(example, template="plain") for example in make_examples(tmp_path / "images", 3)]
    expected, policy = make_policy().encode(prompts), make_policy()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    files = len(os.listdir("/proc/self/fd"))
    with pytest.MonkeyPatch.context() as patch:
        ail(patch, tmp_path, policy)
        with Ahead(policy, workers=2, processes="auto") as ahead:
            ahead.wait_for_processes()
            ahead.start(prompts)
            ahead.wait()
            assert all(same(*pair) for pair in zip(policy.encode(prompts), expected, strict=True))
    assert len(caplog.messages) == 1 and words in caplog.text and not list((tmp_path / "tmp").iterdir())
    with pytest.MonkeyPatch.context() as patch:
        ail(patch, tmp_path, policy)
        with (
            pytest.raises(DataError, match=r"training\.data_processes .* is true, but .*" + re.escape(words)) as found,
            Ahead(policy, workers=2, processes=True) as ahead,
        ):
            ahead.wait_for_processes()
    del found
    assert len(caplog.messages) == 1 and len(os.listdir("/proc/self/fd")) == files


def test_nobody_waits_for_a_start(make_policy, make_examples, tmp_path, monkeypatch):
    at_its_start("import time\ntime.sleep(60)", tmp_path, monkeypatch)
    policy, began = make_policy(), time.monotonic()
    with Ahead(policy, workers=2, processes=True) as ahead:
        pids = [process._process.pid for process in ahead._processes]
        ahead.start([make_prompt(example, template="plain") for example in make_examples(tmp_path, 3)])
        ahead.wait()  # by the threads themselves
    assert time.monotonic() - began < 20 and len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_processes_that_cannot_go_are_given_up_together(make_policy, tmp_path, monkeypatch):
    at_its_start("import time\ntime.sleep(60)", tmp_path, monkeypatch)
    monkeypatch.setattr(encoding_process, "PATIENCE_S", 1.0)
    monkeypatch.setattr("medrl.training.ahead.GRACE_S", 0.05)
    with pytest.MonkeyPatch.context() as patch:
        with Ahead(make_policy(), workers=4, processes=True) as ahead:
            patch.setattr(subprocess.Popen, "kill", lambda self: None)  # as one that waits for a disk
            began = time.monotonic()
        took = time.monotonic() - began
    for process in ahead._processes:
        process._process.kill()
        process._process.wait()
    assert 1.0 <= took < 2.5


def test_the_saved_processor_is_gone_as_soon_as_it_was_read(any_size, noise, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    noise(4).save(tmp_path / "image.png")
    prompt = turn("one", tmp_path / "image.png")
    any_size.forget_prompts()
    with Ahead(any_size, workers=2, processes=True) as ahead:
        assert len(list(tmp_path.glob("medrl-processor-*"))) == 1
        ends = time.monotonic() + 30
        while list(tmp_path.glob("medrl-processor-*")) and time.monotonic() < ends:  # though nobody asks for anything
            time.sleep(0.05)
        assert [path.name for path in tmp_path.iterdir()] == ["image.png"]
        assert all(process.ready() for process in ahead._processes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoding, "open_image", None)
            ahead.start([prompt])
            ahead.wait()


def test_who_waits_for_a_start_holds_up_nobody_who_only_asks(started, monkeypatch, tmp_path):
    at_its_start("import time\ntime.sleep(60)", tmp_path, monkeypatch)
    process = started()

    def wait():
        with pytest.raises(DataError, match="it was killed"):
            process.ready(wait=True)

    waits = threading.Thread(target=wait)
    waits.start()
    time.sleep(0.1)
    assert process.ready() is False
    process.kill()
    waits.join()


def test_another_image_processor_over_there_is_an_error(any_size, started):
    class Other:
        image_processor = object()

    process = started(Encoder(processor=Other(), image_token_id=1, merge_size=2))
    with pytest.raises(DataError, match="with Qwen2VLImageProcessor, and this one with object"):
        process.ready(wait=True)


@pytest.mark.parametrize("forked", [False, True])
def test_a_parent_that_is_killed_leaves_nothing_behind(processor, tmp_path, forked):
    folder = tmp_path / "processor"
    processor.save_pretrained(folder)
    # The parent needs to know no more of a processor than what its image processor is called. A child that it forks
    # holds its sockets too.
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom types import SimpleNamespace as N\n"
        "from medrl.policy.encoding import Encoder\nfrom medrl.policy.encoding_process import EncodingProcess\n"
        "image_processor = type('Qwen2VLImageProcessor', (), {})()\n"
        "encoder = Encoder(processor=N(image_processor=image_processor), image_token_id=1, merge_size=2)\n"
        "processes = [EncodingProcess(encoder, Path(sys.argv[1])) for _ in range(2)]\n"
        "processes[0].ready(wait=True)\nforked = os.fork() if sys.argv[2] == 'True' else os.getpid()\n"
        "if forked: print(forked, *(p._process.pid for p in processes), flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(forked)], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert parent.stdout is not None
    child, *pids = parent.stdout.readline().split()
    assert len(pids) == 2 and all(map(alive, [child, *pids]))
    parent.kill()
    parent.wait()
    ends = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < ends:
        time.sleep(0.05)
    left = [pid for pid in pids if alive(pid)]
    if forked:
        assert alive(child)
        os.kill(int(child), signal.SIGKILL)
    parent.stdout.close()
    assert not left and not folder.exists()


def alive(pid: str) -> bool:
    """Whether there is such a process, other than one that has ended and that nobody asks about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_imports_neither_the_trainer_nor_a_model():
    code = (
        "import sys, medrl.policy.encoding_worker\n"
        "rooms = {name.split('.')[1] for name in sys.modules if name.startswith('medrl.')}\n"
        "assert rooms <= {'policy', 'data', 'types', 'errors', 'stopping'}, rooms\n"
        "assert not [name for name in sys.modules if name.startswith('transformers.models.qwen2_vl.modeling')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- who uses them


@pytest.fixture
def by_processes_alone(monkeypatch):
    """No thread helps out until they have started, and no image is opened in this process."""
    ready = EncodingProcess.ready
    monkeypatch.setattr(EncodingProcess, "ready", lambda self, wait=False: ready(self, wait=True))
    monkeypatch.setattr(encoding, "open_image", None)


def test_a_run_is_the_same_bit_for_bit(model_folder, examples, lively, small, tmp_path, request):
    def trained(name, **options):
        policy = Policy.load(model_folder)
        settings = small.model_copy(update={"steps": 3, "data_workers": 1, **options})
        objective = GRPO(group_size=2, kl_coef=0.04)
        run = train(policy, examples, lively, objective, out=tmp_path / name, settings=settings, quiet=True)
        return (run.path / "rollouts.jsonl").read_bytes(), policy.fingerprint()

    by_threads = trained("threads", data_processes=False)
    request.getfixturevalue("by_processes_alone")
    assert trained("processes", data_processes=True) == by_threads


def test_an_evaluation_is_the_same(make_policy, make_examples, tmp_path, request):
    examples = make_examples(tmp_path / "images", 5)
    settings = {
        "mode": "no_think",
        "template": "plain-no-think",
        "max_new_tokens": 8,
        "batch_size": 2,
        "data_workers": 1,
    }
    by_threads = evaluate(
        make_policy(), examples, out=tmp_path / "threads", settings=EvalSettings(**settings), quiet=True
    )
    request.getfixturevalue("by_processes_alone")
    settings |= {"data_processes": True}
    found = evaluate(make_policy(), examples, out=tmp_path / "processes", settings=EvalSettings(**settings), quiet=True)
    assert found.records == by_threads.records


def test_auto_takes_processes_on_a_gpu_and_says_so(caplog):
    caplog.set_level("INFO", "medrl")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not choose_processes("auto", 4, cpu) and not choose_processes(False, 4, gpu) and caplog.messages == []
    assert choose_processes("auto", 4, gpu) == "auto" and choose_processes(True, 2, cpu) is True
    assert caplog.messages == [
        "images: 4 processes of their own (chosen by auto on cuda)",
        "images: 2 processes of their own (as asked on cpu)",
    ]
