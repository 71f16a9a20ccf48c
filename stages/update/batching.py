"""Which pairs stand behind which optimizer step, on which rank, in which forward pass.

The order is a function of ids and seed alone. A remainder is neither dropped nor hangs a rank: every rank runs the
same number of forwards and backwards, with an empty micro-batch (a dummy row of weight 0) where it has no pair.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
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


def deal(batch: Sequence[int], *, rank: int, world_size: int, micro_batch_size: int) -> list[list[int]]:
    """One rank's micro-batches of a global batch; equally many on every rank, some perhaps empty."""
    mine = list(batch[rank::world_size])
    most = math.ceil(len(batch) / world_size)
    count = math.ceil(most / micro_batch_size)
    return [mine[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(count)]


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
