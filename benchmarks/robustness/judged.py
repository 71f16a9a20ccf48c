"""From sampled and scored answers to the pairs of a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.robustness.recipes import Recipe
from pipeline.prompts import Form, prompt_rows
from stages.contracts import PROMPTS
from stages.errors import StageError
from stages.seeds import row_id
from stages.update.rows import PairRow


@dataclass(frozen=True, slots=True)
class Judged:
    """A sampled answer with its reward."""

    response_id: str
    token_ids: list[int]
    reward: float

    def distance(self, other: Judged) -> int:
        """Places at which two answers differ."""
        both = zip(self.token_ids, other.token_ids, strict=False)
        return sum(a != b for a, b in both) + abs(len(self.token_ids) - len(other.token_ids))


def prompts_of(file: Path, tokenizer: Any) -> pa.Table:
    """The prompts of a JSONL file, each once."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    named = ((f"{file.name}, line {number}", row) for number, row in enumerate(rows, start=1))
    found = {row["prompt_id"]: row for row in prompt_rows(named, tokenizer, form=Form())}
    return PROMPTS.table(found.values())


def by_prompt(candidates: pa.Table, scored: pa.Table, *, truncated: bool = False) -> Iterator[tuple[str, list[Judged]]]:
    """Each prompt's answers that have a reward; those that did not end by themselves too, if `truncated`."""
    rows = zip(candidates.to_pylist(), scored["reward"].to_pylist(), strict=True)
    for prompt_id, group in groupby(rows, key=lambda row: row[0]["prompt_id"]):
        yield (
            prompt_id,
            [
                Judged(row["response_id"], row["response_token_ids"], reward)
                for row, reward in group
                if reward is not None and (truncated or row["finish_reason"] == "stop")
            ],
        )


def pair_row(prompt: list[int], chosen: Judged, rejected: Judged) -> PairRow:
    return PairRow(
        row_id(chosen.response_id, rejected.response_id),
        chosen.response_id,
        rejected.response_id,
        prompt,
        chosen.token_ids,
        rejected.token_ids,
        score_chosen=chosen.reward,
        score_rejected=rejected.reward,
    )


def enough(pairs: Sequence[PairRow], recipe: Recipe) -> list[PairRow]:
    """As many as a table has.

    Raises:
        StageError: if there are fewer.
    """
    if len(pairs) < recipe.num_pairs:
        raise StageError(
            "a pair table",
            wanted=f"pairs of {recipe.num_pairs} of {recipe.num_prompts} prompts",
            got=str(len(pairs)),
            fix="draw more prompts or answers: num_prompts, num_generations",
        )
    return list(pairs[: recipe.num_pairs])
