"""Which rows stand behind which optimizer step, on which rank, in which forward pass.

The steps are a function of ids and seed alone; ranks and forwards are filled by the work that the rows make. A
remainder is neither dropped nor hangs a rank: every rank runs the same number of forwards and backwards, with an empty
micro-batch (a dummy row of weight 0) where it has no row.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.seeds import hashed_seed

if TYPE_CHECKING:
    from torch import Tensor


def global_batches(num_rows: int, *, size: int, num_epochs: int, seed: int) -> Iterator[list[int]]:
    """Row numbers behind each optimizer step; each epoch is shuffled by the seed, and its last batch may be smaller."""
    for epoch in range(num_epochs):
        order = list(range(num_rows))
        random.Random(hashed_seed("epoch", seed, epoch)).shuffle(order)
        for start in range(0, num_rows, size):
            yield order[start : start + size]


def num_steps(num_rows: int, *, size: int, num_epochs: int) -> int:
    """Optimizer steps of `global_batches`."""
    return math.ceil(num_rows / size) * num_epochs


@dataclass(frozen=True, slots=True)
class Load:
    """What a row brings along.

    Attributes:
        prompt: rows with the same one share its tokens where they are in one forward.
        prompt_tokens, answer_tokens: put through the layers.
        cost: of the answers, in forwards of a token; a backward costs two.
    """

    prompt: Hashable
    prompt_tokens: int
    answer_tokens: int
    cost: float


@dataclass(slots=True)
class _Bin:
    """Rows for one forward, with the tokens they have together."""

    rows: list[int]
    tokens: int
    cost: float

    def takes(self, other: _Bin, *, max_rows: int, max_tokens: int) -> bool:
        return len(self.rows) + len(other.rows) <= max_rows and self.tokens + other.tokens <= max_tokens

    def add(self, other: _Bin) -> None:
        self.rows += other.rows
        self.tokens += other.tokens
        self.cost += other.cost


def deal(loads: Sequence[Load], *, world_size: int, max_rows: int, max_tokens: int) -> list[list[list[int]]]:
    """For every rank its forwards, each a list of row numbers; equally many on every rank, some perhaps empty.

    Rows go where least is to be done, the costly ones first, and rows of one prompt stay together as far as no rank
    gets too much by it.

    Args:
        max_rows, max_tokens: of one forward; a row is never parted, however many tokens it has.
    """
    total = sum(3 * load.prompt_tokens + load.cost for load in loads)
    fair = total / world_size / 4 if world_size > 1 else math.inf
    units = sorted(_units(loads, max_rows, max_tokens, fair), key=lambda unit: -unit.cost)
    ranks: list[list[_Bin]] = [[] for _ in range(world_size)]
    done = [0.0] * world_size
    for unit in units:
        rank = done.index(min(done))
        ranks[rank].append(unit)
        done[rank] += unit.cost
    filled = [_filled(mine, max_rows, max_tokens) for mine in ranks]
    most = max(len(bins) for bins in filled)
    return [_spread(bins, most) for bins in filled]


def _units(loads: Sequence[Load], max_rows: int, max_tokens: int, max_cost: float) -> list[_Bin]:
    """Rows of one prompt together, in as many pieces as the bounds ask for."""
    open_units: dict[Hashable, _Bin] = {}
    units: list[_Bin] = []
    for number, load in enumerate(loads):
        alone = _Bin([number], load.prompt_tokens + load.answer_tokens, 3 * load.prompt_tokens + load.cost)
        unit, more = open_units.get(load.prompt), _Bin([number], load.answer_tokens, load.cost)
        if (
            unit is not None
            and unit.takes(more, max_rows=max_rows, max_tokens=max_tokens)
            and (unit.cost + more.cost <= max_cost)
        ):
            unit.add(more)
        else:
            open_units[load.prompt] = alone
            units.append(alone)
    return units


def _filled(units: Sequence[_Bin], max_rows: int, max_tokens: int) -> list[_Bin]:
    """Units in as few forwards as first-fit finds, the longest first."""
    bins: list[_Bin] = []
    for unit in sorted(units, key=lambda unit: -unit.tokens):
        place = next((b for b in bins if b.takes(unit, max_rows=max_rows, max_tokens=max_tokens)), None)
        if place is None:
            bins.append(_Bin([], 0, 0.0))
            place = bins[-1]
        place.add(unit)
    return bins


def _spread(bins: Sequence[_Bin], count: int) -> list[list[int]]:
    """The rows of some bins in `count` forwards: the fullest are halved, which makes no forward longer."""
    parts = [sorted(b.rows) for b in bins]
    while len(parts) < count:
        fullest = max(parts, key=len, default=[])
        if len(fullest) < 2:
            parts.append([])
            continue
        parts.remove(fullest)
        parts += [fullest[: len(fullest) // 2], fullest[len(fullest) // 2 :]]
    return parts


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """N sequences of prompt and answer, padded on the right.

    Attributes:
        tokens_NT: token ids; padding is 0 and behind the mask.
        mask_NT: 1 for real tokens. Which tokens are real is known from lengths, never from a token's id: padding and
            EOS, or padding and a real token, may share one.
        answer_NT: 1 for the tokens of the answer.
    """

    tokens_NT: Tensor
    mask_NT: Tensor
    answer_NT: Tensor


def token_batch(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> TokenBatch:
    """Prompt and answer of each row, side by side."""
    import torch

    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    tokens_NT = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_NT = torch.zeros(len(prompts), longest, dtype=torch.long)
    answer_NT = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        length = len(prompt) + len(answer)
        tokens_NT[row, :length] = torch.tensor(prompt + answer)
        mask_NT[row, :length] = 1
        answer_NT[row, len(prompt) : length] = True
    return TokenBatch(tokens_NT, mask_NT, answer_NT)
