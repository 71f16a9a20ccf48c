"""A run on an S3-speaking server: killed, begun again on a machine that has nothing of it, read from its address."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest
from conftest import COMMAND, NO_FAULTS, ROOT
from s3_server import BUCKET, s3_server

from pipeline.embedded import cache_root
from pipeline.store import Store
from stages.faults import FAULTS, FOLDER, fired

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

ADDRESS = f"s3://{BUCKET}/runs/moved"
TINY = ("rounds=2", "prompts.per_round=64", "prompts.shard_size=32", "evaluate.num_prompts=64", "run.name=moved")
HANGS = "driver.shard[sample]:hang@7"
"""After the first shard of round 2: two were sampled for each of the evaluations, two in round 1."""

STAYS = (".parquet", ".safetensors", "manifest.json", "fingerprint.json")


class Machine:
    """A machine with a cache folder of its own, in which only the embedded models are."""

    def __init__(self, cache: Path, variables: Mapping[str, str]) -> None:
        cache.mkdir()
        (cache / "embedded").symlink_to(cache_root() / "embedded")
        self.cache, self.variables = cache, dict(variables) | {"PREFLOOP_CACHE": str(cache)}

    def start(self, *words: object, faults: Mapping[str, str] = NO_FAULTS) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, *map(str, words)],
            cwd=ROOT,
            env=os.environ | self.variables | faults,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=550)
        return subprocess.CompletedProcess(words, process.returncode, out, err)


@dataclass(frozen=True)
class Moved:
    """What became of it; `third` is a machine that has nothing of the run."""

    killed: int
    refused: subprocess.CompletedProcess[str]
    before: Mapping[str, tuple[str, datetime]]
    carried_on: subprocess.CompletedProcess[str]
    after: Mapping[str, tuple[str, datetime]]
    third: Machine
    folder: Path


def _train(run_dir: object) -> list[object]:
    return ["run", "configs/quickstart.yaml", *(w for s in (f"run.dir={run_dir}", *TINY) for w in ("--set", s))]


def _there() -> dict[str, tuple[str, datetime]]:
    """The tag of every object, and when it was put there."""
    from obstore.store import from_url

    store = from_url(ADDRESS, client_options={"allow_http": True})
    return {each["path"]: (each["e_tag"], each["last_modified"]) for each in store.list().collect()}


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> Iterator[Moved]:
    """A run whose first machine hangs in the second round, and is then lost."""
    folder = tmp_path_factory.mktemp("machines")
    with s3_server() as variables, pytest.MonkeyPatch.context() as patched:
        for name, value in variables.items():
            patched.setenv(name, value)
        first, second, third = (Machine(folder / name, variables) for name in ("first", "second", "third"))
        command, marks = _train(f"s3://{BUCKET}/runs"), folder / "marks"
        process = first.start(*command, faults={FAULTS: HANGS, FOLDER: str(marks)})
        while process.poll() is None and not (marks.exists() and any(fired(marks).values())):
            time.sleep(0.2)
        refused = second.run(*command)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        before = _there()
        yield Moved(process.returncode, refused, before, second.run(*command), _there(), third, folder)


def test_a_second_driver_is_refused_and_told_who_works(moved):
    assert moved.killed == -signal.SIGKILL
    assert moved.refused.returncode == 1 and "goes on renewing its lease" in moved.refused.stderr
    assert "wanted: a run that no other process works on" in moved.refused.stderr


def test_the_same_command_carries_on_elsewhere_and_leaves_what_was_published(moved):
    done = moved.carried_on
    assert done.returncode == 0, done.stderr
    assert "round 1/2  finished" in done.stdout and "round 2/2  update" in done.stdout
    published = {key: found for key, found in moved.before.items() if key.endswith(STAYS)}
    assert "round-0001/policy/model.safetensors" in published
    assert "round-0002/candidates/part-00000.parquet" in published
    assert {key: moved.after[key] for key in published} == published


def test_a_moved_run_comes_to_the_policy_of_one_in_a_folder(moved):
    runs = moved.folder / "runs"
    done = moved.third.run(*_train(runs))
    assert done.returncode == 0, done.stderr
    wanted = json.loads((runs / "moved" / "final.json").read_text())
    found = Store(ADDRESS).read("final.json")
    assert found is not None and json.loads(found[0]) == wanted
    ours = {f.relative_to(runs / "moved").as_posix() for f in (runs / "moved").rglob("*.parquet")}
    assert ours == {key for key in moved.after if key.endswith(".parquet")}


def test_a_run_is_read_from_its_address_alone(moved, tmp_path):
    status = moved.third.run("status", ADDRESS)
    assert status.returncode == 0 and "after round 2" in status.stdout, status.stderr
    page = tmp_path / "page.html"
    assert moved.third.run("report", ADDRESS, "--out", page).returncode == 0
    assert "moved" in page.read_text()
    exported = moved.third.run("export", ADDRESS, "--out", tmp_path / "pairs.jsonl")
    assert exported.returncode == 0, exported.stderr
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    traced = moved.third.run("trace", ADDRESS, rows[-1]["pair_id"])
    assert traced.returncode == 0 and rows[-1]["prompt_id"] in traced.stdout, traced.stderr
    model = moved.third.run("export", ADDRESS, "--model", tmp_path / "model")
    assert model.returncode == 0 and (tmp_path / "model" / "model.safetensors").exists(), model.stderr
    assert not any((moved.third.cache / "working").glob("*")), "readers leave the working copy alone"


def test_a_damaged_object_of_a_settled_round_is_refused_by_its_name(moved):
    key, store = "round-0001/pairs/_shards/part-00000.json", Store(ADDRESS)
    whole = store.read(key)
    assert whole is not None
    store.put(key, whole[0].replace(b"part-00000", b"part-00001"))
    try:
        done = moved.third.run(*_train(f"s3://{BUCKET}/runs"))
    finally:
        store.put(key, whole[0])
    assert done.returncode == 1 and "round-0001/pairs/_shards/part-00000.json" in done.stderr
