"""Rejection sampling: one prompt's scored answers in, a chosen/rejected pair or the reason for none out.

The pairing rule is `choose_pair`: pure, blind to the order of the answers and to a constant added to every reward.
`pair` applies it to a shard's tables and gives every prompt its fate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stages.contracts import FATES, PAIRS
from stages.errors import StageError
from stages.sample.stage import Dropped
from stages.score.config import PairConfig
from stages.seeds import row_id
from stages.vocab import Fate


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """What pairing knows of an answer; `reward` is None where none could be had."""

    response_id: str
    text: str
    reward: float | None
    truncated: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers by id; `margin` is the chosen one's reward less the rejected one's, above 0."""

    chosen_id: str
    rejected_id: str
    margin: float


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a prompt makes no pair."""

    fate: Fate
    detail: str = ""


def valid_answers(answers: Sequence[ScoredAnswer], config: PairConfig) -> list[ScoredAnswer]:
    """The answers that pairing may use: scored, and ended by themselves unless ``truncated: keep``."""
    return [
        answer
        for answer in answers
        if answer.reward is not None and (config.truncated == "keep" or not answer.truncated)
    ]


def choose_pair(answers: Sequence[ScoredAnswer], config: PairConfig) -> Pair | Drop:
    """Best against worst answer to one prompt, or why there is no pair.

    Equal texts count as one answer. Ties are broken by id, so that the order of arrival does not matter.
    Source: best-of-n against worst-of-n, as RLHFlow pairs (arXiv:2405.07863).
    """
    scored = [answer for answer in answers if answer.reward is not None]
    if not scored:
        return Drop("score_error", f"none of {len(answers)} answers has a finite reward")
    valid = valid_answers(answers, config)
    if not valid:
        return Drop("all_truncated", f"all {len(scored)} answers ended at max_new_tokens")
    if len(valid) < 2:
        return Drop("too_few_valid", f"1 of {len(answers)} answers is usable")
    distinct: dict[str, ScoredAnswer] = {}
    for answer in sorted(valid, key=lambda a: a.response_id):
        distinct.setdefault(answer.text, answer)
    if len(distinct) < 2:
        return Drop("duplicate_answers", f"{len(valid)} answers, one text")
    ranked = sorted(distinct.values(), key=lambda a: (a.reward, a.response_id))
    worst, best = ranked[0], min((a for a in ranked if a.reward == ranked[-1].reward), key=lambda a: a.response_id)
    assert best.reward is not None and worst.reward is not None
    margin = best.reward - worst.reward
    if margin == 0:
        return Drop("tied", f"{len(distinct)} different answers, one reward: {best.reward:.6g}")
    if margin < config.min_margin:
        return Drop("gap_too_small", f"{margin:.6g} < {config.min_margin:g}")
    return Pair(best.response_id, worst.response_id, margin)


def pair(
    prompts: pa.Table,
    candidates: pa.Table,
    scored: pa.Table,
    dropped: Sequence[Dropped],
    config: PairConfig,
    *,
    round: int,
) -> tuple[pa.Table, pa.Table]:
    """The pairs of one shard, and the fate of each of its prompts.

    Args:
        prompts: a table of `PROMPTS`.
        candidates: their `CANDIDATES`.
        scored: the candidates' `SCORED`, in any order.
        dropped: the prompts that sampling left without candidates, and why.

    Returns:
        Tables of `PAIRS` and `FATES`; the fates are as many as the prompts.

    Raises:
        StageError: if a candidate has no row in `scored`, or a prompt has neither candidates nor a reason.
    """
    rewards = {row["response_id"]: row for row in scored.to_pylist()}
    answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in candidates.to_pylist():
        if row["response_id"] not in rewards:
            raise _lost("candidate", row["response_id"], "a row in scored")
        answers[row["prompt_id"]].append(row)
    reasons = {drop.prompt_id: drop for drop in dropped}

    pairs, fates = [], []
    for prompt in prompts.to_pylist():
        prompt_id = prompt["prompt_id"]
        mine = answers.get(prompt_id, [])
        if not mine and prompt_id not in reasons:
            raise _lost("prompt", prompt_id, "candidates, or a reason for none")
        usable = [
            ScoredAnswer(
                row["response_id"],
                row["response"],
                rewards[row["response_id"]]["reward"],
                row["finish_reason"] == "length",
            )
            for row in mine
        ]
        chosen = choose_pair(usable, config) if mine else _as_drop(reasons[prompt_id])
        if isinstance(chosen, Pair):
            pairs.append(_pair_row(prompt, {row["response_id"]: row for row in mine}, rewards, chosen, round))
        fates.append(_fate_row(prompt_id, chosen, len(mine), len(valid_answers(usable, config)), round))
    return PAIRS.table(pairs), FATES.table(fates)


def _as_drop(dropped: Dropped) -> Drop:
    return Drop(dropped.fate, dropped.detail)


def _fate_row(prompt_id: str, chosen: Pair | Drop, num_candidates: int, num_valid: int, round: int) -> dict[str, Any]:
    paired = isinstance(chosen, Pair)
    return {
        "prompt_id": prompt_id,
        "round": round,
        "fate": "paired" if isinstance(chosen, Pair) else chosen.fate,
        "detail": "" if isinstance(chosen, Pair) else chosen.detail,
        "num_candidates": num_candidates,
        "num_valid": num_valid,
        "num_pairs": int(paired),
    }


def _pair_row(
    prompt: Mapping[str, Any],
    answers: Mapping[str, Mapping[str, Any]],
    rewards: Mapping[str, Mapping[str, Any]],
    pair: Pair,
    round: int,
) -> dict[str, Any]:
    chosen, rejected = answers[pair.chosen_id], answers[pair.rejected_id]
    return {
        "pair_id": row_id("pair", pair.chosen_id, pair.rejected_id),
        "prompt_id": prompt["prompt_id"],
        "chosen_id": pair.chosen_id,
        "rejected_id": pair.rejected_id,
        "round": round,
        "prompt": prompt["prompt"],
        "chosen": chosen["response"],
        "rejected": rejected["response"],
        "score_chosen": rewards[pair.chosen_id]["reward"],
        "score_rejected": rewards[pair.rejected_id]["reward"],
        "margin": pair.margin,
        "prompt_token_ids": prompt["prompt_token_ids"],
        "chosen_token_ids": chosen["response_token_ids"],
        "rejected_token_ids": rejected["response_token_ids"],
        "chosen_rewards": rewards[pair.chosen_id]["rewards"],
        "rejected_rewards": rewards[pair.rejected_id]["rewards"],
        "policy_round": chosen["policy_round"],
    }


def _lost(kind: str, row: str, wanted: str) -> StageError:
    return StageError(
        f"pair: {kind} {row}",
        wanted=wanted,
        got="nothing",
        fix="the shard's tables do not belong together; delete the round's folder and run again",
    )
