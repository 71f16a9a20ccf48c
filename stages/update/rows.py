"""The rows of the update: pairs and groups as token ids, and the log-probs of their answers under a reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from stages.contracts import PROBE, REFERENCE_LOGPS
from stages.errors import StageError
from stages.protocols import Weights


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """One answer whose log-prob is wanted."""

    response_id: str
    prompt_token_ids: list[int]
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class PairRow:
    """One pair to train on: ids for joining, tokens for the model.

    Attributes:
        score_chosen, score_rejected: rewards; None where pairs came without.
        aux_chosen, aux_rejected: weighted sums of the answers' auxiliary rewards; None where they have none.
        stream: an answer to the same prompt drawn from the reference, where there is one.
    """

    pair_id: str
    chosen_id: str
    rejected_id: str
    prompt_token_ids: list[int]
    chosen_token_ids: list[int]
    rejected_token_ids: list[int]
    prompt_id: str = ""
    score_chosen: float | None = None
    score_rejected: float | None = None
    aux_chosen: float | None = None
    aux_rejected: float | None = None
    stream: AnswerRow | None = None

    @property
    def row_id(self) -> str:
        return self.pair_id

    @property
    def num_answers(self) -> int:
        return 2

    @property
    def num_chosen_tokens(self) -> int:
        return len(self.chosen_token_ids)

    @property
    def answers(self) -> list[AnswerRow]:
        """Chosen and rejected."""
        return [
            AnswerRow(self.chosen_id, self.prompt_token_ids, self.chosen_token_ids),
            AnswerRow(self.rejected_id, self.prompt_token_ids, self.rejected_token_ids),
        ]


@dataclass(frozen=True, slots=True)
class GroupRow:
    """All usable answers to one prompt with their rewards; at least two, and in one order in every list."""

    group_id: str
    prompt_id: str
    response_ids: list[str]
    prompt_token_ids: list[int]
    response_token_ids: list[list[int]]
    rewards: list[float]

    @property
    def row_id(self) -> str:
        return self.group_id

    @property
    def best(self) -> int:
        """The place of the answer with the highest reward; of equal ones, the first by id."""
        return min(range(self.num_answers), key=lambda i: (-self.rewards[i], self.response_ids[i]))

    @property
    def worst(self) -> int:
        """The place of the answer with the lowest reward; of equal ones, the first by id."""
        return min(range(self.num_answers), key=lambda i: (self.rewards[i], self.response_ids[i]))

    @property
    def num_answers(self) -> int:
        return len(self.response_ids)

    @property
    def num_chosen_tokens(self) -> int:
        """Tokens of the best answer."""
        return len(self.response_token_ids[self.best])

    @property
    def answers(self) -> list[AnswerRow]:
        """In the row's order."""
        return [
            AnswerRow(key, self.prompt_token_ids, token_ids)
            for key, token_ids in zip(self.response_ids, self.response_token_ids, strict=True)
        ]


Row = PairRow | GroupRow

_PAIR_COLUMNS = [
    "pair_id",
    "chosen_id",
    "rejected_id",
    "prompt_token_ids",
    "chosen_token_ids",
    "rejected_token_ids",
    "prompt_id",
    "score_chosen",
    "score_rejected",
]
_GROUP_COLUMNS = ["group_id", "prompt_id", "response_ids", "prompt_token_ids", "response_token_ids", "rewards"]


def pair_rows(
    tables: Iterable[pa.Table], *, aux_weights: Mapping[str, float] | None = None, stream: Iterable[pa.Table] = ()
) -> list[PairRow]:
    """The rows of tables of `PAIRS`, sorted by pair id: the order does not depend on shards.

    Args:
        aux_weights: the weight of each auxiliary reward, by name; none where nothing needs them.
        stream: tables of `CANDIDATES` with answers drawn from the reference. A prompt's pairs take its answers in turn,
            both in the order of their ids.
    """
    rows = []
    for table in tables:
        found = [PairRow(**row) for row in table.select(_PAIR_COLUMNS).to_pylist()]
        rows += _with_auxiliary(found, table, aux_weights) if aux_weights else found
    return _with_stream(sorted(rows, key=lambda row: row.pair_id), stream)


def _with_auxiliary(rows: Sequence[PairRow], table: pa.Table, weights: Mapping[str, float]) -> list[PairRow]:
    def weighted(rewards: Sequence[Mapping[str, Any]]) -> float | None:
        values = {reward["name"]: reward["value"] for reward in rewards if reward["role"] == "auxiliary"}
        if any(values.get(name) is None for name in weights):
            return None
        return sum(weight * values[name] for name, weight in weights.items())

    both = zip(table["chosen_rewards"].to_pylist(), table["rejected_rewards"].to_pylist(), strict=True)
    return [
        replace(row, aux_chosen=weighted(chosen), aux_rejected=weighted(rejected))
        for row, (chosen, rejected) in zip(rows, both, strict=True)
    ]


def _with_stream(rows: Sequence[PairRow], tables: Iterable[pa.Table]) -> list[PairRow]:
    drawn: dict[str, list[tuple[str, list[int]]]] = {}
    for table in tables:
        for found in table.select(["response_id", "prompt_id", "response_token_ids"]).to_pylist():
            if found["response_token_ids"]:
                drawn.setdefault(found["prompt_id"], []).append((found["response_id"], found["response_token_ids"]))
    turns = {prompt_id: itertools.cycle(sorted(answers)) for prompt_id, answers in drawn.items()}

    def joined(row: PairRow) -> PairRow:
        if row.prompt_id not in turns:
            return row
        key, token_ids = next(turns[row.prompt_id])
        return replace(row, stream=AnswerRow(key, row.prompt_token_ids, token_ids))

    return [joined(row) for row in rows]


def group_rows(tables: Iterable[pa.Table]) -> list[GroupRow]:
    """The rows of tables of `GROUPS`, sorted by group id: the order does not depend on shards."""
    rows = [GroupRow(**row) for table in tables for row in table.select(_GROUP_COLUMNS).to_pylist()]
    return sorted(rows, key=lambda row: row.group_id)


def answers_of(rows: Iterable[Row]) -> list[AnswerRow]:
    """The distinct answers of some pairs or groups, sorted by id."""
    found = {answer.response_id: answer for row in rows for answer in row.answers}
    return [found[key] for key in sorted(found)]


def streams_of(rows: Iterable[Row]) -> list[AnswerRow]:
    """The answers drawn from the reference, a pair each where it has one."""
    return [row.stream for row in rows if isinstance(row, PairRow) and row.stream is not None]


def longest_sequence(answers: Iterable[AnswerRow]) -> int:
    """Tokens of the longest prompt with its answer."""
    return max((len(answer.prompt_token_ids) + len(answer.token_ids) for answer in answers), default=0)


def rows_a_forward(rows: Sequence[Row], *, micro_batch_size: int) -> int:
    """As many rows as have no more answers than `micro_batch_size` pairs; a row is never parted."""
    return max(1, 2 * micro_batch_size // max((row.num_answers for row in rows), default=2))


def candidate_answers(prompts: pa.Table, candidates: pa.Table) -> list[AnswerRow]:
    """The candidates of a shard as rows to score, sorted by id."""
    asked = dict(zip(prompts["prompt_id"].to_pylist(), prompts["prompt_token_ids"].to_pylist(), strict=True))
    rows = candidates.select(["response_id", "prompt_id", "response_token_ids"]).to_pylist()
    found = [AnswerRow(row["response_id"], asked[row["prompt_id"]], row["response_token_ids"]) for row in rows]
    return sorted(found, key=lambda row: row.response_id)


def probe_answers(probe: pa.Table) -> list[AnswerRow]:
    """The answers of a table of `PROBE`, in its order."""
    rows = probe.select(["response_id", "prompt_token_ids", "response_token_ids"]).to_pylist()
    return [AnswerRow(row["response_id"], row["prompt_token_ids"], row["response_token_ids"]) for row in rows]


def probe_table(answers: Sequence[AnswerRow], *, round: int) -> pa.Table:
    """Some answers as a table of `PROBE`."""
    return PROBE.table(
        {
            "response_id": answer.response_id,
            "round": round,
            "prompt_token_ids": answer.prompt_token_ids,
            "response_token_ids": answer.token_ids,
        }
        for answer in answers
    )


def text_answers(texts: pa.Table) -> list[AnswerRow]:
    """Whole texts as rows to score, sorted by id: the first token is given, all others count."""
    rows = texts.select(["text_id", "token_ids"]).to_pylist()
    found = [AnswerRow(row["text_id"], row["token_ids"][:1], row["token_ids"][1:]) for row in rows]
    return sorted(found, key=lambda row: row.response_id)


def reference_table(
    answers: Sequence[AnswerRow],
    logps: Mapping[str, float],
    *,
    weights: Weights,
    reference: str,
    dtype: str,
    round: int,
) -> pa.Table:
    """A table of `REFERENCE_LOGPS`, one row an answer."""
    return REFERENCE_LOGPS.table(
        {
            "response_id": answer.response_id,
            "round": round,
            "reference": reference,
            "weights": weights.sha256,
            "dtype": dtype,
            "logp": logps[answer.response_id],
            "num_tokens": len(answer.token_ids),
        }
        for answer in answers
    )


def reference_logps(tables: Iterable[pa.Table], rows: Sequence[Row]) -> dict[str, float]:
    """Log-probs by response id, from tables of `REFERENCE_LOGPS`, complete for `rows`.

    Raises:
        StageError: if an answer has none.
    """
    logps: dict[str, float] = {}
    for table in tables:
        logps |= dict(zip(table["response_id"].to_pylist(), table["logp"].to_pylist(), strict=True))
    missing = next((answer.response_id for answer in answers_of(rows) if answer.response_id not in logps), None)
    if missing is not None:
        raise StageError(
            f"update: answer {missing}",
            wanted="its log-prob in reference_logps",
            got="no row",
            fix="delete the round's reference_logps folder and run again",
        )
    return logps
