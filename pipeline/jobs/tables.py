"""Jobs that take tables made elsewhere."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.artifacts import StageFolder
from pipeline.entries import Entry
from pipeline.jobs.inputs import refuse_unknown_rows
from stages.contracts import CANDIDATES, GROUPS, PAIRS, PROMPTS
from stages.errors import InputError
from stages.vocab import FinishReason
from stages.weights import file_sha256

_TOKENS = "one token id or more, none below 0"


def _is_tokens(value: list[int | None]) -> bool:
    return bool(value) and all(number is not None and number >= 0 for number in value)


def _are_answers(value: list[list[int | None]]) -> bool:
    return len(value) > 1 and all(map(_is_tokens, value))


def _is_object(value: str) -> bool:
    try:
        return isinstance(json.loads(value), dict)
    except ValueError:
        return False


def _is_finite(value: float | None) -> bool:
    return value is None or math.isfinite(value)


_MEANINGS: dict[str, list[tuple[str, Callable[[Any], bool], str]]] = {
    "prompts": [("prompt_token_ids", _is_tokens, _TOKENS), ("extra", _is_object, "a JSON object")],
    "candidates": [
        ("response_token_ids", _is_tokens, _TOKENS),
        ("finish_reason", get_args(FinishReason).__contains__, "stop or length"),
    ],
    "scored": [("reward", _is_finite, "a finite number, or null")],
    "pairs": [
        *((f"{name}_token_ids", _is_tokens, _TOKENS) for name in ("prompt", "chosen", "rejected")),
        *((name, _is_finite, "a finite number, or null") for name in ("score_chosen", "score_rejected", "margin")),
    ],
    "groups": [
        ("prompt_token_ids", _is_tokens, _TOKENS),
        ("response_token_ids", _are_answers, "two answers or more, each one token id or more"),
        ("rewards", lambda rewards: all(map(_is_finite, rewards)) and None not in rewards, "finite numbers"),
    ],
}
"""What the values of a column are, beyond their type."""


@dataclass(frozen=True, slots=True)
class AdoptTables:
    """Tables made elsewhere, checked against their contracts and cut into shards by prompt.

    Attributes:
        files: Parquet files by the contract's name.
        out: where the shards go, a folder for each; prompts, if given, first.
        shard_size: prompts behind a shard.
        model: the folder of the model that is trained on them, if it is known.
    """

    files: Mapping[str, Sequence[Path]]
    out: Sequence[StageFolder]
    shard_size: int
    model: Path | None = None

    def hashes(self, _state: None) -> dict[str, list[str]]:
        """What the files are."""
        return {name: [file_sha256(file) for file in files] for name, files in self.files.items()}

    def count(self, _state: None) -> int:
        """How many shards there will be."""
        if self.out[0].contract != PROMPTS:
            return 1
        rows = sum(pq.read_metadata(file).num_rows for file in self.files[PROMPTS.name])
        return max(1, math.ceil(rows / self.shard_size))

    def __call__(self, _state: None) -> list[Entry]:
        tables = [self._table(folder) for folder in self.out]
        if self.out[0].contract != PROMPTS:
            return [self.out[0].publish(0, tables[0])]
        prompts, entries = tables[0], []
        given = list(zip(self.out, tables, strict=True))
        for mine in given[1:]:
            self._refuse_strangers(mine, given[0], "prompt_id")
        if len(given) > 2:
            self._refuse_strangers(given[1], given[2], "response_id")
            self._refuse_strangers(given[2], given[1], "response_id")
        for shard, start in enumerate(range(0, prompts.num_rows, self.shard_size)):
            mine = prompts.slice(start, self.shard_size)
            parts = [mine, *(t.filter(pc.is_in(t["prompt_id"], mine["prompt_id"])) for t in tables[1:])]
            for folder, part in zip(self.out, parts, strict=True):
                drops = _without_candidates(mine, part) if folder.contract == CANDIDATES else []
                entries.append(folder.publish(shard, part, drops=drops))
        return entries

    def _table(self, folder: StageFolder) -> pa.Table:
        contract = folder.contract
        try:
            parts = [contract.check(pq.read_table(file), where=str(file)) for file in self.files[contract.name]]
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                str(self.files[contract.name][0]), wanted="Parquet", got=str(error), fix="write the file again"
            ) from None
        table = pa.concat_tables([part.select(contract.schema.names).cast(contract.schema) for part in parts])
        self._refuse_impossible(folder, table)
        return table

    def _refuse_impossible(self, folder: StageFolder, table: pa.Table) -> None:
        """Refuse what no run writes, and no stage could work on: no row, an id twice, values that mean nothing."""
        where, column = str(self.files[folder.contract.name][0]), table.schema.names[0]
        ids = table[column]
        if not table.num_rows and folder.contract in (PROMPTS, PAIRS, GROUPS):
            raise InputError(where, wanted="at least one row", got="none", fix="check how the table was made")
        if pc.count_distinct(ids).as_py() < len(ids):
            twice = next(name for name, count in Counter(ids.to_pylist()).items() if count > 1)
            raise InputError(
                where, wanted=f"every {column} once", got=f"{twice} more than once", fix="keep one of its rows"
            )
        for name, is_good, wanted in _MEANINGS[folder.contract.name]:
            for row_id, value in zip(ids.to_pylist(), table[name].to_pylist(), strict=True):
                if not is_good(value):
                    got = f"{str(value)[:80]} in the row of {column} {row_id}"
                    raise InputError(where, wanted=f"{name}: {wanted}", got=got, fix="mend it where it is written")
        if self.model is not None:
            columns = [name for name, _, wanted in _MEANINGS[folder.contract.name] if wanted == _TOKENS]
            refuse_unknown_rows(table.to_pylist(), columns, self.model, where=where)

    def _refuse_strangers(
        self, mine: tuple[StageFolder, pa.Table], others: tuple[StageFolder, pa.Table], key: str
    ) -> None:
        strangers = mine[1].filter(pc.invert(pc.is_in(mine[1][key], others[1][key])))
        if strangers.num_rows:
            other = others[0].contract.name
            raise InputError(
                str(self.files[mine[0].contract.name][0]),
                wanted=f"rows whose {key} the given {other} have",
                got=f"{strangers.num_rows:,} others, {key} {strangers[key][0]} among them",
                fix=f"give the {other} of the same round",
            )


def _without_candidates(prompts: pa.Table, candidates: pa.Table) -> list[dict[str, str]]:
    silent = prompts.filter(pc.invert(pc.is_in(prompts["prompt_id"], candidates["prompt_id"])))
    return [
        {"prompt_id": prompt_id, "fate": "engine_error", "detail": "the given table has no candidate for it"}
        for prompt_id in silent["prompt_id"].to_pylist()
    ]


@dataclass(frozen=True, slots=True)
class FindDamages:
    """Which of some published parts are not as they were published; see `StageFolder.damages`."""

    folder: StageFolder
    shards: tuple[int, ...]

    def __call__(self, _state: None) -> list[tuple[int, str]]:
        return self.folder.damages(self.shards)


@dataclass(frozen=True, slots=True)
class RoundOf:
    """The round that a table says it belongs to; 0 for one without rows."""

    table: StageFolder

    def __call__(self, _state: None) -> int:
        return next((int(part["round"][0].as_py()) for part in self.table.read_all() if part.num_rows), 0)
