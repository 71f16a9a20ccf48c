"""Candidates in, rewards out: every reward on every answer, and the weighted sum that pairing goes by.

Comes in: tables of `PROMPTS` and `CANDIDATES`. Goes out: a table of `SCORED`. A reward that is not finite counts as
missing; where a reward says why it has none, the reason is kept. Standardised rewards need the whole round:
`stages.score.combine` sums them anew afterwards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stages.contracts import SCORED
from stages.protocols import NoReward, Reward
from stages.sample.stage import Dropped
from stages.score.combine import Term, combined


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the rewards said of some answers.

    Attributes:
        table: of `SCORED`.
        reasons: why an answer has not every reward, by its id, as far as a reward told.
    """

    table: pa.Table
    reasons: Mapping[str, str]

    def without_reward(self) -> list[Dropped]:
        """The prompts of which no answer has a reward, where it is known why."""
        reasons: dict[str, str] = {}
        scored = set()
        for row in self.table.select(["response_id", "prompt_id", "reward"]).to_pylist():
            if row["reward"] is not None:
                scored.add(row["prompt_id"])
            elif row["response_id"] in self.reasons:
                reasons.setdefault(row["prompt_id"], self.reasons[row["response_id"]])
        return [Dropped(name, "score_error", reason) for name, reason in reasons.items() if name not in scored]


def score(prompts: pa.Table, candidates: pa.Table, rewards: Sequence[Reward], *, round: int) -> pa.Table:
    """The table of `judge`."""
    return judge(prompts, candidates, rewards, round=round).table


def judge(prompts: pa.Table, candidates: pa.Table, rewards: Sequence[Reward], *, round: int) -> Judgement:
    """Every candidate's rewards by name, and their weighted sum over role ``main``, in the candidates' order."""
    answers = candidates.select(["response_id", "prompt_id", "response"]).to_pylist()
    by_id = {row["prompt_id"]: row for row in prompts.drop_columns(["prompt_token_ids"]).to_pylist()}
    asked = [by_id[answer["prompt_id"]] for answer in answers]
    columns = _columns(asked)
    seen = {
        "turns": [_turn(row, answer["response"]) for row, answer in zip(asked, answers, strict=True)],
        "texts": [(row["prompt"], answer["response"]) for row, answer in zip(asked, answers, strict=True)],
    }
    values = [
        reward([one for one, _ in seen[reward.sees]], [two for _, two in seen[reward.sees]], columns)
        for reward in rewards
    ]
    terms = [Term(reward.name, reward.weight) for reward in rewards if reward.role == "main"]
    rows, reasons = [], {}
    for index, answer in enumerate(answers):
        mine = [
            {"name": reward.name, "value": _finite(column[index]), "role": reward.role}
            for reward, column in zip(rewards, values, strict=True)
        ]
        for reward, column in zip(rewards, values, strict=True):
            if isinstance(none := column[index], NoReward):
                reasons[answer["response_id"]] = f"{reward.name}: {none.reason}"
        rows.append(
            {
                "response_id": answer["response_id"],
                "prompt_id": answer["prompt_id"],
                "round": round,
                "reward": combined(mine, terms),
                "rewards": mine,
            }
        )
    return Judgement(SCORED.table(rows), reasons)


def with_unscored(scored: pa.Table, candidates: pa.Table, *, round: int) -> pa.Table:
    """A table of `SCORED` filled up with candidates that no reward has seen, in the candidates' order."""
    if scored.num_rows == candidates.num_rows:
        return scored
    rows = {row["response_id"]: row for row in scored.to_pylist()}
    unscored: dict[str, Any] = {"round": round, "reward": None, "rewards": []}
    answers = candidates.select(["response_id", "prompt_id"]).to_pylist()
    return SCORED.table([rows.get(answer["response_id"]) or answer | unscored for answer in answers])


def _turn(prompt: dict[str, Any], response: str) -> tuple[Any, Any]:
    """Prompt and completion as TRL gives them to rewards: texts, or lists of messages for a chat."""
    if prompt["conversation"] is None:
        return prompt["prompt"], response
    return prompt["conversation"], [{"role": "assistant", "content": response}]


def _finite(value: float | NoReward | None) -> float | None:
    return None if value is None or isinstance(value, NoReward) or not math.isfinite(value) else value


def _columns(asked: Sequence[dict[str, Any]]) -> dict[str, list[object]]:
    """``answer`` and each extra column, one value an answer (None where the prompt has no such column)."""
    extras = [json.loads(row["extra"] or "{}") for row in asked]
    names = sorted({name for extra in extras for name in extra} - {"answer", "prompts", "completions"})
    columns: dict[str, list[object]] = {"answer": [row["answer"] for row in asked]}
    return columns | {name: [extra.get(name) for extra in extras] for name in names}
