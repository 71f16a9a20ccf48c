"""Workers that compute nothing, for `scale`.

Each job publishes an entry of its stage's contract, and a part without rows. The pools and tasks are the cluster's own;
only what runs a job is another, and, where Ray cannot be had a thousand times, what carries it there.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
from ray import cloudpickle

from cluster import mapper, pool, tasks
from cluster.config import ClusterConfig
from cluster.pool import Pool
from cluster.session import redirect_output, session
from cluster.tasks import Tasks
from cluster.timing import Timed
from pipeline.artifacts import StageFolder
from pipeline.entries import Entry
from pipeline.jobs.answers import PairShard, SampleShard, ScoreShard
from pipeline.jobs.inputs import DrawPrompts
from pipeline.jobs.tables import FindDamages
from stages.weights import file_sha256

HOSTS = 2  # processes that the workers of a pool share
STARTED = "started"

counted: Counter[str] = Counter()


# ---- what a worker does ---------------------------------------------------------------------------------------------


def work(job: Any) -> Any:
    """In the place of a job: what it would publish, without rows, and what it would return."""
    match job:
        case DrawPrompts():
            return sum(published(job.out, shard, job.shard_size, {}).rows for shard in job.shards)
        case FindDamages():
            return job(None)
        case SampleShard():
            rows = 8 * 1024
            tokens = {"prompts": 1024, "tokens": 100.0 * rows, "stop": rows, "length": 0}
            return published(job.out, job.shard, rows, tokens, job.prompts)
        case ScoreShard():
            rows = 8 * 1024
            spread = {"scored": rows, "errors": 0, "reward_sum": 1.0, "reward_min": 0.0, "reward_max": 1.0}
            moments = {"exact_match/count": rows, "exact_match/mean": 0.5, "exact_match/squares": 1.0}
            return published(job.out, job.shard, rows, spread | moments, job.prompts, job.candidates)
        case PairShard():
            parents = (job.prompts, job.candidates, job.scored)
            margins = {"margin_sum": 1.0, "chosen_tokens": 1, "rejected_tokens": 1, "chosen_longer": 1}
            published(job.out, job.shard, 900, margins, *parents)
            return published(job.fates, job.shard, 1024, {"paired": 900, "tied": 124}, *parents)
    raise AssertionError(f"no stub for {type(job).__name__}")


def published(out: StageFolder, shard: int, rows: int, stats: dict[str, float], *parents: StageFolder) -> Entry:
    """An entry that says it has rows, on a part that has none: one file under many names."""
    empty, contract = empty_part(out), out.contract
    name = f"part-{shard:05d}.parquet"
    if not (out.path / name).exists():
        os.link(empty, out.path / name)
    hashes = [hash_of(empty_part(parent)) for parent in parents]
    size = empty.stat().st_size
    entry = Entry(shard, name, hash_of(empty), size, rows, contract.name, contract.version, hashes, [], stats)
    entry.write(out.path / "_shards" / f"part-{shard:05d}.json")
    return entry


@cache
def empty_part(out: StageFolder) -> Path:
    file = out.path / "empty.parquet"
    if not file.exists():
        out.path.mkdir(parents=True, exist_ok=True)
        scratch = out.path / f"empty.{os.getpid()}"
        pq.write_table(out.contract.schema.empty_table(), scratch)
        scratch.replace(file)
    return file


@cache
def hash_of(file: Path) -> str:
    return file_sha256(file)


# ---- on Ray ---------------------------------------------------------------------------------------------------------


@contextmanager
def real_ray(log_dir: Path) -> Iterator[None]:
    with session(ClusterConfig(), log_dir=log_dir, search_path=[Path(__file__).parents[1]], shipped=[]):
        yield


def object_store_bytes() -> int:
    """What lies in Ray's object store now."""
    store = "object_store_memory"
    return int(ray.cluster_resources()[store] - ray.available_resources()[store])


class Host:
    """An actor that stands for many workers."""

    def __init__(self, log: Path) -> None:
        redirect_output(log)

    def node(self) -> str:
        return ""

    def run(self, job: Any, built_only: bool = False) -> Timed:
        began = time.time()
        return Timed(work(job), began, time.time())


class RayPool(Pool):
    """A pool whose workers are names for a few actors."""

    _hosts: list[Any]

    def _start(self, index: int) -> None:
        if index == 0:
            host = ray.remote(Host).options(num_cpus=0, max_restarts=0)
            self._hosts = [host.remote(self._logs[0]) for _ in range(HOSTS)]
        self._asked_at[index] = time.monotonic()
        self._actors[index] = self._hosts[index % HOSTS]
        self._starting[self._actors[index].node.remote()] = index


class RayTasks(Tasks):
    """Tasks that run the stubs."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        resources = given["resources"]
        self._task = ray.remote(run_stub).options(
            num_cpus=resources.cpus, num_gpus=0, max_retries=0, num_returns="streaming"
        )


def run_stub(job: Any, log: Path) -> Iterator[Any]:
    redirect_output(log)
    yield STARTED
    began = time.time()
    yield Timed(work(job), began, time.time())


# ---- without Ray ----------------------------------------------------------------------------------------------------


def outside_s() -> float:
    """Processor seconds of this process that were the stub workers'."""
    return PLAIN.outside_s


class Reference:
    """What stands for a reference: the answers that are still to come, the call that makes them until it is made."""

    __slots__ = ("answers", "call")

    def __init__(self, call: Any) -> None:
        self.call, self.answers = call, deque()

    def __next__(self) -> Reference:
        one = Reference(None)
        one.answers.append(self.answers.popleft())
        return one


class PlainRay:
    """The calls of Ray that pools and tasks make, answered in this process, first come first served.

    What is sent and returned is pickled, counted and unpickled, as part of the driver's work; a stub worker's time is
    not. What is asked for in vain is not listed, since nobody looks at it.
    """

    def __init__(self) -> None:
        self.outside_s = 0.0
        self.at_once = 1  # calls that are answered while the driver waits once
        self._calls: deque[Reference] = deque()

    def remote(self, made: Any) -> Any:
        return _Maker(self)

    def kill(self, _actor: Any) -> None:
        pass

    def cancel(self, _ref: Any, *, force: bool) -> None:
        pass

    def call(self, job: Any, *, streaming: bool) -> Reference:
        """A call to a worker, made when the driver waits."""
        sent = None if job is None else self._carried(job)
        ref = Reference((sent, streaming))
        self._calls.append(ref)
        counted["most_busy"] = max(counted["most_busy"], len(self._calls))
        return ref

    def get(self, ref: Reference, *, timeout: float | None = None) -> Any:
        value = ref.answers.popleft()
        return None if value is None else cloudpickle.loads(value)

    def wait(
        self, refs: Sequence[Reference], *, num_returns: int, timeout: float | None
    ) -> tuple[list[Any], list[Any]]:
        counted["named"] += len(refs)
        found = [ref for ref in refs if ref.answers]
        if not found:
            for _ in range(min(len(self._calls), self.at_once)):
                self._make(self._calls.popleft())
            found = [ref for ref in refs if ref.answers]
        return found[:num_returns], []

    def _make(self, ref: Reference) -> None:
        began = time.thread_time()  # that of a process takes its time where there are many threads
        sent, streaming = ref.call
        job = None if sent is None else cloudpickle.loads(sent)
        value = None if job is None else work(job)
        answer = None if job is None else cloudpickle.dumps(Timed(value, time.time(), time.time()))
        self.outside_s += time.thread_time() - began
        if streaming:
            ref.answers.append(cloudpickle.dumps(STARTED))
            self._count(ref.answers[0])
        if answer is not None:
            self._count(answer)
        ref.answers.append(answer)

    def _carried(self, value: Any) -> bytes:
        sent = cloudpickle.dumps(value)
        self._count(sent)
        return sent

    def _count(self, sent: bytes) -> None:
        counted["messages"] += 1
        counted["bytes"] += len(sent)
        counted["largest"] = max(counted["largest"], len(sent))


@dataclass(frozen=True)
class _Maker:
    ray: PlainRay

    def options(self, **given: Any) -> _Call | _Maker:
        return _Call(self.ray, streaming=True) if given.get("num_returns") == "streaming" else self

    def remote(self, *_: Any) -> _Actor:
        return _Actor(self.ray)


class _Actor:
    def __init__(self, plain: PlainRay) -> None:
        self.run, self.node = _Call(plain, streaming=False), _Call(plain, streaming=False)


@dataclass(frozen=True)
class _Call:
    ray: PlainRay
    streaming: bool

    def remote(self, job: Any = None, *_: Any) -> Reference:
        return self.ray.call(job, streaming=self.streaming)


PLAIN = PlainRay()


def in_plain(kind: type) -> Any:
    """Makes pools or tasks whose Ray is this process."""

    def make(*args: Any, **given: Any) -> Any:
        for module in (mapper, pool, tasks):
            module.ray = PLAIN  # type: ignore[attr-defined]
        return kind(*args, **given)

    return make


@dataclass(frozen=True)
class Kind:
    """How pools and tasks are made."""

    pool: Any
    tasks: Any
    clock: Callable[[], float]  # processor seconds of the driver


KINDS = {
    "plain": Kind(in_plain(Pool), in_plain(Tasks), time.thread_time),
    "ray": Kind(RayPool, RayTasks, time.process_time),  # Ray has threads of its own in the driver
}
