"""What the tests of pairing have in common: random answers, a config for every strategy, and tables of answers."""

from __future__ import annotations

from hypothesis import strategies as st

from stages.contracts import CANDIDATES, PROMPTS, SCORED
from stages.score.config import OWN_SETTINGS, PairConfig
from stages.score.pairing.choice import ScoredAnswer

STRATEGIES = tuple(OWN_SETTINGS)
OF_PAIRS = tuple(strategy for strategy in STRATEGIES if strategy != "groups")

# Rewards on a grid of eighths, so that shifting all of them, or doubling them, is exact.
rewards = st.integers(-40, 40).map(lambda n: n / 8)


def answer_lists(*, max_size=9, with_gaps=True):
    """Answers with repeated texts and rewards, missing rewards, and truncated ones."""
    row = st.tuples(
        st.text("abcd", min_size=1, max_size=2),
        st.none() | rewards if with_gaps else rewards,
        st.booleans() if with_gaps else st.just(False),
        st.integers(1, 12),
        st.tuples(rewards, rewards),
    )
    named = st.lists(row, min_size=1, max_size=max_size)
    return named.map(lambda rows: [ScoredAnswer(f"id{i}", *row) for i, row in enumerate(rows)])


@st.composite
def configs(draw, strategies=STRATEGIES, *, with_options=True):
    """A config of one of the strategies, its own settings drawn within their ranges, all options among them."""
    strategy = draw(st.sampled_from(strategies))
    own = {
        "all_above": {"tau": st.sampled_from([0.5, 1.0, 4.0]), "eta": st.sampled_from([0.3, 0.6, 0.85, 0.99])},
        "top_bottom": {"k": st.integers(1, 5)},
        "gap_band": {
            "low": st.sampled_from([0.0, 0.25]),
            "high": st.sampled_from([0.5, 1.0]),
            "unit": st.sampled_from(["reward", "quantile"]),
        },
        "correct_wrong": {"correct_at": rewards, "num_pairs": st.integers(1, 12)},
        "statistical": {
            "beta": st.sampled_from([0.1, 1.0, 50.0]),
            "num_accepted": st.integers(2, 8),
            "ranking": st.sampled_from(["first_round", "tournament"]),
        },
    }.get(strategy, {})
    options = {"truncated": st.sampled_from(["drop", "keep"]), "length_penalty": st.sampled_from([0.0, 0.125])}
    if strategy != "groups":
        options |= {
            "min_margin": st.sampled_from([0.0, 0.5, 3.0]),
            "max_length_ratio": st.sampled_from([None, 1.0, 2.0]),
            "agreement": st.booleans(),
            "max_pairs": st.sampled_from([None, 1, 3]),
        }
    drawn = {name: draw(values) for name, values in (own | (options if with_options else {})).items()}
    return PairConfig(strategy=strategy, **drawn)


def tables(per_prompt):
    """Prompts, candidates and scored, as PROMPTS, CANDIDATES and SCORED; each answer is a text, a reward, a flag."""
    prompts, candidates, scored = [], [], []
    for p, rows in enumerate(per_prompt):
        prompts.append(
            dict(
                prompt_id=f"p{p}",
                round=1,
                prompt=f"prompt {p}",
                conversation=None,
                prompt_token_ids=[1, p],
                answer=None,
                extra="",
            )
        )
        for i, (text, reward, truncated) in enumerate(rows):
            ids = dict(response_id=f"p{p}-{i}", prompt_id=f"p{p}", round=1)
            tokens = [5, p, i, *range(len(text)), 2]
            candidates.append(
                ids
                | dict(
                    stream="policy",
                    sample_index=i,
                    response=text,
                    response_token_ids=tokens,
                    response_logps=[-1.0] * len(tokens),
                    finish_reason="length" if truncated else "stop",
                    policy_version="w",
                    policy_round=0,
                    seed=i,
                )
            )
            parts = [("a", reward, "main"), ("b", i / 8, "main"), ("c", None if i == 3 else 1.0, "auxiliary")]
            single = [dict(name=name, value=value, role=role) for name, value, role in parts]
            scored.append(ids | dict(reward=reward, rewards=single))
    return PROMPTS.table(prompts), CANDIDATES.table(candidates), SCORED.table(scored)


table_rows = st.lists(
    st.lists(st.tuples(st.text("abc", min_size=1, max_size=2), st.none() | rewards, st.booleans()), max_size=6),
    min_size=1,
    max_size=5,
)
