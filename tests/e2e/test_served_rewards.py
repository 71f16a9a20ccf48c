"""A run scored by a reward server on this machine: stopped by one that is down, and carried on by the same command."""

from __future__ import annotations

import json

import pytest
from reward_servers import serving

pytestmark = pytest.mark.long

SMALL = ("rounds=1", "prompts.per_round=64", "prompts.shard_size=32", "evaluate.num_prompts=32", "evaluate.kl=false")


def right_digits(query, prompt, label):
    """How many characters of the answer stand where the true one has them."""
    return float(sum(one == other for one, other in zip(query[len(prompt) :], label, strict=False)))


def test_a_round_scored_by_a_server_that_was_down_at_first(prefloop):
    with serving(right_digits) as served:
        port = int(served.url.rpartition(":")[2])
        url = f"{served.url}/get_reward"
    rewards = [{"type": "http", "name": "digits", "url": url, "retries": 1, "timeout_s": 5, "batch_size": 16}]
    sets = (*SMALL, "run.name=served", "gate=null", f"score.rewards={json.dumps(rewards)}")
    stopped = prefloop.run(*sets)
    assert stopped.code == 1 and url in stopped.err and "the same command carries on" in stopped.err
    assert "Traceback" not in stopped.err
    with serving(right_digits, port=port) as served:
        done = prefloop.run(*sets)
    assert done.code == 0, done.err
    round_1 = prefloop.runs / "served" / "round-0001"
    assert json.loads((round_1 / "report.json").read_text())["score"]["num_scored"] == 64 * 8
    asked = [answer for body in served.asked for answer in zip(body["query"], body["labels"], strict=True)]
    assert len(asked) == len(set(asked)) and len(served.asked) > 5
