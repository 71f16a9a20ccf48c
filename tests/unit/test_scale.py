"""What the driver takes for its shards: not more for one of many than for one of few, whatever rows they have.

The rounds are collected by the driver's own code; their workers compute nothing (`benchmarks/scale_workers.py`), but
where messages are weighed the jobs are real.
"""

from __future__ import annotations

import sys
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from here import workshop
from ray import cloudpickle
from written_run import answers, prompts, publish

from benchmarks import scale, scale_workers
from pipeline.artifacts import StageFolder
from pipeline.jobs.answers import PairShard, ScoreShard
from pipeline.jobs.inputs import DrawPrompts
from pipeline.spans import Span, Stretches
from stages.contracts import CANDIDATES, FATES, PAIRS, PROMPTS, SCORED
from stages.protocols import Weights
from stages.sample.stage import Draw
from stages.score.config import PairConfig
from stages.score.functions import FunctionScorer

FEW, MANY = 10, 40
KIB_A_SHARD = 24


class Calls:
    """How many functions were called, those of the stub workers left out."""

    def __init__(self) -> None:
        self.count = 0
        self._in_stub = 0

    @contextmanager
    def counted(self):
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _note(self, frame, event, _):
        is_stub = frame.f_code is scale_workers.PlainRay._make.__code__
        if is_stub and event in ("call", "return"):
            self._in_stub += 1 if event == "call" else -1
        elif not self._in_stub and event in ("call", "c_call"):
            self.count += 1


def collect(folder: Path, *, shards: int, workers: int, calls: Calls | None = None) -> dict[str, int]:
    """Collect a round; what its messages came to, and how many jobs were with workers at once."""
    scale_workers.counted.clear()
    crew = scale.StubCrew(scale_workers.KINDS["plain"], workers, folder)
    for name in ("sampler", "scorer"):
        crew.pool(name)
    collector = scale.collector(folder, crew, shards=shards, rows=1024)
    if calls is None:
        collector.collect(scale.POLICY)
    else:
        with calls.counted():
            collector.collect(scale.POLICY)
    return dict(scale_workers.counted)


@pytest.fixture(autouse=True)
def own_ray(monkeypatch):
    """The modules in whose place the simulation puts a Ray of its own have theirs again afterwards."""
    for module in (scale_workers.mapper, scale_workers.pool, scale_workers.tasks):
        monkeypatch.setattr(module, "ray", module.ray)


def test_the_drivers_work_for_a_shard_does_not_grow_with_shards_or_workers(tmp_path):
    def calls_a_shard(shards: int, workers: int) -> float:
        calls = Calls()
        collect(tmp_path / f"{shards}-{workers}", shards=shards, workers=workers, calls=calls)
        return calls.count / shards

    first = calls_a_shard(FEW, 2)
    assert calls_a_shard(MANY, 2) < 1.05 * first
    assert calls_a_shard(MANY, 16) < 1.05 * first


def test_the_drivers_memory_for_a_shard_is_bounded(tmp_path):
    def peak(shards: int) -> int:
        tracemalloc.start()
        try:
            collect(tmp_path / str(shards), shards=shards, workers=8)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(4)  # what is imported and loaded once
    assert peak(MANY) - peak(FEW) < (MANY - FEW) * KIB_A_SHARD * 1024


def test_all_workers_of_a_pool_have_work_however_many_they_are(tmp_path):
    assert collect(tmp_path / "few", shards=2 * MANY, workers=2)["most_busy"] < MANY, "the bound holds"
    assert collect(tmp_path / "many", shards=MANY, workers=30)["most_busy"] >= 30


def test_a_busy_driver_asks_about_all_workers_at_once(tmp_path, monkeypatch):
    def named_a_message(workers: int) -> float:
        monkeypatch.setattr(scale_workers.PLAIN, "at_once", workers)  # they all end while the driver works
        found = collect(tmp_path / str(workers), shards=2 * MANY, workers=workers)
        return found["named"] / found["messages"]

    assert max(named_a_message(4), named_a_message(32)) < 10


def test_messages_do_not_grow_with_the_rows_of_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr("written_run.HOSTILE", ["plain", "words"])

    def weighed(count: int) -> list[tuple[int, int]]:
        folder = tmp_path / f"{count:04d}"
        found = {c.name: StageFolder(folder / c.name, c) for c in (PROMPTS, CANDIDATES, SCORED, PAIRS, FATES)}
        rows = [row | {"conversation": None} for row in prompts("train", count, round=1).to_pylist()]
        publish(found["prompts"], [PROMPTS.table(rows)])
        publish(found["candidates"], [answers(rows, Weights(folder, "0" * 64, 0), Draw(0, 1, 1, "policy"), 4)])
        score = ScoreShard(0, found["prompts"], found["scored"], found["candidates"], 1)
        inputs = {name: found[name] for name in ("prompts", "candidates", "scored", "fates")}
        pair = PairShard(shard=0, **inputs, out=found["pairs"], config=PairConfig(), round=1, seed=0)
        reward = FunctionScorer("length", "main", 1.0, "test_scale:lengths")
        return [(size(score), size(score([reward]))), (size(pair), size(pair(None)))]

    for (few_sent, few_back), (many_sent, many_back) in zip(weighed(4), weighed(400), strict=True):
        assert many_sent == few_sent
        assert many_back - few_back < 64, "only the numbers in it have more digits"


def lengths(prompts, completions, **columns) -> list[float]:
    """A reward: how long an answer is."""
    return [float(len(text)) for text in completions]


def size(sent) -> int:
    return len(cloudpickle.dumps(sent))


def test_stretches_of_work_are_as_many_as_there_are_pauses():
    stretches = Stretches()
    for number in (*range(0, 1000, 2), *range(1, 1000, 2)):
        stretches.add(Span("sample", float(number), number + 1.0))
        stretches.add(Span("score", number + 0.25, number + 0.75))
    assert [span for span in stretches if span.stage == "sample"] == [Span("sample", 0.0, 1000.0)]
    assert len(list(stretches)) == 1001


def test_rows_read_by_number_are_those_of_the_whole_part(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.row_groups.ROWS_A_GROUP", 7)
    pool, table = StageFolder(tmp_path / "pool", PROMPTS), prompts("train", 40, round=0)
    publish(pool, [table])
    for rows in ([], [39], [5, 3, 38, 6, 7, 0], list(range(39, -1, -1))):
        assert pool.read_rows(0, rows).equals(table.take(pa.array(rows, pa.int64())))


def test_prompts_drawn_by_several_jobs_are_those_drawn_by_one(tmp_path, monkeypatch):
    pool = StageFolder(tmp_path / "pool", PROMPTS)
    publish(pool, [prompts("train", 40, round=0)])

    def drawn(name: str, missing: list[int]) -> StageFolder:
        out = StageFolder(tmp_path / name, PROMPTS)
        drawing = DrawPrompts(
            pool=pool, out=out, round=2, before=(15,), count=33, shard_size=4, seed=1, shards=()
        ).parted(missing)
        for job in drawing:
            job(None)
        return out

    shards = list(range(9))
    whole = drawn("whole", shards)
    assert [entry.rows for entry in whole.entries()] == [4] * 8 + [1]
    monkeypatch.setattr("pipeline.jobs.inputs.MOST_ROWS_DRAWN", 8)
    assert drawn("parted", shards).digest() == whole.digest()
    some = drawn("some", [1, 2, 8])
    assert [entry.sha256 for entry in some.entries()] == [whole.entry(shard).sha256 for shard in (1, 2, 8)]


def test_damage_is_found_alike_by_the_driver_and_by_tasks(tmp_path, monkeypatch):
    def line(of: str, at_once: int) -> tuple[list[str], list[int]]:
        monkeypatch.setattr("pipeline.workshop.LOOKED_THROUGH_AT_ONCE", at_once)
        shop, folder = workshop(tmp_path / of, needs=()), StageFolder(tmp_path / of / "pool", PROMPTS)
        publish(folder, [prompts("train", 4, round=0)] * 5)
        (folder.path / "part-00001.parquet").write_bytes(b"cut")
        (folder.path / "part-00003.parquet").unlink()
        found = folder.drop_damaged(shop.damages)
        return [text.removeprefix(str(folder.path)) for text in found], folder.missing(5)

    assert line("here", 64) == line("tasks", 2)
    assert line("again", 2)[1] == [1, 3]
