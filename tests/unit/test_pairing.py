"""The laws of rejection sampling into pairs."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.contracts import CANDIDATES, PROMPTS, SCORED
from stages.errors import StageError
from stages.sample.stage import Dropped
from stages.score.config import PairConfig
from stages.score.pairing import Drop, Pair, ScoredAnswer, choose_pair, pair

BEST_WORST = PairConfig()

# Rewards on a grid of eighths, so that shifting all of them is exact.
rewards = st.integers(-40, 40).map(lambda n: n / 8)
answers = st.lists(
    st.tuples(st.text("abc", min_size=1, max_size=2), st.none() | rewards, st.booleans()), min_size=1, max_size=9
).map(lambda rows: [ScoredAnswer(f"id{i}", *row) for i, row in enumerate(rows)])


@given(answers, st.randoms(), st.floats(0, 3))
def test_pairing_is_blind_to_the_order_of_arrival(rows, rng, min_margin):
    config = PairConfig(min_margin=min_margin)
    shuffled = rows.copy()
    rng.shuffle(shuffled)
    assert choose_pair(rows, config) == choose_pair(shuffled, config) or _same_fate(rows, shuffled, config)


def _same_fate(rows, shuffled, config):
    a, b = choose_pair(rows, config), choose_pair(shuffled, config)
    return isinstance(a, Drop) and isinstance(b, Drop) and a.fate == b.fate


@given(answers, st.integers(-16, 16))
def test_pairing_is_blind_to_a_constant_added_to_every_reward(rows, shift):
    shifted = [
        ScoredAnswer(r.response_id, r.text, None if r.reward is None else r.reward + shift, r.truncated) for r in rows
    ]
    a, b = choose_pair(rows, BEST_WORST), choose_pair(shifted, BEST_WORST)
    assert a == b if isinstance(a, Pair) else a.fate == b.fate


@given(answers, st.floats(0, 3))
def test_a_pair_is_the_widest_gap_between_different_usable_answers(rows, min_margin):
    chosen = choose_pair(rows, PairConfig(min_margin=min_margin))
    if isinstance(chosen, Pair):
        by_id = {row.response_id: row for row in rows}
        best, worst = by_id[chosen.chosen_id], by_id[chosen.rejected_id]
        assert best.text != worst.text
        assert not best.truncated and not worst.truncated
        assert chosen.margin == best.reward - worst.reward >= max(min_margin, 1e-9)
        first_of_text = {}
        for row in sorted(rows, key=lambda r: r.response_id):
            if row.reward is not None and not row.truncated:
                first_of_text.setdefault(row.text, row.reward)
        assert chosen.margin == max(first_of_text.values()) - min(first_of_text.values())


def made(*rows):
    return [ScoredAnswer(f"{i:02d}", text, reward, truncated) for i, (text, reward, truncated) in enumerate(rows)]


@pytest.mark.parametrize(
    ("rows", "min_margin", "fate"),
    [
        ([("a", None, False), ("b", None, True)], 0, "score_error"),
        ([("a", 1.0, True), ("b", None, False)], 0, "all_truncated"),
        ([("a", 1.0, False), ("b", 0.0, True)], 0, "too_few_valid"),
        ([("a", 1.0, False), ("a", 0.0, False)], 0, "duplicate_answers"),
        ([("a", 1.0, False), ("b", 1.0, False)], 0, "tied"),
        ([("a", 1.0, False), ("b", 0.9, False)], 0.5, "gap_too_small"),
    ],
)
def test_a_prompt_without_a_pair_has_the_first_reason_that_applies(rows, min_margin, fate):
    assert choose_pair(made(*rows), PairConfig(min_margin=min_margin)).fate == fate


def test_ties_are_broken_by_id():
    rows = made(("a", 1.0, False), ("b", 1.0, False), ("c", 0.0, False), ("d", 0.0, False))
    assert choose_pair(rows, BEST_WORST) == choose_pair(rows[::-1], BEST_WORST) == Pair("00", "02", 1.0)


def test_truncated_answers_pair_when_they_are_kept():
    rows = made(("a", 1.0, True), ("b", 0.0, True))
    assert isinstance(choose_pair(rows, PairConfig(truncated="keep")), Pair)


# ---- over tables ----------------------------------------------------------------------------------------------------


def tables(per_prompt):
    prompts, candidates, scored = [], [], []
    for p, rows in enumerate(per_prompt):
        prompts.append(
            dict(prompt_id=f"p{p}", round=1, prompt="x", conversation=None, prompt_token_ids=[1], answer=None, extra="")
        )
        for i, (text, reward, truncated) in enumerate(rows):
            ids = dict(response_id=f"p{p}-{i}", prompt_id=f"p{p}", round=1)
            candidates.append(
                ids
                | dict(
                    stream="policy",
                    sample_index=i,
                    response=text,
                    response_token_ids=[5, 2],
                    response_logps=[-1.0, -0.5],
                    finish_reason="length" if truncated else "stop",
                    policy_version="w",
                    policy_round=0,
                    seed=i,
                )
            )
            scored.append(ids | dict(reward=reward, rewards=[dict(name="r", value=reward, role="main")]))
    return PROMPTS.table(prompts), CANDIDATES.table(candidates), SCORED.table(scored)


@given(
    st.lists(
        st.lists(st.tuples(st.text("abc", min_size=1, max_size=2), st.none() | rewards, st.booleans()), max_size=5),
        min_size=1,
        max_size=5,
    ),
    st.randoms(),
)
def test_every_prompt_has_one_fate_and_pairs_do_not_depend_on_row_order(per_prompt, rng):
    prompts, candidates, scored = tables(per_prompt)
    dropped = [Dropped(f"p{p}", "prompt_too_long", "too long") for p, rows in enumerate(per_prompt) if not rows]
    order = list(range(candidates.num_rows))
    rng.shuffle(order)
    for cands, scores in ((candidates, scored), (candidates.take(pa.array(order, pa.int64())), scored.slice(0))):
        pairs, fates = pair(prompts, cands, scores, dropped, BEST_WORST, round=1)
        assert fates["prompt_id"].to_pylist() == prompts["prompt_id"].to_pylist()
        assert sum(fates["num_pairs"].to_pylist()) == pairs.num_rows
        assert sum(f == "paired" for f in fates["fate"].to_pylist()) == pairs.num_rows
        ids = sorted(pairs["pair_id"].to_pylist())
        assert len(set(ids)) == len(ids)
        if cands is candidates:
            expected = ids
    assert ids == expected


def test_tables_that_do_not_belong_together_are_refused():
    prompts, candidates, scored = tables([[("a", 1.0, False), ("b", 0.0, False)]])
    with pytest.raises(StageError, match="scored"):
        pair(prompts, candidates, scored.slice(1), [], BEST_WORST, round=1)
    with pytest.raises(StageError, match="candidates"):
        pair(prompts, candidates.slice(0, 0), scored, [], BEST_WORST, round=1)
