"""A real story model with tied embeddings, whose bos is its eos, on real prompts; skipped where the data are not."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pyarrow.dataset as ds
import pytest

DATA = Path(os.environ.get("PREFLOOP_TEST_DATA", "/nowhere"))

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not DATA.is_dir(), reason="PREFLOOP_TEST_DATA names no folder with real data"),
]


@pytest.fixture(scope="module")
def stories(prefloop):
    outcome = prefloop.run(
        f"policy.path={DATA / 'stories260k'}",
        f"prompts.path={DATA / 'tinystories' / 'prompts.jsonl'}",
        "prompts.shard_size=32",
        "evaluate.num_prompts=64",
        f"evaluate.texts.path={DATA / 'tinystories' / 'stories.jsonl'}",
        config="configs/stories.yaml",
    )
    return outcome, prefloop.runs / "stories"


def table(folder, name):
    return ds.dataset(sorted((folder / name).glob("part-*.parquet"))).to_table().to_pylist()


def test_the_reward_rises(stories):
    outcome, folder = stories
    assert outcome.code == 0, outcome.err
    rounds = json.loads((folder / "report.json").read_text())["rounds"]
    first, last = rounds[0]["evaluate"], rounds[-1]["evaluate"]
    assert last["reward"] > first["reward"] + 2 * first["reward_se"]


def test_real_stories_stay_nearly_as_likely_as_they_were(stories):
    rounds = json.loads((stories[1] / "report.json").read_text())["rounds"]
    first, last = (rounds[index]["evaluate"]["texts_nll"] for index in (0, -1))
    assert 1.0 < first < 2.0
    assert last < first + 0.15


def test_the_divergence_from_the_first_policy_is_seen(stories):
    rounds = json.loads((stories[1] / "report.json").read_text())["rounds"]
    kl = [report["evaluate"]["kl"] for report in rounds]
    assert kl[0] == 0.0
    assert all(later > earlier for earlier, later in pairwise(kl))


def test_with_tied_embeddings_engine_and_trainer_agree_in_every_round(stories):
    rounds = json.loads((stories[1] / "report.json").read_text())["rounds"]
    assert all(report["engine_gap"] < 1e-4 for report in rounds[1:])
    config = json.loads((stories[1] / "final" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True


def test_a_prompt_begins_with_one_bos_and_an_answer_keeps_its_end(stories):
    prompts, candidates = (table(stories[1] / "round-0001", name) for name in ("prompts", "candidates"))
    for row in prompts:
        assert row["prompt_token_ids"][0] == 1 and 1 not in row["prompt_token_ids"][1:]
    for row in candidates:
        ids = row["response_token_ids"]
        assert (ids[-1] == 1) == (row["finish_reason"] == "stop")
        assert 1 not in ids[:-1]
        assert "<s>" not in row["response"]
