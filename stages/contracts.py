"""The tables between the stages: named, versioned Arrow schemas, checked where they are written and read.

Rows are joined by id only. Ids are 32 hex characters. Every table has ``round``, counted from 1; tables that belong to
no round (the pool of prompts, the evaluation before the first round) carry 0. A new need is a new version, or a
contract of its own, not an optional column.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stages.errors import ContractError

REWARD = pa.struct([("name", pa.string()), ("value", pa.float64()), ("role", pa.string())])
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
TOKENS = pa.list_(pa.int32())
_PENALISED = "less pair.length_penalty for each of its tokens"


@dataclass(frozen=True, slots=True)
class Contract:
    """A named, versioned schema.

    Attributes:
        name: the folder of the run in which such tables lie.
        version: goes up with every change of the schema.
        schema: the columns, each with its meaning and unit in the field's metadata.
    """

    name: str
    version: int
    schema: pa.Schema

    def table(self, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
        """Rows as a table of this contract.

        Raises:
            ContractError: if a row lacks a column, has one too many, or a value of another type.
        """
        rows = list(rows)
        wanted = set(self.schema.names)
        for row in rows:
            if row.keys() != wanted:
                raise self._refuse(f"a new {self.name} table", f"columns {sorted(row)}")
        try:
            return pa.Table.from_pylist(rows, schema=self.schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise self._refuse(f"a new {self.name} table", str(error)) from error

    def check(self, table: pa.Table, *, where: str) -> pa.Table:
        """`table` itself, if it keeps the contract (field metadata aside).

        Raises:
            ContractError: naming the first column that differs.
        """
        for field in self.schema:
            if field.name not in table.schema.names:
                raise self._refuse(where, f"no column {field.name!r}", f"{field.name}: {field.type}")
            got = table.schema.field(field.name)
            if got.type != field.type:
                raise self._refuse(where, f"{field.name}: {got.type}", f"{field.name}: {field.type}")
            if not field.nullable and table.column(field.name).null_count:
                raise self._refuse(where, f"{field.name}: null", f"{field.name}: {field.type}, never null")
        extra = [name for name in table.schema.names if name not in self.schema.names]
        if extra:
            raise self._refuse(where, f"column {extra[0]!r} besides", f"the columns {', '.join(self.schema.names)}")
        return table

    def _refuse(self, where: str, got: str, wanted: str | None = None) -> ContractError:
        return ContractError(
            where,
            wanted=wanted or f"the columns {', '.join(self.schema.names)}",
            got=got,
            fix=f"cast it where it is written, or make version {self.version + 1} of {self.name.upper()}",
        )


def _contract(name: str, version: int, *fields: tuple[str, pa.DataType, str]) -> Contract:
    """A field whose meaning begins with ``?`` may be null."""
    return Contract(
        name,
        version,
        pa.schema(
            [
                pa.field(f, kind, nullable=doc.startswith("?"), metadata={"doc": doc.removeprefix("?")})
                for f, kind, doc in fields
            ],
            metadata={"contract": name, "version": str(version)},
        ),
    )


_PROMPT_ID = ("prompt_id", pa.string(), "hash of conversation or text, answer and extras")
_RESPONSE_ID = ("response_id", pa.string(), "hash of run seed, round, stream, prompt and sample index")
_ROUND = ("round", pa.int32(), "counted from 1; 0 for what belongs to no round")

PROMPTS = _contract(
    "prompts",
    1,
    _PROMPT_ID,
    _ROUND,
    ("prompt", pa.string(), "exactly the text that is tokenised; a chat is rendered by the template first"),
    ("conversation", pa.list_(MESSAGE), "?the chat behind the prompt; null for plain text"),
    ("prompt_token_ids", TOKENS, "the policy's tokens of the prompt, special tokens included"),
    ("answer", pa.string(), "?ground truth for rule rewards"),
    ("extra", pa.string(), "the other input columns, as a JSON object"),
)

CANDIDATES = _contract(
    "candidates",
    1,
    _RESPONSE_ID,
    ("prompt_id", pa.string(), "the prompt it answers"),
    _ROUND,
    ("stream", pa.string(), "policy, evaluation, or a reference's name"),
    ("sample_index", pa.int16(), "0 to num_generations - 1"),
    ("response", pa.string(), "the answer's text, special tokens left out"),
    ("response_token_ids", TOKENS, "as sampled; ends with the stop token exactly when one was sampled"),
    ("response_logps", pa.list_(pa.float32()), "log-prob of each token in nats, at temperature 1, by the engine"),
    ("finish_reason", pa.string(), "stop or length"),
    ("policy_version", pa.string(), "sha256 of the weights in the engine"),
    ("policy_round", pa.int32(), "the round that made those weights; 0 for the first policy"),
    ("seed", pa.int64(), "of this answer"),
)

SCORED = _contract(
    "scored",
    1,
    ("response_id", pa.string(), "the candidate"),
    ("prompt_id", pa.string(), "the prompt it answers"),
    _ROUND,
    ("reward", pa.float64(), "?weighted sum of the main rewards; null: not scored"),
    ("rewards", pa.list_(REWARD), "every reward by name, before weighting"),
)

PAIRS = _contract(
    "pairs",
    2,
    ("pair_id", pa.string(), "hash of both answers' ids"),
    ("prompt_id", pa.string(), "the prompt"),
    ("chosen_id", pa.string(), "response_id of the chosen answer"),
    ("rejected_id", pa.string(), "response_id of the rejected answer"),
    _ROUND,
    ("prompt", pa.string(), "as in prompts"),
    ("chosen", pa.string(), "the chosen answer's text"),
    ("rejected", pa.string(), "the rejected answer's text"),
    ("score_chosen", pa.float64(), f"?reward of the chosen answer, {_PENALISED}; null: pairs that came without"),
    ("score_rejected", pa.float64(), f"?reward of the rejected answer, {_PENALISED}"),
    ("margin", pa.float64(), "?score_chosen - score_rejected"),
    ("prompt_token_ids", TOKENS, "as in prompts"),
    ("chosen_token_ids", TOKENS, "as sampled"),
    ("rejected_token_ids", TOKENS, "as sampled"),
    ("chosen_rewards", pa.list_(REWARD), "as in scored"),
    ("rejected_rewards", pa.list_(REWARD), "as in scored"),
    ("policy_round", pa.int32(), "?the round that made the weights that sampled both; null: sampled elsewhere"),
)

GROUPS = _contract(
    "groups",
    1,
    ("group_id", pa.string(), "hash of the answers' ids"),
    ("prompt_id", pa.string(), "the prompt"),
    ("response_ids", pa.list_(pa.string()), "its different usable answers, best first; at least 2, and not all equal"),
    _ROUND,
    ("prompt", pa.string(), "as in prompts"),
    ("responses", pa.list_(pa.string()), "the answers' texts, in the order of response_ids, as all that follows"),
    ("prompt_token_ids", TOKENS, "as in prompts"),
    ("response_token_ids", pa.list_(TOKENS), "as sampled"),
    ("rewards", pa.list_(pa.float64()), f"of each answer, {_PENALISED}"),
    ("policy_round", pa.int32(), "the round that made the weights that sampled them"),
)

REFERENCE_LOGPS = _contract(
    "reference_logps",
    1,
    ("response_id", pa.string(), "the answer, or the watched text"),
    _ROUND,
    ("reference", pa.string(), "the reference's name in the config"),
    ("weights", pa.string(), "sha256 of the reference's weights"),
    ("dtype", pa.string(), "of the forward pass"),
    ("logp", pa.float64(), "sum over the answer's tokens, in nats, at temperature 1"),
    ("num_tokens", pa.int32(), "tokens of the answer, stop token included"),
)

PROBE = _contract(
    "probe",
    1,
    _RESPONSE_ID,
    _ROUND,
    ("prompt_token_ids", TOKENS, "of the prompt it answers"),
    ("response_token_ids", TOKENS, "as sampled; what engines and trainer are asked about when weights change"),
)

TEXTS = _contract(
    "texts",
    1,
    ("text_id", pa.string(), "hash of the text"),
    _ROUND,
    ("text", pa.string(), "as it came"),
    ("token_ids", TOKENS, "the policy's tokens of the text, special tokens included, cut to the context"),
)

FATES = _contract(
    "fates",
    1,
    ("prompt_id", pa.string(), "every prompt of the round, once"),
    _ROUND,
    ("fate", pa.string(), "see stages.vocab.Fate"),
    ("detail", pa.string(), "why, in words; empty where the fate says it all"),
    ("num_candidates", pa.int32(), "answers sampled"),
    ("num_valid", pa.int32(), "answers that pairing could use"),
    ("num_pairs", pa.int32(), "rows made of it: pairs, or one group"),
)
