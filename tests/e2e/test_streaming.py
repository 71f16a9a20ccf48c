"""Stages of a round side by side, shard by shard: the same policy, earlier."""

from __future__ import annotations

import json

import pytest

from stages.weights import weights_sha256

pytestmark = pytest.mark.long

TINY = ("prompts.per_round=192", "prompts.shard_size=16", "evaluate.num_prompts=32", "rounds=1")


@pytest.fixture(scope="module")
def by_streaming(prefloop):
    found = {}
    for streaming in ("on", "off"):
        result = prefloop.run(*TINY, f"run.name=streaming-{streaming}", f"cluster.streaming={streaming}")
        assert result.code == 0, result.err
        found[streaming] = prefloop.runs / f"streaming-{streaming}" / "round-0001"
    return found


def spans(folder, stage):
    timeline = json.loads((folder / "report.json").read_text())["timeline"]
    return [(span["start_s"], span["end_s"]) for span in timeline if span["stage"] == stage]


def test_scoring_starts_on_the_first_shard_while_sampling_goes_on(by_streaming):
    assert spans(by_streaming["on"], "score")[0][0] < spans(by_streaming["on"], "sample")[-1][1]
    assert spans(by_streaming["off"], "score")[0][0] >= spans(by_streaming["off"], "sample")[-1][1]


def test_pairing_follows_before_scoring_is_done(by_streaming):
    assert spans(by_streaming["on"], "pair")[0][0] < spans(by_streaming["on"], "score")[-1][1]


def test_the_policy_is_the_same(by_streaming):
    policies = {weights_sha256(folder / "policy") for folder in by_streaming.values()}
    assert len(policies) == 1
