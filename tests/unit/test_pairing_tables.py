"""Pairing over a shard's tables: every prompt has one fate, and what Arrow takes by row is what rows say one by one."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pairing_cases import configs, table_rows, tables

from stages.contracts import FATES, GROUPS, PAIRS
from stages.errors import StageError
from stages.sample.stage import Dropped
from stages.score.config import PairConfig
from stages.score.pairing.choice import Group, ScoredAnswer, choose
from stages.score.pairing.rules import Drop
from stages.score.pairing.stage import pair
from stages.seeds import hashed_seed, row_id

BEST_WORST = PairConfig()
COSTS = frozenset({"b"})


def too_long(per_prompt):
    return [Dropped(f"p{p}", "prompt_too_long", "too long") for p, rows in enumerate(per_prompt) if not rows]


def shuffled(table, rng):
    order = list(range(table.num_rows))
    rng.shuffle(order)
    halves = table.take(pa.array(order, pa.int64()))
    return pa.concat_tables([halves.slice(0, len(order) // 2), halves.slice(len(order) // 2)])


def row_by_row(prompts, candidates, scored, config, *, needs_auxiliary):
    """The same by plain Python on plain rows."""
    rewards = {row["response_id"]: row for row in scored.to_pylist()}
    rows = []
    for prompt in prompts.to_pylist():
        mine = {r["response_id"]: r for r in candidates.to_pylist() if r["prompt_id"] == prompt["prompt_id"]}
        answers = []
        for row in mine.values():
            single = {r["name"]: r["value"] for r in rewards[row["response_id"]]["rewards"]}
            reward = rewards[row["response_id"]]["reward"]
            answers.append(
                ScoredAnswer(
                    row["response_id"],
                    row["response"],
                    None if needs_auxiliary and single["c"] is None else reward,
                    row["finish_reason"] == "length",
                    len(row["response_token_ids"]),
                    (float("nan") if single["a"] is None else single["a"], -single["b"]),
                )
            )
        seed = hashed_seed("pair", 7, 1, prompt["prompt_id"])
        choice = choose(answers, config, seed=seed) if answers else Drop("prompt_too_long")
        common = {"prompt_id": prompt["prompt_id"], "round": 1, "prompt": prompt["prompt"]}
        common |= {"prompt_token_ids": prompt["prompt_token_ids"], "policy_round": 0}
        if isinstance(choice, Group):
            group = [mine[name] for name in choice.response_ids]
            rows.append(
                common
                | {
                    "group_id": row_id("group", *sorted(choice.response_ids)),
                    "response_ids": list(choice.response_ids),
                    "responses": [row["response"] for row in group],
                    "response_token_ids": [row["response_token_ids"] for row in group],
                    "rewards": list(choice.rewards),
                }
            )
        for made in choice if isinstance(choice, list) else []:
            row = common | {"pair_id": row_id("pair", made.chosen_id, made.rejected_id), "margin": made.margin}
            for side, name, value in (
                ("chosen", made.chosen_id, made.score_chosen),
                ("rejected", made.rejected_id, made.score_rejected),
            ):
                row |= {f"{side}_id": name, f"score_{side}": value, side: mine[name]["response"]}
                row[f"{side}_token_ids"] = mine[name]["response_token_ids"]
                row[f"{side}_rewards"] = rewards[name]["rewards"]
            rows.append(row)
    return rows


@given(table_rows, configs(), st.booleans(), st.randoms())
def test_tables_are_made_of_the_rows_that_the_rule_names(per_prompt, config, needs_auxiliary, rng):
    prompts, candidates, scored = tables(per_prompt)
    wanted = row_by_row(prompts, candidates, scored, config, needs_auxiliary=needs_auxiliary)
    made, fates = pair(
        prompts,
        shuffled(candidates, rng),
        shuffled(scored, rng),
        too_long(per_prompt),
        config,
        round=1,
        seed=7,
        needs_auxiliary=needs_auxiliary,
        lower_is_better=COSTS,
    )
    contract = GROUPS if config.strategy == "groups" else PAIRS
    contract.check(made, where="made")
    FATES.check(fates, where="fates")
    assert made.to_pylist() == [{name: row[name] for name in contract.schema.names} for row in wanted]
    assert fates["prompt_id"].to_pylist() == prompts["prompt_id"].to_pylist()
    for row in fates.to_pylist():
        mine = [one for one in wanted if one["prompt_id"] == row["prompt_id"]]
        assert row["num_pairs"] == len(mine) and (row["fate"] == "paired") == bool(mine)
        assert row["num_candidates"] == len(per_prompt[int(row["prompt_id"][1:])]) >= row["num_valid"]


def test_more_rows_than_are_taken_at_once_lose_none():
    per_prompt = [[(f"text {i}", float(i), False) for i in range(3)] for _ in range(1500)]
    made, fates = pair(*tables(per_prompt), [], PairConfig(strategy="gap_band", low=0.5, high=9), round=1, seed=0)
    assert made.num_rows == 4500 == sum(fates["num_pairs"].to_pylist())
    for row in (made.slice(at, 1).to_pylist()[0] for at in (0, 4095, 4096, 4499)):
        prompt, chosen = row["chosen_id"].split("-")
        assert row["prompt"] == f"prompt {prompt[1:]}" and row["chosen"] == f"text {chosen}"
        assert row["chosen_token_ids"][1:3] == [int(prompt[1:]), int(chosen)]
    groups, _ = pair(*tables(per_prompt), [], PairConfig(strategy="groups"), round=1, seed=0)
    assert groups["response_ids"].to_pylist() == [[f"p{p}-{i}" for i in (2, 1, 0)] for p in range(1500)]


def test_a_reward_that_is_not_finite_is_none():
    prompts, candidates, scored = tables([[("a", 1.0, False), ("b", 2.0, False), ("c", 3.0, False)]])
    broken = pa.array([1.0, float("inf"), float("nan")])
    scored = scored.set_column(3, scored.schema.field(3), broken)
    _, fates = pair(prompts, candidates, scored, [], BEST_WORST, round=1, seed=0)
    assert fates.to_pylist()[0]["fate"] == "too_few_valid" and fates.to_pylist()[0]["num_valid"] == 1


def test_agreement_reads_a_cost_the_other_way_round():
    prompts, candidates, scored = tables([[("a", 1.0, False), ("b", 2.0, False)]])  # b rises with a
    agreed = PairConfig(agreement=True)
    assert pair(prompts, candidates, scored, [], agreed, round=1, seed=0)[0].num_rows == 1
    _, fates = pair(prompts, candidates, scored, [], agreed, round=1, seed=0, lower_is_better=COSTS)
    assert fates["fate"].to_pylist() == ["disagreement"]


def test_tables_that_do_not_belong_together_are_refused():
    prompts, candidates, scored = tables([[("a", 1.0, False), ("b", 0.0, False)]])
    with pytest.raises(StageError, match="scored"):
        pair(prompts, candidates, scored.slice(1), [], BEST_WORST, round=1, seed=0)
    with pytest.raises(StageError, match="candidates"):
        pair(prompts, candidates.slice(0, 0), scored, [], BEST_WORST, round=1, seed=0)
    with pytest.raises(StageError, match="prompts"):
        pair(prompts.slice(0, 0), candidates, scored, [], BEST_WORST, round=1, seed=0)
