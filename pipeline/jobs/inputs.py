"""Jobs that read what people bring along: tokenizers, prompts, texts, ready pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.artifacts import StageFolder
from pipeline.entries import Entry
from pipeline.pair_files import pair_rows
from pipeline.prompt_files import Part, read_rows
from pipeline.prompts import Form, HeldOut, count_changed, distinct, draw, prompt_rows, questions
from pipeline.sections import PairsConfig
from stages.contracts import PAIRS, TEXTS
from stages.errors import InputError
from stages.pretrained import num_embeddings
from stages.seeds import row_id
from stages.tokenizers import (
    end_token_ids,
    load_tokenizer,
    refuse_foreign_tokenizer,
    refuse_other_tokenizer,
    refuse_unknown_ids,
)


@dataclass(frozen=True, slots=True)
class CheckTokenizers:
    """Load every tokenizer of a run before anything costs time: (folder, pad token, config key) each.

    A reference scores the policy's very tokens, so that its tokenizer must be the policy's.
    """

    policy: tuple[Path, str | None, str]
    rewards: Sequence[tuple[Path, str | None, str]]
    references: Sequence[tuple[Path, str | None, str]]

    def __call__(self, _state: None) -> None:
        for folder, pad_token, key in (self.policy, *self.rewards):
            tokenizer = load_tokenizer(folder, pad_token=pad_token, key=key, answers=key == self.policy[2])
            refuse_foreign_tokenizer(tokenizer, num_embeddings(folder), where=f"{key} {folder}")
        for folder, pad_token, key in self.references:
            refuse_other_tokenizer(folder, self.policy[0], pad_token=pad_token, key=key)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparePrompts:
    """A source of prompts as one table: read, rendered, tokenised, equal rows merged.

    Attributes:
        held_out: keep one side of a held-out share; None keeps all.
        exclude: prompts whose text is left out, because they are evaluated on.
        limit: keep this many, drawn by `seed`; None keeps all in the source's order.
    """

    source: Path
    key: str
    tokenizer: Path
    pad_token: str | None
    part: Part
    form: Form
    out: StageFolder
    seed: int
    held_out: HeldOut | None
    exclude: StageFolder | None
    limit: int | None

    def __call__(self, _state: None) -> list[Entry]:
        tokenizer = load_tokenizer(self.tokenizer, pad_token=self.pad_token, key="policy.path")
        rows = read_rows(self.source, key=self.key, part=self.part)
        everything, merged = distinct(prompt_rows(rows, tokenizer, form=self.form))
        table = everything
        if self.held_out is not None:
            kept = [self.held_out.keeps(question) for question in questions(table)]
            table = table.filter(pa.array(kept, pa.bool_()))
        num_evaluated = table.num_rows
        if self.exclude is not None:
            evaluated = set(questions(pa.concat_tables(self.exclude.read_all())))
            table = table.filter(pa.array([question not in evaluated for question in questions(table)], pa.bool_()))
        num_evaluated -= table.num_rows
        if not table.num_rows:
            raise InputError(
                f"{self.key}: {self.source}",
                wanted="at least one prompt",
                got=f"{everything.num_rows} rows, none of which is left" if everything.num_rows else "no row",
                fix="check evaluate.path and evaluate.holdout: what is evaluated on is not trained on"
                if everything.num_rows
                else "check the file's content",
            )
        if self.limit is not None:
            order = draw(table.num_rows, count=min(self.limit, table.num_rows), seed=self.seed)
            table = table.take(order)
        refuse_unknown_rows(table.to_pylist(), ("prompt_token_ids",), self.tokenizer, where=f"{self.key} {self.source}")
        stats = {"merged": merged, "evaluated": num_evaluated, "changed": count_changed(table, tokenizer)}
        return [self.out.publish(0, table, stats=stats)]


MOST_ROWS_DRAWN = 1 << 18
"""By one job that draws prompts, so that its memory is bounded however many a round has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawPrompts:
    """Some shards of a round's prompts, from the pool.

    Attributes:
        before, count: see `draw`.
        shards: those to make.
    """

    pool: StageFolder
    out: StageFolder
    round: int
    before: tuple[int, ...]
    count: int
    shard_size: int
    seed: int
    shards: tuple[int, ...]

    def __call__(self, _state: None) -> int:
        pool, size = self.pool.entry(0), self.shard_size
        order = draw(pool.rows, before=self.before, count=self.count, seed=self.seed)
        cuts = [order[shard * size : (shard + 1) * size] for shard in self.shards]
        table, start = _of_round(self.pool.read_rows(0, [row for cut in cuts for row in cut]), self.round), 0
        for shard, cut in zip(self.shards, cuts, strict=True):
            self.out.publish(shard, table.slice(start, len(cut)), parents=[pool])
            start += len(cut)
        return start

    def parted(self, missing: Sequence[int]) -> list[DrawPrompts]:
        """Jobs for the shards that are missing, each of at most `MOST_ROWS_DRAWN` prompts or of one shard."""
        at_once = max(1, MOST_ROWS_DRAWN // self.shard_size)
        return [
            replace(self, shards=tuple(missing[first : first + at_once])) for first in range(0, len(missing), at_once)
        ]


@dataclass(frozen=True, slots=True)
class AllPrompts:
    """Every prompt of a pool, in order, cut into shards."""

    pool: StageFolder
    out: StageFolder
    shard_size: int

    def __call__(self, _state: None) -> list[Entry]:
        return _publish_shards(self.out, self.pool.read(0), 0, self.shard_size, [self.pool.entry(0)])


def _publish_shards(out: StageFolder, table: pa.Table, round: int, size: int, parents: Sequence[Entry]) -> list[Entry]:
    table = _of_round(table, round)
    return [
        out.publish(shard, table.slice(start, size), parents=parents)
        for shard, start in enumerate(range(0, table.num_rows, size))
    ]


def _of_round(table: pa.Table, round: int) -> pa.Table:
    column = table.schema.get_field_index("round")
    return table.set_column(column, table.schema.field(column), pa.array([round] * table.num_rows, pa.int32()))


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareTexts:
    """Texts to watch as one table: read, drawn by `seed`, tokenised, cut."""

    source: Path
    key: str
    tokenizer: Path
    pad_token: str | None
    part: Part
    column: str
    max_length: int | None
    num_texts: int
    seed: int
    out: StageFolder

    def __call__(self, _state: None) -> list[Entry]:
        tokenizer = load_tokenizer(self.tokenizer, pad_token=self.pad_token, key="policy.path")
        context = self.max_length or model_context(self.tokenizer)
        texts: dict[str, str] = {}
        for where, row in read_rows(self.source, key=self.key, part=self.part):
            text = row.get(self.column)
            if not isinstance(text, str) or not text.strip():
                raise InputError(
                    where,
                    wanted=f"text in column {self.column!r}",
                    got=f"the columns {', '.join(row) or 'none'}" if self.column not in row else repr(text)[:120],
                    fix="--set evaluate.texts.column=NAME, or mend the row",
                )
            texts.setdefault(row_id("text", text), text)
        keys = sorted(texts, key=lambda key: row_id(self.seed, key))[: self.num_texts]
        rows = [
            {
                "text_id": key,
                "round": 0,
                "text": texts[key],
                "token_ids": tokenizer(texts[key]).input_ids[:context],
            }
            for key in keys
        ]
        rows = [row for row in rows if len(row["token_ids"]) > 1]
        refuse_unknown_rows(rows, ("token_ids",), self.tokenizer, where=f"{self.key} {self.source}")
        if not rows:
            raise InputError(
                f"{self.key}: {self.source}", wanted="texts of two tokens or more", got="none", fix="check the file"
            )
        return [self.out.publish(0, TEXTS.table(rows))]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparePairs:
    """Ready pairs as one table: read, rendered, tokenised, equal rows merged, those too long for the model left out."""

    source: Path
    key: str
    tokenizer: Path
    pad_token: str | None
    part: Part
    config: PairsConfig
    out: StageFolder
    round: int

    def __call__(self, _state: None) -> list[Entry]:
        tokenizer = load_tokenizer(self.tokenizer, pad_token=self.pad_token, key="policy.path")
        room = self.config.max_length or model_context(self.tokenizer)
        rows: dict[str, dict[str, object]] = {}
        num_read = num_long = num_made = 0

        def counted() -> Iterator[tuple[str, dict[str, object]]]:
            nonlocal num_read
            for place in read_rows(self.source, key=self.key, part=self.part):
                num_read += 1
                yield place

        config = self.config
        form = Form(config.columns, config.system, config.to_chat, config.chat_template_kwargs)
        made = pair_rows(counted(), tokenizer, form=form, round=self.round, ends=end_token_ids(self.tokenizer))
        for row in made:
            num_made += 1
            longest = max(len(row["chosen_token_ids"]), len(row["rejected_token_ids"]))
            if len(row["prompt_token_ids"]) + longest > room:
                num_long += 1
            else:
                rows.setdefault(str(row["pair_id"]), row)
        if not rows:
            raise InputError(
                f"{self.key}: {self.source}",
                wanted=f"at least one pair of at most {room} tokens",
                got=f"{num_read} rows, {num_long} of them longer, {num_read - num_made} of two equal answers",
                fix="a model with a longer context, or shorter rows" if num_long else "check the file's content",
            )
        columns = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
        refuse_unknown_rows(rows.values(), columns, self.tokenizer, where=f"{self.key} {self.source}")
        stats = {
            "read": num_read,
            "equal": num_read - num_made,
            "long": num_long,
            "merged": num_made - num_long - len(rows),
        }
        return [self.out.publish(0, PAIRS.table(rows.values()), stats=stats)]


def model_context(folder: Path) -> int:
    """The most tokens a model's context holds, from its config; a large number where that does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def refuse_unknown_rows(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], folder: Path, *, where: str) -> None:
    """Refuse rows with token ids that the model in `folder` has no embedding for."""
    known = num_embeddings(folder)
    for row in rows:
        for column in columns:
            text = str(row.get("prompt", row.get("text")))[:60]
            refuse_unknown_ids(row[column], known, where=f"{where}: {text!r}")
