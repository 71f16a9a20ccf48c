"""Pairs and groups by id in, their tables out: every heavy column is taken by row, and never leaves Arrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, TypeVar

import pyarrow as pa

from stages.contracts import GROUPS, PAIRS, Contract
from stages.score.pairing.choice import Group, Pair
from stages.score.pairing.shard import Shard
from stages.seeds import row_id

_PAIRS_AT_ONCE = 4096  # Arrow counts the tokens and the characters of one array in 32 bits
_GROUPS_AT_ONCE = 256

Row = TypeVar("Row")


class Taken:
    """The tables that pairs and groups are taken from, each in one chunk.

    Args:
        prompts: a table of `PROMPTS`.
        candidates: a table of `CANDIDATES`.
        scored: a table of `SCORED`.
        shard: read from these three.
        round: the number of the round.
    """

    def __init__(self, prompts: pa.Table, candidates: pa.Table, scored: pa.Table, shard: Shard, round: int) -> None:
        self._prompts, self._candidates, self._scored, self._round = prompts, candidates, scored, round
        self._scored_rows = shard.scored_rows
        ids = (answer.response_id for answer in shard.answers)
        self._rows = dict(zip(ids, shard.rows.tolist(), strict=True))

    def pairs(self, found: Sequence[tuple[int, Pair]]) -> pa.Table:
        """Pairs, each with the row of its prompt, as a table of `PAIRS`."""
        parts = [self._pairs(part) for part in _cut(found, _PAIRS_AT_ONCE)]
        return pa.concat_tables([PAIRS.table([]), *parts])

    def groups(self, found: Sequence[tuple[int, Group]]) -> pa.Table:
        """Groups, each with the row of its prompt, as a table of `GROUPS`."""
        parts = [self._groups(part) for part in _cut(found, _GROUPS_AT_ONCE)]
        return pa.concat_tables([GROUPS.table([]), *parts])

    def _pairs(self, found: Sequence[tuple[int, Pair]]) -> pa.Table:
        prompts, pairs = pa.array([row for row, _ in found]), [pair for _, pair in found]
        columns: dict[str, Any] = {
            "pair_id": [row_id("pair", pair.chosen_id, pair.rejected_id) for pair in pairs],
            "prompt_id": self._prompts["prompt_id"].take(prompts),
            "prompt": self._prompts["prompt"].take(prompts),
            "prompt_token_ids": self._prompts["prompt_token_ids"].take(prompts),
            "score_chosen": [pair.score_chosen for pair in pairs],
            "score_rejected": [pair.score_rejected for pair in pairs],
            "margin": [pair.margin for pair in pairs],
        }
        chosen, rejected = [pair.chosen_id for pair in pairs], [pair.rejected_id for pair in pairs]
        columns |= self._side("chosen", chosen) | self._side("rejected", rejected)
        columns["policy_round"] = self._candidates["policy_round"].take(self._rows_of(chosen)[0])
        return self._table(PAIRS, columns, len(pairs))

    def _side(self, side: str, ids: Sequence[str]) -> dict[str, Any]:
        rows, scored_rows = self._rows_of(ids)
        return {
            f"{side}_id": ids,
            side: self._candidates["response"].take(rows),
            f"{side}_token_ids": self._candidates["response_token_ids"].take(rows),
            f"{side}_rewards": self._scored["rewards"].take(scored_rows),
        }

    def _groups(self, found: Sequence[tuple[int, Group]]) -> pa.Table:
        prompts, groups = pa.array([row for row, _ in found]), [group for _, group in found]
        ids = list(chain.from_iterable(group.response_ids for group in groups))
        rows, _ = self._rows_of(ids)
        ends = [0]
        for group in groups:
            ends.append(ends[-1] + len(group.response_ids))

        def nested(values: Any) -> pa.Array:
            flat = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else pa.array(values)
            return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat)

        columns = {
            "group_id": [row_id("group", *sorted(group.response_ids)) for group in groups],
            "prompt_id": self._prompts["prompt_id"].take(prompts),
            "response_ids": nested(ids),
            "prompt": self._prompts["prompt"].take(prompts),
            "responses": nested(self._candidates["response"].take(rows)),
            "prompt_token_ids": self._prompts["prompt_token_ids"].take(prompts),
            "response_token_ids": nested(self._candidates["response_token_ids"].take(rows)),
            "rewards": nested(list(chain.from_iterable(group.rewards for group in groups))),
            "policy_round": self._candidates["policy_round"].take(rows.take(pa.array(ends[:-1]))),
        }
        return self._table(GROUPS, columns, len(groups))

    def _rows_of(self, ids: Sequence[str]) -> tuple[pa.Array, pa.Array]:
        """The rows of some answers in candidates and in scored."""
        rows = [self._rows[response_id] for response_id in ids]
        return pa.array(rows, pa.int64()), pa.array(self._scored_rows[rows])

    def _table(self, contract: Contract, columns: dict[str, Any], num_rows: int) -> pa.Table:
        columns["round"] = pa.array([self._round] * num_rows, pa.int32())
        return pa.table({name: columns[name] for name in contract.schema.names}, schema=contract.schema)


def _cut(found: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    return (found[at : at + size] for at in range(0, len(found), size))
