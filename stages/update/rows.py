"""The rows of the update: pairs as token ids, and the log-probs of their answers under a reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from stages.contracts import REFERENCE_LOGPS
from stages.errors import StageError
from stages.protocols import Weights


@dataclass(frozen=True, slots=True)
class PairRow:
    """One pair to train on: ids for joining, tokens for the model."""

    pair_id: str
    chosen_id: str
    rejected_id: str
    prompt_token_ids: list[int]
    chosen_token_ids: list[int]
    rejected_token_ids: list[int]


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """One answer whose log-prob is wanted."""

    response_id: str
    prompt_token_ids: list[int]
    token_ids: list[int]


_COLUMNS = ["pair_id", "chosen_id", "rejected_id", "prompt_token_ids", "chosen_token_ids", "rejected_token_ids"]


def pair_rows(tables: Iterable[pa.Table]) -> list[PairRow]:
    """The rows of tables of `PAIRS`, sorted by pair id: the order does not depend on shards."""
    rows = [PairRow(**row) for table in tables for row in table.select(_COLUMNS).to_pylist()]
    return sorted(rows, key=lambda row: row.pair_id)


def answers_of(pairs: Iterable[PairRow]) -> list[AnswerRow]:
    """The distinct answers of some pairs, sorted by id."""
    found = {}
    for row in pairs:
        found[row.chosen_id] = AnswerRow(row.chosen_id, row.prompt_token_ids, row.chosen_token_ids)
        found[row.rejected_id] = AnswerRow(row.rejected_id, row.prompt_token_ids, row.rejected_token_ids)
    return [found[key] for key in sorted(found)]


def candidate_answers(prompts: pa.Table, candidates: pa.Table) -> list[AnswerRow]:
    """The candidates of a shard as rows to score, sorted by id."""
    asked = dict(zip(prompts["prompt_id"].to_pylist(), prompts["prompt_token_ids"].to_pylist(), strict=True))
    rows = candidates.select(["response_id", "prompt_id", "response_token_ids"]).to_pylist()
    found = [AnswerRow(row["response_id"], asked[row["prompt_id"]], row["response_token_ids"]) for row in rows]
    return sorted(found, key=lambda row: row.response_id)


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


def reference_logps(tables: Iterable[pa.Table], rows: Sequence[PairRow]) -> dict[str, float]:
    """Log-probs by response id, from tables of `REFERENCE_LOGPS`, complete for `rows`.

    Raises:
        StageError: if an answer has none.
    """
    logps: dict[str, float] = {}
    for table in tables:
        logps |= dict(zip(table["response_id"].to_pylist(), table["logp"].to_pylist(), strict=True))
    missing = next((key for row in rows for key in (row.chosen_id, row.rejected_id) if key not in logps), None)
    if missing is not None:
        raise StageError(
            f"update: answer {missing}",
            wanted="its log-prob in reference_logps",
            got="no row",
            fix="delete the round's reference_logps folder and run again",
        )
    return logps
