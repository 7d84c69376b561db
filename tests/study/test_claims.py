import json
import shutil
import subprocess
import sys
import threading

import pytest

from medrl.study import claims
from medrl.study.claims import Claims, exclusive


def test_a_claim_is_had_by_one_at_a_time_and_again_after_it_was_given_back(tmp_path):
    first, second = Claims(tmp_path), Claims(tmp_path)
    claim = first.take()
    assert claim is not None and second.held()
    assert second.take() is None
    claim.release()
    assert not second.held()
    again = second.take()
    assert again is not None and again.file.name == "0002.json"
    again.release()


def test_of_many_who_try_at_once_exactly_one_gets_it(tmp_path):
    gate, won = threading.Barrier(12), []

    def run():
        mine = Claims(tmp_path)
        gate.wait()
        if (claim := mine.take()) is not None:
            won.append(claim)

    for round_ in range(1, 6):
        threads = [threading.Thread(target=run) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == round_ and won[-1].file.name == f"{round_:04d}.json"
        won[-1].release()


def test_a_holder_that_was_killed_is_known_to_be_dead_at_once(tmp_path):
    code = f"import os; from medrl.study.claims import Claims; Claims({str(tmp_path)!r}).take(); os._exit(1)"
    code = f"from pathlib import Path; {code.replace(repr(str(tmp_path)), f'Path({str(tmp_path)!r})')}"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (tmp_path / "0001.json").exists() and not (tmp_path / "0001.released").exists()
    assert not Claims(tmp_path).held()


def test_a_process_number_that_was_given_anew_is_not_taken_for_the_holder(tmp_path):
    holder = Claims(tmp_path).take()
    assert Claims(tmp_path).held()
    facts = json.loads(holder.file.read_text())
    holder.file.write_text(json.dumps({**facts, "born": facts["born"] - 1}))
    assert not Claims(tmp_path).held()


def test_a_holder_on_another_machine_is_taken_for_dead_only_after_silence(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    tmp_path.joinpath("0001.json").write_text(json.dumps({"machine": "elsewhere", "pid": 1, "born": 1}))
    observer = Claims(tmp_path, expiry_s=60)
    assert observer.held()
    now[0] = 59
    assert observer.held()
    tmp_path.joinpath("0001.json").touch()  # a sign of life: the silence starts anew
    assert observer.held()
    now[0] = 118
    assert observer.held()
    now[0] = 120
    assert not observer.held()
    claim = observer.take()
    assert claim is not None and claim.file.name == "0002.json"
    claim.release()


def test_a_claim_whose_maker_died_before_writing_it_expires_too(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    tmp_path.joinpath("0001.json").write_text("")
    observer = Claims(tmp_path, expiry_s=60)
    assert observer.held()
    now[0] = 61
    assert not observer.held()


def test_a_holder_shows_that_it_lives_and_leaves_when_another_took_over(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.01)
    left = threading.Event()
    monkeypatch.setattr(claims, "leave", left.set)
    claim = Claims(tmp_path).take()
    before = claim.file.stat().st_mtime_ns
    beat = threading.Event()
    for _ in range(500):
        if claim.file.stat().st_mtime_ns != before:
            beat.set()
            break
        threading.Event().wait(0.01)
    assert beat.is_set() and not left.is_set()
    claim.next.write_text("{}")
    assert left.wait(5)


def test_a_holder_whose_folder_was_removed_goes_on_in_peace(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.01)
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    claim = Claims(tmp_path / "claims").take()
    shutil.rmtree(tmp_path / "claims")
    claim._thread.join(0.2)
    assert claim._thread.is_alive() and failed == []
    claim._ended.set()


def test_exclusive_gives_the_claim_back_also_after_an_error(tmp_path):
    with pytest.raises(KeyError), exclusive(tmp_path):
        assert Claims(tmp_path).held()
        raise KeyError("x")
    assert not Claims(tmp_path).held()
