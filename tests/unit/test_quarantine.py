"""Prompts that kill their workers: found by real deaths of real processes, set aside, and every fate adds up."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import written_run
from written_run import answers, prompts, publish

from cluster.errors import WorkerLost
from cluster.mapper import Attempt
from pipeline.artifacts import StageFolder
from pipeline.jobs import quarantine
from pipeline.jobs.answers import PairShard, ScoreShard, SumShard
from stages.contracts import CANDIDATES, FATES, PAIRS, PROMPTS, SCORED
from stages.protocols import Weights
from stages.sample.stage import Draw
from stages.score.combine import Term
from stages.score.config import PairConfig
from stages.score.functions import FunctionScorer

MODULE = """
import os

def deadly(prompts, completions, **columns):
    if any(f"train {number}:" in prompt for prompt in prompts for number in NUMBERS):
        os._exit(9)
    return [float(index) for index in range(len(completions))]
"""
WORK = """
import pickle, sys
from cluster.mapper import GoOn
job, rewards = pickle.load(sys.stdin.buffer)
while isinstance(done := job(rewards), GoOn):
    job = done.job
"""


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.setattr(written_run, "HOSTILE", ["plain", "words"])
    found = {c.name: StageFolder(tmp_path / c.name, c) for c in (PROMPTS, CANDIDATES, SCORED, PAIRS, FATES)}
    asked = prompts("train", 8, round=1)
    rows = [row | {"conversation": None} for row in asked.to_pylist()]
    publish(found["prompts"], [PROMPTS.table(rows)])
    publish(found["candidates"], [answers(rows, Weights(tmp_path, "0" * 64, 0), Draw(0, 1, 1, "policy"), 4)])
    return found


def finish(job, folder: Path, *, deadly: list[int], most: int = 2) -> int:
    """Give a scoring out again and again, as the workers do; how many died."""
    (folder / "own_rewards.py").write_text(f"NUMBERS = {deadly}\n{MODULE}")
    reward = FunctionScorer("own", "main", 1.0, "own_rewards:deadly")
    attempt = Attempt(1, job)
    while True:
        work = pickle.dumps((attempt.job, [reward]))
        path = {"PYTHONPATH": f"{Path.cwd()}:{folder}"}
        if not (code := subprocess.run([sys.executable, "-c", WORK], input=work, env=path).returncode):
            return attempt.deaths
        assert code == 9
        attempt = attempt.again(WorkerLost("scorer-0", folder / "scorer-0.log", "it exited"), most=most)


def scoring(tables) -> ScoreShard:
    return ScoreShard(0, tables["prompts"], tables["scored"], tables["candidates"], 1)


def fates(tables, scored) -> dict[str, str]:
    PairShard(
        shard=0,
        prompts=tables["prompts"],
        candidates=tables["candidates"],
        scored=scored,
        out=tables["pairs"],
        fates=tables["fates"],
        config=PairConfig(),
        round=1,
        seed=0,
    )(None)
    return {row["prompt_id"]: row["fate"] for row in tables["fates"].read(0).to_pylist()}


@pytest.mark.slow
def test_the_prompts_that_kill_are_set_aside_and_all_others_are_judged(tables, tmp_path):
    assert finish(scoring(tables), tmp_path, deadly=[2, 5]) == 4  # twice together, then each alone
    ids = tables["prompts"].read(0)["prompt_id"].to_pylist()
    entry = tables["scored"].entry(0)
    assert [drop["prompt_id"] for drop in entry.drops] == [ids[2], ids[5]]
    assert "scorer-0 at last on this prompt alone: it exited" in entry.drops[0]["detail"]
    assert entry.stats["errors"] == 0 and entry.stats["scored"] == 6 * 4
    scored = tables["scored"].read(0).to_pylist()
    assert [row["response_id"] for row in scored] == tables["candidates"].read(0)["response_id"].to_pylist()
    assert {row["prompt_id"] for row in scored if row["reward"] is None} == {ids[2], ids[5]}
    found = fates(tables, tables["scored"])
    assert sorted(found) == sorted(ids)
    assert {name for name, fate in found.items() if fate == "quarantined"} == {ids[2], ids[5]}
    assert not list((tmp_path / "scored" / "_shards").glob(".search-*"))


@pytest.mark.slow
def test_standardised_sums_keep_what_was_set_aside(tables, tmp_path):
    finish(scoring(tables), tmp_path, deadly=[2])
    out = StageFolder(tmp_path / "summed", SCORED)
    SumShard(0, tables["scored"], out, (Term("own", 1.0, 0.5, 2.0),))(None)
    assert out.entry(0).drops == tables["scored"].entry(0).drops and out.entry(0).stats["errors"] == 0
    assert list(fates(tables, out).values()).count("quarantined") == 1


@pytest.mark.slow
def test_more_than_a_few_are_not_the_prompts_fault(tables, tmp_path):
    with pytest.raises(WorkerLost):
        finish(scoring(tables), tmp_path, deadly=[1, 2, 3, 4, 5])
    assert tables["scored"].entry_or_none(0) is None


def test_a_job_without_a_culprit_ends_as_any_other(tables, tmp_path):
    lost, job = WorkerLost("scorer-0", tmp_path / "log", "it exited"), scoring(tables)
    attempt = Attempt(1, job)
    for _ in range(2):
        attempt = attempt.again(lost, most=2)
    assert attempt.job.search is not None and attempt.job.search.set_aside == ()
    with pytest.raises(WorkerLost):
        attempt.again(lost, most=2)  # it died before it tried a prompt
    with pytest.raises(WorkerLost):
        Attempt(1, job).again(lost, most=0)


@pytest.mark.slow
def test_nobody_is_set_aside_before_the_third_death_however_few_restarts_are_allowed(tables, tmp_path):
    assert finish(scoring(tables), tmp_path, deadly=[2], most=1) == 3
    assert len(tables["scored"].entry(0).drops) == 1


def test_a_search_is_parted_into_jobs_and_a_torn_line_of_its_journal_says_nothing(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(quarantine, "_STRETCH_S", 0.0)
    ids, tried = tables["prompts"].read(0)["prompt_id"].to_pylist(), []
    search = quarantine.Search.begin(tables["scored"], 0)
    assert search.go_on(ids, tried.append) and tried == ids[:1]
    with search.journal.open("a") as file:
        file.write('{"begins": "abc')
    assert search.go_on(ids[:1], tried.append) is False and tried == ids[:1]
