"""Prompts and their answers as one row of tokens without padding: what stands where, and who sees whom.

In: families, each a prompt and the answers to it. Out: a `PackedRow`, in which a family's prompt is followed by its
answers, and the next family comes after. An answer sees its prompt and itself; its positions go on from the prompt's
end, as if it stood there alone. The last token of an answer predicts nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class Range(NamedTuple):
    """Places ``start`` to ``stop - 1`` of a row."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Family:
    """A prompt and answers to it, by their numbers.

    Attributes:
        answers: token ids of answers to put into the row.
        begun: the first token of answers that stay out of it: it is predicted by the prompt alone.
    """

    prompt: tuple[int, ...]
    answers: Mapping[int, tuple[int, ...]]
    begun: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Span:
    """One family in a row.

    Attributes:
        segments: each causal in itself: the prompt, where it is in this row, and the answers.
        answers: the places of all the answers' tokens, which see the prompt too.
        prompt: the prompt's places, in this row or in the row whose keys were kept.
    """

    segments: tuple[Range, ...]
    answers: Range
    prompt: Range


@dataclass(slots=True, eq=False)
class Layout:
    """Who sees whom in a row, as the attention function needs it.

    Attributes:
        prompts: for each attention module the keys and values of the row that holds the prompts. None: this row does
            and none are kept.
        keeps: whether the attention modules are to leave theirs in `prompts`.
        masks: masks made from the spans, by their maker.
    """

    spans: tuple[Span, ...]
    prompts: dict[Any, tuple[torch.Tensor, torch.Tensor]] | None = None
    keeps: bool = False
    masks: dict[str, Any] = field(default_factory=dict)

    def labels(self, num_queries: int, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each key the family, and the segment in it, 0 for a prompt; -1 where no query sees it.

        The last keys are the row's own. Those before them, if any, are of the row that holds the prompts.
        """
        before = num_keys - num_queries
        family_K, segment_K = torch.full((num_keys,), -1), torch.full((num_keys,), -1)
        for number, span in enumerate(self.spans):
            family_K[span.prompt.start : span.prompt.stop] = number
            segment_K[span.prompt.start : span.prompt.stop] = 0
            for place, part in enumerate(span.segments, start=1):
                if before or part != span.prompt:
                    family_K[before + part.start : before + part.stop] = number
                    segment_K[before + part.start : before + part.stop] = place
        return family_K, segment_K

    def visible(self, num_queries: int, num_keys: int) -> torch.Tensor:
        """Whether a query sees a key, [queries, keys]."""
        family_K, segment_K = self.labels(num_queries, num_keys)
        mine = torch.arange(num_keys - num_queries, num_keys)
        of_family = family_K[mine, None] == family_K
        of_segment = (segment_K == 0) | (segment_K[mine, None] == segment_K)
        return of_family & of_segment & (torch.arange(num_keys) <= mine[:, None])


@dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """A row of T tokens, with A predictions of answer tokens in it.

    Attributes:
        states_A: the places whose hidden states predict.
        targets_A: the tokens to be predicted.
        answers_A: the number of the answer that each belongs to; `num_answers` where it belongs to none, in a row that
            would be empty otherwise.
        prompt_ends_F: the place of each family's last prompt token, where the prompts are in this row.
        num_real: tokens that belong to a prompt or an answer.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    layout: Layout
    states_A: torch.Tensor
    targets_A: torch.Tensor
    answers_A: torch.Tensor
    num_answers: int
    prompt_ends_F: torch.Tensor
    num_real: int


class _Row:
    """A row in the making."""

    def __init__(self, num_answers: int) -> None:
        self._num_answers = num_answers
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._predictions: list[tuple[int, int, int]] = []
        self._spans: list[Span] = []
        self._prompt_ends: list[int] = []

    def prompt(self, tokens: Sequence[int]) -> Range:
        place = self._add(tokens, first_position=0)
        self._prompt_ends.append(place.stop - 1)
        return place

    def answer(self, number: int, tokens: Sequence[int], *, first_position: int) -> Range:
        """All but its last token, which predicts nothing; what the prompt predicts of it is not added."""
        place = self._add(tokens[:-1], first_position=first_position)
        self._predictions += [(place.start + k, token, number) for k, token in enumerate(tokens[1:])]
        return place

    def predict(self, place: int, token: int, number: int) -> None:
        self._predictions.append((place, token, number))

    def family(self, prompt: Range, segments: Iterable[Range]) -> None:
        """Close a family: `segments` are the prompt, where it is in this row, and the answers."""
        found = [segment for segment in segments if segment.size]
        answers = [segment for segment in found if segment is not prompt]
        whole = Range(answers[0].start, answers[-1].stop) if answers else Range(len(self._tokens), len(self._tokens))
        self._spans.append(Span(tuple(found), whole, prompt))

    def packed(self, device: torch.device, *, prompts: Layout | None = None, keeps: bool = False) -> PackedRow:
        num_real = len(self._tokens)
        if not self._tokens:  # a forward that all ranks run together cannot be left out for want of tokens
            only = self._add([0], first_position=0)
            self._spans.append(Span((only,), Range(only.stop, only.stop), Range(0, 0)))
        if not self._predictions:
            self._predictions.append((len(self._tokens) - 1, 0, self._num_answers))
        states, targets, answers = torch.tensor(self._predictions, device=device).T.contiguous()
        kept = prompts.prompts if prompts is not None else {} if keeps else None
        return PackedRow(
            torch.tensor(self._tokens, device=device),
            torch.tensor(self._positions, device=device),
            Layout(tuple(self._spans), kept, keeps),
            states,
            targets,
            answers,
            self._num_answers,
            torch.tensor(self._prompt_ends, dtype=torch.long, device=device),
            num_real,
        )

    def _add(self, tokens: Sequence[int], *, first_position: int) -> Range:
        start = len(self._tokens)
        self._tokens += tokens
        self._positions += range(first_position, first_position + len(tokens))
        return Range(start, len(self._tokens))


def pack(families: Sequence[Family], num_answers: int, device: torch.device, *, keeps: bool = False) -> PackedRow:
    """Families side by side.

    Args:
        num_answers: their numbers are below it.
        keeps: whether the prompts' keys and values are kept for `pack_more`.
    """
    row = _Row(num_answers)
    for family in families:
        prompt = row.prompt(family.prompt)
        firsts = {number: tokens[0] for number, tokens in family.answers.items()} | dict(family.begun)
        for number, token in firsts.items():
            row.predict(prompt.stop - 1, token, number)
        answers = [
            row.answer(number, tokens, first_position=len(family.prompt)) for number, tokens in family.answers.items()
        ]
        row.family(prompt, [prompt, *answers])
    return row.packed(device, keeps=keeps)


def pack_more(
    families: Sequence[Family], held: PackedRow, wanted: Iterable[int], answers: Sequence[tuple[int, ...]]
) -> PackedRow:
    """Further answers to the families of a row that keeps its prompts' keys and values, from their second token on.

    Args:
        held: the row made of `families`.
        wanted: the numbers of the answers, which `families` have begun.
        answers: token ids of all answers, by number.
    """
    row, numbers = _Row(held.num_answers), set(wanted)
    for family, span in zip(families, held.layout.spans, strict=True):
        mine = [number for number in family.begun if number in numbers]
        segments = [row.answer(number, answers[number], first_position=len(family.prompt)) for number in mine]
        if any(segment.size for segment in segments):
            row.family(span.prompt, segments)
    return row.packed(held.tokens_T.device, prompts=held.layout)
