"""Rewards by what became of the answers: chosen, rejected, in no pair, and those of prompts that made none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.numbers import number
from pipeline.page.charts import Tick, nice_ticks
from pipeline.page.rows import HELD_OUT, Prompt

WIDTH, LANE, LABEL, END = 440, 24, 140, 24  # of a drawing, in its own units
_MAX_ROUNDS = 6  # more, and the first and the last five are drawn
_FIRST = ("chosen", "rejected", "in no pair", "in a group")  # of the kinds; fates follow


@dataclass(frozen=True, slots=True)
class Spread:
    """Rewards of one kind of answers: the places of their 10th, 25th, 50th, 75th and 90th percentile, and in words."""

    kind: str
    places: list[float]
    told: str


@dataclass(frozen=True, slots=True)
class RoundSpreads:
    """A round's rewards; all rounds have one scale, whose ticks these are."""

    title: str
    lanes: list[Spread]
    ticks: list[Tick]


def spreads(prompts: Sequence[Prompt]) -> list[RoundSpreads]:
    """The rounds' rewards by kind of answer, over the rows of the page."""
    rounds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for prompt in prompts:
        for column in prompt.columns:
            if column.where == HELD_OUT:
                continue
            grouped = column.fate == "paired" and not any(answer.mark for answer in column.answers)
            for answer in column.answers:
                if answer.reward is not None:
                    kind = answer.mark or ("in no pair" if column.fate == "paired" and not grouped else "")
                    rounds[column.where][kind or ("in a group" if grouped else column.fate)].append(answer.reward)
    shown = list(rounds)
    if len(shown) > _MAX_ROUNDS:
        shown = shown[:1] + shown[1 - _MAX_ROUNDS :]
    found = {where: {kind: _percentiles(values) for kind, values in rounds[where].items()} for where in shown}
    ends = [end for kinds in found.values() for ranks in kinds.values() for end in ranks]
    if not ends:
        return []
    ticks = nice_ticks(min(ends), max(ends), 4)

    def place(value: float) -> float:
        return round(LABEL + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (WIDTH - LABEL - END), 1)

    marks = [Tick(place(tick), f"{tick:g}") for tick in ticks]
    kinds = sorted(
        {kind for of_round in found.values() for kind in of_round},
        key=lambda kind: (_FIRST.index(kind) if kind in _FIRST else len(_FIRST), kind),
    )
    return [
        RoundSpreads(
            where,
            [
                Spread(kind, [place(rank) for rank in ranks], _told(kind, ranks, len(rounds[where][kind])))
                for kind in kinds
                if (ranks := of_round.get(kind))
            ],
            marks,
        )
        for where, of_round in found.items()
    ]


def _percentiles(values: Sequence[float]) -> list[float]:
    ranked = sorted(values)
    return [ranked[round(share * (len(ranked) - 1))] for share in (0.1, 0.25, 0.5, 0.75, 0.9)]


def _told(kind: str, ranks: Sequence[float], count: int) -> str:
    low, _, middle, _, high = map(number, ranks)
    return f"{kind}: {count:,} answers, median {middle}, four fifths between {low} and {high}"
