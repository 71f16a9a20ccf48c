"""A shard's answers, read out of its tables once: joined by id, grouped by prompt, light columns only.

Texts are compared by a number that stands for them, and answers are known by length alone: what is heavy (texts, token
ids) stays in Arrow, where `stages.score.pairing.stage` takes it by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.errors import StageError
from stages.score.pairing.choice import ScoredAnswer

PROMPT_COLUMNS = ["prompt_id"]
CANDIDATE_COLUMNS = ["response_id", "prompt_id", "response", "response_token_ids", "finish_reason"]
SCORED_COLUMNS = ["response_id", "reward", "rewards"]


@dataclass(frozen=True, slots=True)
class Needs:
    """What pairing needs of the single rewards, besides their sum.

    Attributes:
        auxiliary: whether an answer without a finite value for each auxiliary reward is of no use.
        main: whether the single main rewards are looked at.
        lower_is_better: the main rewards whose weight is below 0.
    """

    auxiliary: bool = False
    main: bool = False
    lower_is_better: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Shard:
    """Answers in the order of their prompts.

    Attributes:
        prompt_ids: of every prompt, in the table's order.
        answers: of all prompts, one prompt after another.
        rows: of each of them, the row in candidates.
        scored_rows: of each row in candidates, the row in scored.
        bounds: the answers of prompt p are those from ``bounds[p]`` to ``bounds[p + 1]``.
    """

    prompt_ids: list[str]
    answers: list[ScoredAnswer]
    rows: np.ndarray
    scored_rows: np.ndarray
    bounds: list[int]

    def by_prompt(self) -> Iterator[tuple[str, list[ScoredAnswer]]]:
        """Every prompt's id, and its answers."""
        for at, prompt_id in enumerate(self.prompt_ids):
            yield prompt_id, self.answers[self.bounds[at] : self.bounds[at + 1]]


def read_shard(prompts: pa.Table, candidates: pa.Table, scored: pa.Table, needs: Needs) -> Shard:
    """The answers of a shard's tables, which may hold more than `PROMPT_COLUMNS` and so on, rows in any order.

    Raises:
        StageError: if a candidate has no row in `scored`, or its prompt none in `prompts`.
    """
    ids, prompt_ids = _column(candidates, "response_id"), _column(prompts, "prompt_id")
    scored_rows = _found(ids, _column(scored, "response_id"), ids, "a row in scored")
    of_prompt = _found(_column(candidates, "prompt_id"), prompt_ids, ids, "its prompt in prompts")
    rows = np.argsort(of_prompt, kind="stable")
    rewards, main = _usable_rewards(scored, needs)
    rewards, main = rewards[scored_rows][rows], main[scored_rows][rows]
    texts = _column(candidates, "response").dictionary_encode().indices.to_numpy()[rows]
    tokens = pc.list_value_length(_column(candidates, "response_token_ids")).to_numpy()[rows]
    truncated = pc.equal(_column(candidates, "finish_reason"), "length").to_numpy(zero_copy_only=False)[rows]
    answers = list(
        map(
            ScoredAnswer,
            ids.take(pa.array(rows)).to_pylist(),
            texts.tolist(),
            [None if reward != reward else reward for reward in rewards.tolist()],
            truncated.tolist(),
            tokens.tolist(),
            map(tuple, main.tolist()),
        )
    )
    bounds = np.searchsorted(of_prompt[rows], np.arange(len(prompt_ids) + 1)).tolist()
    return Shard(prompt_ids.to_pylist(), answers, rows, scored_rows, bounds)


def _usable_rewards(scored: pa.Table, needs: Needs) -> tuple[np.ndarray, np.ndarray]:
    """Each row's reward, NaN where it cannot be used; and its main rewards, one column each, more being better."""
    rewards = _column(scored, "reward").to_numpy(zero_copy_only=False).astype(np.float64, copy=True)
    rewards[~np.isfinite(rewards)] = np.nan
    if not (needs.auxiliary or needs.main):
        return rewards, np.empty((len(rewards), 0))
    single = _column(scored, "rewards")
    row, flat = pc.list_parent_indices(single).to_numpy(), single.flatten()
    names, roles = (np.array(flat.field(name).to_pylist(), dtype=object) for name in ("name", "role"))
    values = pc.fill_null(flat.field("value"), float("nan")).to_numpy()
    if needs.auxiliary:
        rewards[row[(roles == "auxiliary") & ~np.isfinite(values)]] = np.nan
    names_of_main = sorted(set(names[roles == "main"])) if needs.main else []
    main = np.full((len(rewards), len(names_of_main)), np.nan)
    for at, name in enumerate(names_of_main):
        mine = (roles == "main") & (names == name)
        main[row[mine], at] = -values[mine] if name in needs.lower_is_better else values[mine]
    return rewards, main


def _column(table: pa.Table, name: str) -> pa.Array:
    return table[name].combine_chunks()


def _found(keys: pa.Array, among: pa.Array, ids: pa.Array, wanted: str) -> np.ndarray:
    """The row of each key in `among`."""
    found = pc.index_in(keys, value_set=among)
    if found.null_count:
        lost = ids[pc.index(pc.is_null(found), True).as_py()].as_py()
        raise not_together("candidate", lost, wanted)
    return found.to_numpy().astype(np.int64)


def not_together(kind: str, row_id: str, wanted: str) -> StageError:
    """The refusal of tables of different origin."""
    return StageError(
        f"pair: {kind} {row_id}",
        wanted=wanted,
        got="nothing",
        fix="the shard's tables do not belong together; delete the round's folder and run again",
    )
