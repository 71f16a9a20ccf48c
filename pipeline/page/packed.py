"""Rows packed for the page: JSON, compressed and written in base64, which no text in it can leave.

``index`` holds what the list shows of every row, column by column; the prompts with their answers lie in pieces, which
the page opens when it needs them.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.page.rows import HELD_OUT, Answer, Column, Prompt

_PROMPTS_A_PIECE = 500
_TITLE_CHARS = 100
_LEVEL = 5  # of gzip: half a percent larger than 9 on the embedded models' rows, in a third of the time


@dataclass(frozen=True, slots=True)
class Packed:
    """Blocks for the page, in base64."""

    index: str
    pieces: list[str]


def pack(prompts: Sequence[Prompt]) -> Packed:
    """Pack prompts for the page's browser; it finds the prompt with number n in piece n // `_PROMPTS_A_PIECE`."""
    pieces = [
        _block([_content(prompt) for prompt in prompts[at : at + _PROMPTS_A_PIECE]])
        for at in range(0, len(prompts), _PROMPTS_A_PIECE)
    ]
    return Packed(_block(_index(prompts)), pieces)


def _index(prompts: Sequence[Prompt]) -> dict[str, Any]:
    wheres: dict[str, int] = {}
    fates: dict[str, int] = {"": 0}
    names = ("prompt", "where", "fate", "margin", "reward")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for number, prompt in enumerate(prompts):
        for where, fate, margin, reward in _rows(prompt):
            cells = (number, wheres.setdefault(where, len(wheres)), fates.setdefault(fate, len(fates)), margin, reward)
            for name, cell in zip(names, cells, strict=True):
                columns[name].append(cell)
    titles = [" ".join(prompt.said[-1][1][: 2 * _TITLE_CHARS].split())[:_TITLE_CHARS] for prompt in prompts]
    more = {"wheres": list(wheres), "fates": list(fates), "titles": titles, "prompts_a_piece": _PROMPTS_A_PIECE}
    return columns | more


def _rows(prompt: Prompt) -> Iterator[tuple[str, str, float | None, float | None]]:
    """A prompt's rows in the list: where, fate, margin, best reward; a held-out one's margin is last less first."""
    held_out = [column for column in prompt.columns if column.where == HELD_OUT]
    if held_out:
        first, last = (_best(column.answers) for column in (held_out[0], held_out[-1]))
        gain = last - first if first is not None and last is not None else None
        yield HELD_OUT, "", gain, last
    for column in prompt.columns:
        if column.where != HELD_OUT:
            yield column.where, column.fate, column.margin, _best(column.answers)


def _best(answers: Sequence[Answer]) -> float | None:
    return max((answer.reward for answer in answers if answer.reward is not None), default=None)


def _content(prompt: Prompt) -> list[Any]:
    columns: Sequence[Column] = prompt.columns
    return [prompt.prompt_id, prompt.said, prompt.truth, columns]


def _block(value: Any) -> str:
    content = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(content.encode("utf-8"), _LEVEL, mtime=0)).decode("ascii")
