"""Laws of the store, on a disk and on an S3-speaking server: conditions, whole files only, one holder of the lease."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from s3_server import BUCKET, without_header

from pipeline.lease import LEASE, Lease, is_leased, read_lease
from pipeline.store import Store
from stages.errors import InputError, StageError

QUICK_S = 1.0  # a lease's time


@pytest.fixture
def store(address) -> Store:
    return Store(address)


def test_what_is_put_is_got_whole_and_listed_by_its_key(store, tmp_path):
    content = os.urandom(40_000_000)  # several pieces
    (tmp_path / "part").write_bytes(content)
    tag = store.put("round-0001/candidates/part-00000.parquet", tmp_path / "part")
    assert store.get("round-0001/candidates/part-00000.parquet", tmp_path / "got") == tag
    assert (tmp_path / "got").read_bytes() == content
    store.put("run.json", b"{}")
    assert {key: found.bytes for key, found in store.list().items()} == {
        "round-0001/candidates/part-00000.parquet": len(content),
        "run.json": 2,
    }
    assert list(store.list("round-0001")) == ["round-0001/candidates/part-00000.parquet"]
    assert store.find("run.json") == store.list()["run.json"]


def test_what_is_not_there_is_none_and_may_be_deleted(store, tmp_path):
    assert store.read("run.json") is None and store.find("run.json") is None and store.list() == {}
    assert store.get("run.json", tmp_path / "got") is None and not (tmp_path / "got").exists()
    store.delete(["run.json"])


def test_a_file_is_created_once_and_swapped_only_by_its_tag(store):
    first = store.create("x", b"1")
    assert first is not None and store.create("x", b"2") is None
    second = store.swap("x", b"3", first)
    assert second is not None and second != first
    assert store.swap("x", b"4", first) is None and store.swap("y", b"4", first) is None
    assert store.read("x") == (b"3", second)


def test_a_store_that_keeps_conditions_is_taken_and_nothing_is_left_of_the_look(store):
    store.refuse_unconditional()
    assert store.list() == {}


@pytest.mark.slow
@pytest.mark.parametrize("header", ["If-None-Match", "If-Match"])
def test_a_server_that_overlooks_a_condition_is_refused(s3_variables, monkeypatch, header):
    for name, value in s3_variables.items():
        monkeypatch.setenv(name, value)
    with without_header(s3_variables["AWS_ENDPOINT_URL"], header) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        store = Store(f"s3://{BUCKET}/{header}")
        store.put("x", b"1")
        with pytest.raises(StageError, match="one that put a file in spite of them"), Lease(store).held():
            pass
        assert list(store.list()) == ["x"]


@pytest.mark.slow
def test_an_upload_that_is_killed_leaves_no_file(address, tmp_path):
    (tmp_path / "big").write_bytes(os.urandom(100_000_000))
    code = "from pipeline.store import Store; from pathlib import Path; print('begins', flush=True); "
    code += f"Store({address!r}).put('part', Path({str(tmp_path / 'big')!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"begins\n"
    time.sleep(0.15)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = Store(address).find("part")
    assert found is None or found.bytes == 100_000_000


@pytest.mark.parametrize(("place", "told"), [("ftp://host/run", "begins with s3://"), ("s3://", "begins with s3://")])
def test_an_address_that_nothing_is_known_of_is_refused(place, told):
    with pytest.raises(InputError, match=told):
        Store(place)


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_told_in_words(s3_variables, monkeypatch):
    for name, value in s3_variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StageError, match="a store that answers"):
        Store("s3://no-such-bucket/run").put("x", b"")


# ---- the lease ------------------------------------------------------------------------------------------------------


def _hold(address: str, begin, got) -> None:
    begin.wait()
    try:
        with Lease(Store(address), seconds=QUICK_S, tell=lambda _: None).held():
            got.put(os.getpid())
            time.sleep(4 * QUICK_S)
    except StageError as error:
        got.put(str(error))


@pytest.mark.slow
def test_of_two_processes_that_ask_at_once_one_gets_the_lease(address):
    context = multiprocessing.get_context("spawn")
    begin, got = context.Event(), context.Queue()
    processes = [context.Process(target=_hold, args=(address, begin, got)) for _ in range(2)]
    for process in processes:
        process.start()
    time.sleep(1.0)
    begin.set()
    answers = [got.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    (holder,) = (answer for answer in answers if isinstance(answer, int))
    (refusal,) = (answer for answer in answers if isinstance(answer, str))
    assert f"process {holder} on" in refusal and "goes on renewing" in refusal


def test_a_lease_that_was_given_back_is_taken_at_once(store):
    for _ in range(2):
        with Lease(store).held():
            assert is_leased(store)
        assert not is_leased(store)


def test_the_lease_of_a_dead_process_of_this_machine_is_taken_at_once(store, address):
    code = "import os, time; from pipeline.lease import Lease; from pipeline.store import Store\n"
    code += f"with Lease(Store({address!r})).held(): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    began = time.monotonic()
    with Lease(store).held():
        assert time.monotonic() - began < 10


def test_a_lease_that_nobody_renews_is_taken_over_after_its_time_and_no_sooner(store):
    stopped = Lease(store, seconds=QUICK_S)
    stopped._take()  # of a holder whose machine is gone: nothing renews it
    told: list[str] = []
    began = time.monotonic()
    with Lease(store, seconds=QUICK_S, tell=told.append).held():
        assert time.monotonic() - began >= QUICK_S
        assert read_lease(store)[0]["id"] != stopped._me["id"]
    assert f"process {os.getpid()} on" in told[0]


def test_a_holder_whose_lease_was_taken_over_is_stopped_and_told(store):
    def hold() -> None:
        with Lease(store, seconds=QUICK_S).held():
            store.put(LEASE, Lease(store)._content())
            threading.Event().wait(30)

    began = time.monotonic()
    with pytest.raises(StageError, match="has taken it over"):
        hold()
    assert time.monotonic() - began < 10


def test_a_holder_whose_lease_was_removed_is_stopped_and_told(store):
    def hold() -> None:
        with Lease(store, seconds=QUICK_S).held():
            store.delete([LEASE])
            threading.Event().wait(10)

    with pytest.raises(StageError, match="its lease was removed"):
        hold()


@pytest.mark.parametrize("broken", [b"[1]", b"{", b'{"id": "another"}', b"no folder"])
def test_a_holder_whose_lease_cannot_be_renewed_is_stopped_whatever_the_reason(tmp_path, broken):
    store = Store(f"file://{tmp_path}/runs")

    def hold() -> None:
        with Lease(store, seconds=0.2).held():
            if broken == b"no folder":
                shutil.rmtree(tmp_path / "runs")
            else:
                store.put(LEASE, broken)
            threading.Event().wait(10)

    with pytest.raises(StageError, match="could not be renewed within"):
        hold()


def test_a_lease_that_is_removed_while_it_is_watched_is_taken(store):
    Lease(store, seconds=4 * QUICK_S)._take()  # of a holder whose machine is gone
    began = time.monotonic()
    with Lease(store, tell=lambda _: store.delete([LEASE])).held():
        assert is_leased(store)
        assert time.monotonic() - began < 3 * QUICK_S
