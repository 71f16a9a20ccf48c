"""What the trainer reads out of the tables: pairs with their auxiliary rewards and streams, and groups."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

from stages.contracts import CANDIDATES, PAIRS
from stages.errors import StageError
from stages.update.rows import GroupRow, answers_of, group_rows, pair_rows, reference_logps, rows_a_forward


def rewards(**values):
    roles = {"polite": "auxiliary", "short": "auxiliary"}
    return [{"name": name, "value": value, "role": roles.get(name, "main")} for name, value in values.items()]


def pair(number: int, prompt: str, **changed):
    return {
        "pair_id": f"pair-{number}",
        "prompt_id": prompt,
        "chosen_id": f"c{number}",
        "rejected_id": f"r{number}",
        "round": 1,
        "prompt": "?",
        "chosen": "yes",
        "rejected": "no",
        "score_chosen": 2.0,
        "score_rejected": 0.5,
        "margin": 1.5,
        "prompt_token_ids": [1, number],
        "chosen_token_ids": [5, 2],
        "rejected_token_ids": [6, 7, 2],
        "chosen_rewards": rewards(judge=1.0, polite=0.5, short=2.0),
        "rejected_rewards": rewards(judge=0.0, polite=-1.0, short=1.0),
        "policy_round": 0,
        **changed,
    }


def drawn(key: str, prompt: str, token_ids: list[int]):
    return {
        "response_id": key,
        "prompt_id": prompt,
        "round": 1,
        "stream": "initial",
        "sample_index": 0,
        "response": "",
        "response_token_ids": token_ids,
        "response_logps": [-1.0] * len(token_ids),
        "finish_reason": "stop",
        "policy_version": "",
        "policy_round": 0,
        "seed": 0,
    }


def test_auxiliary_rewards_are_weighted_and_missing_where_one_is():
    given = [pair(0, "a"), pair(1, "b", rejected_rewards=rewards(judge=1.0, polite=None, short=1.0))]
    given.append(pair(2, "c", chosen_rewards=[], rejected_rewards=[], score_chosen=None))
    first, second, third = pair_rows([PAIRS.table(given)], aux_weights={"polite": 2.0, "short": 0.25})
    assert (first.aux_chosen, first.aux_rejected) == (1.5, -1.75)
    assert (second.aux_chosen, second.aux_rejected) == (1.5, None)
    assert (third.aux_chosen, third.aux_rejected, third.score_chosen, third.score_rejected) == (None, None, None, 0.5)
    assert pair_rows([PAIRS.table(given)])[0].aux_chosen is None


def test_a_main_reward_is_no_auxiliary_one():
    (row,) = pair_rows([PAIRS.table([pair(0, "a")])], aux_weights={"judge": 1.0})
    assert row.aux_chosen is None


def test_a_prompts_pairs_take_its_streams_answers_in_turn_whatever_the_order_of_rows_and_shards():
    pairs = [pair(number, "ab"[number % 2]) for number in range(6)] + [pair(6, "none")]
    answers = [drawn("s2", "a", [8]), drawn("s1", "a", [9, 2]), drawn("s3", "b", []), drawn("s4", "other", [1])]
    orders = []
    for seed in range(3):
        rng = random.Random(seed)
        mixed, mixed_answers = rng.sample(pairs, len(pairs)), rng.sample(answers, len(answers))
        shards = [PAIRS.table(mixed[:3]), PAIRS.table(mixed[3:])]
        orders.append(pair_rows(shards, stream=[CANDIDATES.table(mixed_answers)]))
    assert orders[0] == orders[1] == orders[2]
    streams = {row.pair_id: row.stream for row in orders[0]}
    taken = {key: stream and (stream.response_id, stream.token_ids) for key, stream in streams.items()}
    assert [taken[f"pair-{i}"] for i in (0, 2, 4)] == [("s1", [9, 2]), ("s2", [8]), ("s1", [9, 2])]
    assert {taken[f"pair-{i}"] for i in (1, 3, 5, 6)} == {None}
    assert streams["pair-2"].prompt_token_ids == [1, 2]


def group(key: str, rewards: list[float]):
    size = len(rewards)
    return {
        "group_id": key,
        "prompt_id": "p",
        "prompt": "?",
        "response_ids": [f"{key}{k}" for k in range(size)],
        "prompt_token_ids": [1],
        "response_token_ids": [[4] * (k + 1) for k in range(size)],
        "rewards": rewards,
    }


def test_groups_are_read_in_the_order_of_their_ids_with_the_best_and_the_worst_answer():
    table = pa.Table.from_pylist([group("y", [0.0, 3.0, 3.0]), group("x", [1.0, 0.5, 0.5, 0.7])])
    first, second = group_rows([table])
    assert (first.group_id, second.group_id) == ("x", "y")
    assert (first.best, first.worst, first.num_chosen_tokens) == (0, 1, 1)
    assert (second.best, second.worst, second.num_chosen_tokens) == (1, 0, 2)
    turned = GroupRow("y", "p", ["y2", "y1", "y0"], [1], [[4], [4, 4], [4]], [3.0, 3.0, 0.0])
    assert turned.response_ids[turned.best] == "y1"


def test_a_forward_holds_as_many_answers_as_pairs_do_and_at_least_one_group():
    pairs = pair_rows([PAIRS.table([pair(0, "a")])])
    groups = group_rows([pa.Table.from_pylist([group("x", [0.0] * 5), group("y", [0.0] * 2)])])
    assert [rows_a_forward(pairs, micro_batch_size=size) for size in (1, 8)] == [1, 8]
    assert [rows_a_forward(groups, micro_batch_size=size) for size in (1, 4, 5, 10)] == [1, 1, 2, 4]


def test_a_groups_answers_need_reference_log_probs_too():
    rows = group_rows([pa.Table.from_pylist([group("x", [0.0, 1.0])])])
    assert [answer.response_id for answer in answers_of(rows)] == ["x0", "x1"]
    table = pa.table({"response_id": ["x0"], "logp": [-1.0]})
    with pytest.raises(StageError, match="answer x1"):
        reference_logps([table], rows)
