"""Answers through the engine, with and without a way back to its weights.

A forward's log-probs are handed out as leaves. Once an objective has left their gradient in them, `Scored.backward`
takes it on to the weights, in one backward of the engine however many forwards there were. So whoever computes the
objective need not know how the log-probs were made, and an answer without gradient need not have had a graph:

- shared: prompts and answers in one packed row, equal prompts and equal answers once;
- skipping: the answers that are likely to get no gradient are scored without a graph on the keys and values of the
  first forward's prompts. Those that do get one are run again with a graph;
- apart: every answer behind its own prompt, padded, where sharing is not exact.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from stages.update import deepspeed_engine
from stages.update.batching import token_batch
from stages.update.logps import answer_logps
from stages.update.packing import Family, PackedRow, pack, pack_more
from stages.update.rows import AnswerRow
from stages.update.value_head import final_hidden_states


@dataclass(slots=True)
class TokenCounts:
    """Tokens put through the layers; what is run twice counts twice.

    Attributes:
        real: of prompts and answers.
        processed: with padding, and what stands in for an empty row.
        backward: those of the real ones that a backward goes through.
    """

    real: int = 0
    processed: int = 0
    backward: int = 0

    def add(self, row: PackedRow, *, backward: bool) -> None:
        self.real += row.num_real
        self.processed += len(row.tokens_T)
        self.backward += row.num_real if backward else 0


@dataclass(slots=True, eq=False)
class Scored:
    """Log-probs of N answers, and the way back from them.

    Attributes:
        logps_N: leaves, float32, summed over each answer's tokens, in nats.
        states_NH: the hidden states at the ends of the answers' prompts, detached; None where nobody asked.
        num_skipped: answer tokens that got no backward; known after `backward`.
    """

    logps_N: torch.Tensor
    states_NH: torch.Tensor | None
    tokens: TokenCounts
    _back: Callable[[torch.Tensor], int]
    num_skipped: int = 0

    def backward(self) -> None:
        """Take the gradient that the log-probs have got on to the weights; all ranks call it together."""
        assert self.logps_N.grad is not None
        self.num_skipped = self._back(self.logps_N.grad)


@dataclass(frozen=True, slots=True)
class Distinct:
    """Some answers, equal ones once.

    Attributes:
        families: by prompt; every answer is in.
        answers: token ids by number.
        numbers_N: the number of each answer that was asked for.
        families_N: the place of its family.
    """

    families: list[Family]
    answers: list[tuple[int, ...]]
    numbers_N: list[int]
    families_N: list[int]

    @classmethod
    def of(cls, asked: Sequence[AnswerRow]) -> Distinct:
        members: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
        answers: list[tuple[int, ...]] = []
        for row in asked:
            mine = members.setdefault(tuple(row.prompt_token_ids), {})
            if tuple(row.token_ids) not in mine:
                mine[tuple(row.token_ids)] = len(answers)
                answers.append(tuple(row.token_ids))
        prompts = {prompt: place for place, prompt in enumerate(members)}
        return cls(
            [Family(prompt, {number: ids for ids, number in mine.items()}) for prompt, mine in members.items()],
            answers,
            [members[tuple(row.prompt_token_ids)][tuple(row.token_ids)] for row in asked],
            [prompts[tuple(row.prompt_token_ids)] for row in asked],
        )

    def begun(self, later: Collection[int]) -> list[Family]:
        """The families with only the first token of the answers of some numbers."""
        return [
            Family(
                family.prompt,
                {number: ids for number, ids in family.answers.items() if number not in later},
                {number: ids[0] for number, ids in family.answers.items() if number in later},
            )
            for family in self.families
        ]


class Scoring:
    """One rank's forwards.

    Args:
        shares: whether prompts are shared.
        wants_states: whether the hidden states at the prompts' ends are wanted.
    """

    def __init__(self, engine: Any, device: torch.device, *, shares: bool, wants_states: bool = False) -> None:
        self._engine, self._device = engine, device
        self.shares, self._wants_states = shares, wants_states

    def __call__(self, answers: Sequence[AnswerRow], *, likely_skipped: Collection[int] = ()) -> Scored:
        """Log-probs of some answers.

        Args:
            likely_skipped: places of those that will probably get no gradient.
        """
        if not self.shares:
            return self._apart(answers)
        distinct = Distinct.of(answers)
        if not likely_skipped:
            return self._shared(distinct)
        kept = {number for place, number in enumerate(distinct.numbers_N) if place not in likely_skipped}
        return self._skipping(distinct, set(range(len(distinct.answers))) - kept)

    def _apart(self, answers: Sequence[AnswerRow]) -> Scored:
        batch = token_batch([row.prompt_token_ids for row in answers], [row.token_ids for row in answers])
        with self._watched() as seen:
            logps_N = answer_logps(self._engine, batch, self._device)
        num_real = int(batch.mask_NT.sum())
        states_NH = None
        if seen:
            ends_N = torch.tensor([len(row.prompt_token_ids) - 1 for row in answers], device=self._device)
            states_NH = seen[0][torch.arange(len(answers), device=self._device), ends_N]

        def back(gradient_N: torch.Tensor) -> int:
            self._engine.backward((logps_N * gradient_N).sum())
            return 0

        counts = TokenCounts(num_real, batch.tokens_NT.numel(), num_real)
        return Scored(_leaf(logps_N), states_NH, counts, back)

    def _watched(self) -> AbstractContextManager[list[torch.Tensor]]:
        if not self._wants_states:
            return nullcontext([])
        return final_hidden_states(deepspeed_engine.model_of(self._engine))

    def _shared(self, distinct: Distinct) -> Scored:
        row = pack(distinct.families, len(distinct.answers), self._device)
        logps_M, states_FH = self._engine(row)
        counts = TokenCounts()
        counts.add(row, backward=True)
        numbers_N = torch.tensor(distinct.numbers_N, device=self._device)

        def back(gradient_N: torch.Tensor) -> int:
            self._engine.backward((logps_M * _by_number(gradient_N, numbers_N, logps_M)).sum())
            return 0

        return Scored(_leaf(logps_M[numbers_N]), self._states(states_FH, distinct), counts, back)

    def _skipping(self, distinct: Distinct, later: set[int]) -> Scored:
        families = distinct.begun(later)
        held = pack(families, len(distinct.answers), self._device, keeps=True)
        logps_M, states_FH = self._engine(held)
        with torch.no_grad():
            more = pack_more(families, held, later, distinct.answers)
            more_M, _ = self._engine(more)
        counts = TokenCounts()
        counts.add(held, backward=True)
        counts.add(more, backward=False)
        numbers_N = torch.tensor(distinct.numbers_N, device=self._device)

        def back(gradient_N: torch.Tensor) -> int:
            gradient_M = _by_number(gradient_N, numbers_N, logps_M)
            active = {number for number in later if gradient_M[number] != 0}
            loss = (logps_M * gradient_M).sum()
            if _on_any_rank(bool(active), self._device):
                again = pack_more(families, held, active, distinct.answers)
                loss = loss + (self._engine(again)[0] * gradient_M).sum()
                counts.add(again, backward=True)
            self._engine.backward(loss)
            return sum(len(distinct.answers[number]) for number in later - active)

        logps_N = (logps_M.detach() + more_M)[numbers_N]
        return Scored(_leaf(logps_N), self._states(states_FH, distinct), counts, back)

    def _states(self, states_FH: torch.Tensor, distinct: Distinct) -> torch.Tensor | None:
        return states_FH[distinct.families_N] if self._wants_states else None


def _leaf(logps_N: torch.Tensor) -> torch.Tensor:
    return logps_N.detach().requires_grad_()


def _by_number(gradient_N: torch.Tensor, numbers_N: torch.Tensor, logps_M: torch.Tensor) -> torch.Tensor:
    """The gradient of distinct answers; of what belongs to no answer it is 0."""
    return torch.zeros_like(logps_M).index_add_(0, numbers_N, gradient_N)


def _on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether it is so on some rank: every rank runs as many forwards as any other."""
    if dist.get_world_size() == 1:
        return flag
    found = torch.tensor(float(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)
