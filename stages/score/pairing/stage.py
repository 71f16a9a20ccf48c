"""A shard's prompts, candidates and rewards in, its pairs or groups and every prompt's fate out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from stages.contracts import FATES
from stages.sample.stage import Dropped
from stages.score.config import PairConfig
from stages.score.pairing.choice import Choice, Group, ScoredAnswer, choose, valid_answers
from stages.score.pairing.rules import Drop
from stages.score.pairing.shard import Needs, Shard, not_together, read_shard
from stages.score.pairing.tables import Taken
from stages.seeds import hashed_seed


def pair(
    prompts: pa.Table,
    candidates: pa.Table,
    scored: pa.Table,
    dropped: Sequence[Dropped],
    config: PairConfig,
    *,
    round: int,
    seed: int,
    needs_auxiliary: bool = False,
    lower_is_better: frozenset[str] = frozenset(),
) -> tuple[pa.Table, pa.Table]:
    """The pairs of one shard, or its groups, and the fate of each of its prompts.

    Args:
        prompts: a table of `PROMPTS`.
        candidates: their `CANDIDATES`.
        scored: the candidates' `SCORED`, in any order.
        dropped: the prompts that sampling left without candidates, or scoring without rewards, and why.
        seed: the run's; what a strategy draws, it draws by this, the round and the prompt's id.
        needs_auxiliary: whether an answer without all auxiliary rewards is of no use, since the update trains on them.
        lower_is_better: main rewards whose weight is below 0, for `agreement`.

    Returns:
        A table of `PAIRS` (of `GROUPS` with that strategy), and of `FATES`, as many as the prompts.

    Raises:
        StageError: if a candidate has no row in `scored` or `prompts`, or a prompt neither candidates nor a reason.
    """
    needs = Needs(auxiliary=needs_auxiliary, main=config.agreement, lower_is_better=lower_is_better)
    shard = read_shard(prompts, candidates, scored, needs)
    choices, fates = [], []
    for prompt_id, answers, choice in choices_of(shard, dropped, config, round=round, seed=seed):
        choices.append(choice)
        fates.append(_fate_row(prompt_id, answers, choice, config, round))
    taken = Taken(prompts.combine_chunks(), candidates.combine_chunks(), scored.combine_chunks(), shard, round)
    if config.strategy == "groups":
        return taken.groups([(row, c) for row, c in enumerate(choices) if isinstance(c, Group)]), FATES.table(fates)
    found = [(row, pair) for row, choice in enumerate(choices) if isinstance(choice, list) for pair in choice]
    return taken.pairs(found), FATES.table(fates)


def choices_of(
    shard: Shard, dropped: Sequence[Dropped], config: PairConfig, *, round: int, seed: int
) -> Iterator[tuple[str, list[ScoredAnswer], Choice]]:
    """Each prompt's id, its answers, and what becomes of it; arguments and errors as of `pair`."""
    reasons = {drop.prompt_id: drop for drop in dropped}
    for prompt_id, answers in shard.by_prompt():
        if (reason := reasons.get(prompt_id)) is not None:
            yield prompt_id, answers, Drop(reason.fate, reason.detail)
        elif answers:
            yield prompt_id, answers, choose(answers, config, seed=hashed_seed("pair", seed, round, prompt_id))
        else:
            raise not_together("prompt", prompt_id, "candidates, or a reason for none")


def _fate_row(
    prompt_id: str, answers: Sequence[ScoredAnswer], choice: Choice, config: PairConfig, round: int
) -> dict[str, Any]:
    fate, detail = (choice.fate, choice.detail) if isinstance(choice, Drop) else ("paired", "")
    return {
        "prompt_id": prompt_id,
        "round": round,
        "fate": fate,
        "detail": detail,
        "num_candidates": len(answers),
        "num_valid": len(valid_answers(answers, config)),
        "num_pairs": len(choice) if isinstance(choice, list) else int(isinstance(choice, Group)),
    }
