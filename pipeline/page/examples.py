"""The real rows that the page shows: a few prompts of each round with all their candidates, by id from the tables.

Chosen to be looked at: the largest and the smallest margins, some at random, and some that made no pair. Only the parts
in which they lie are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pipeline.numbers import finite
from pipeline.reading import FILE, published_files, rows
from pipeline.texts import cut

_MAX_ROUNDS = 12  # more, and the page shows the first two and the last ten
_MAX_EXAMPLES = 3  # of a kind in a round
_MAX_EXAMPLES_IN_ALL = 18  # of a kind in all rounds, so that the page stays small
_MAX_CANDIDATES = 16
_PROMPT_CHARS, _ANSWER_CHARS = 1500, 800


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer as it is shown; `mark` is chosen, rejected or empty, `reward` None where there is none."""

    response_id: str
    mark: str
    reward: float | None
    rewards: list[dict[str, Any]]
    text: str
    num_tokens: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt of a round; `left_out` candidates of middling reward are not shown."""

    prompt_id: str
    prompt: str
    conversation: list[dict[str, str]]
    answer: str | None
    fate: str
    detail: str
    margin: float | None
    candidates: list[Candidate]
    left_out: int


@dataclass(frozen=True, slots=True)
class RoundExamples:
    """A round's prompts in groups, each with the reason why they are shown."""

    round: int
    groups: list[tuple[str, list[Example]]]


@dataclass(frozen=True, slots=True)
class _Pick:
    """A prompt that will be shown, one pair of it (None where it made none), its fate, and the name of its part."""

    prompt_id: str
    part: str
    pair: Mapping[str, Any] | None
    fate: str
    detail: str

    @property
    def key(self) -> str:
        """The pair, or the prompt that made none: a prompt may have several pairs that came as they are."""
        return self.prompt_id if self.pair is None else self.pair["pair_id"]


def examples(folders: Mapping[int, Path]) -> list[RoundExamples]:
    """Rows of the rounds in `folders`; of many rounds, the first two and the last ten."""
    shown = sorted(folders)
    if len(shown) > _MAX_ROUNDS:
        shown = shown[:2] + shown[2 - _MAX_ROUNDS :]
    count = max(1, min(_MAX_EXAMPLES, _MAX_EXAMPLES_IN_ALL // max(1, len(shown))))
    found = [RoundExamples(round, _round_groups(folders[round], count)) for round in shown]
    return [one for one in found if one.groups]


def _round_groups(folder: Path, count: int) -> list[tuple[str, list[Example]]]:
    groups = _picks(folder, count)
    details = _details(folder, [pick for _, picks in groups for pick in picks])
    named = [(title, [details[pick.key] for pick in picks if pick.key in details]) for title, picks in groups]
    return [(title, found) for title, found in named if found]


def _picks(folder: Path, count: int) -> list[tuple[str, list[_Pick]]]:
    """Which prompts are shown, by ids and margins alone. Ids are hashes: those that sort first are a random draw."""
    columns = ["pair_id", "prompt_id", "chosen_id", "rejected_id", "margin", FILE]
    found = [
        row | {"margin": finite(row["margin"])} for row in rows(published_files(folder / "pairs"), columns=columns)
    ]
    ready = [row for row in found if row["margin"] is None]  # pairs that came without rewards
    ranked = sorted(
        (row for row in found if row["margin"] is not None), key=lambda row: (-row["margin"], row["pair_id"])
    )
    num_pairs, widest = Counter(row["prompt_id"] for row in ranked), dict[str, dict[str, Any]]()
    for row in ranked:
        widest.setdefault(row["prompt_id"], row)
    pairs = list(widest.values())
    best, rest = pairs[:count], pairs[count:]
    smallest, rest = rest[len(rest) - min(count, len(rest)) :][::-1], rest[: max(0, len(rest) - count)]
    drawn = sorted([*rest, *ready], key=lambda row: row["pair_id"])[:count]
    unpaired = rows(
        published_files(folder / "fates"),
        where=pc.field("fate") != "paired",
        columns=["prompt_id", "fate", "detail", FILE],
    )
    groups = [("Largest margins", best), ("Smallest margins", smallest), ("Drawn at random", drawn)]
    picked = [
        (
            title,
            [_Pick(row["prompt_id"], Path(row[FILE]).name, row, "paired", _told(num_pairs, row)) for row in found],
        )
        for title, found in groups
    ]
    without = sorted(unpaired, key=lambda row: row["prompt_id"])[:count]
    return [
        *picked,
        ("Groups, drawn at random", _grouped(folder, count)),
        (
            "Without a pair, drawn at random",
            [_Pick(row["prompt_id"], Path(row[FILE]).name, None, row["fate"], row["detail"]) for row in without],
        ),
    ]


def _told(num_pairs: Mapping[str, int], pair: Mapping[str, Any]) -> str:
    """In words, that a prompt made more pairs than the one that is shown, its widest."""
    count = num_pairs.get(pair["prompt_id"], 1)
    return f"the widest of its {count} pairs" if count > 1 else ""


def _grouped(folder: Path, count: int) -> list[_Pick]:
    """Prompts whose answers train as a group; best and worst are seen by their rewards."""
    found = rows(published_files(folder / "groups"), columns=["group_id", "prompt_id", "response_ids", FILE])
    return [
        _Pick(row["prompt_id"], Path(row[FILE]).name, None, "paired", f"a group of {len(row['response_ids'])} answers")
        for row in sorted(found, key=lambda row: row["group_id"])[:count]
    ]


def _details(folder: Path, picks: Sequence[_Pick]) -> dict[str, Example]:
    """The picks with their candidates and rewards, by their keys; a prompt's rows lie in parts of one name."""
    parts = {pick.part for pick in picks}
    mine = pc.field("prompt_id").isin([pick.prompt_id for pick in picks])

    def read(stage: str, *columns: str) -> list[dict[str, Any]]:
        files = [file for file in published_files(folder / stage) if file.name in parts]
        return rows(files, where=mine, columns=columns)

    prompts = {row["prompt_id"]: row for row in read("prompts", "prompt_id", "prompt", "conversation", "answer")}
    rewards = {row["response_id"]: row for row in read("scored", "response_id", "reward", "rewards")}
    answers: dict[str, list[dict[str, Any]]] = {}
    for row in read("candidates", "response_id", "prompt_id", "response", "response_token_ids", "finish_reason"):
        answers.setdefault(row["prompt_id"], []).append(row)
    shown = {
        pick.key: _example(prompts[pick.prompt_id], answers.get(pick.prompt_id, []), rewards, pick)
        for pick in picks
        if pick.prompt_id in prompts
    }
    ready = [pick for pick in picks if pick.pair is not None and pick.prompt_id not in prompts]
    return shown | _ready_examples(folder, ready)


def _ready_examples(folder: Path, picks: Sequence[_Pick]) -> dict[str, Example]:
    """Pairs that came as they are, whose only answers are their own."""
    wanted = {pick.pair["pair_id"]: pick for pick in picks if pick.pair is not None}
    if not wanted:
        return {}
    columns = ["pair_id", "chosen_id", "rejected_id", "prompt", "chosen", "rejected", "score_chosen", "score_rejected"]
    columns += ["chosen_token_ids", "rejected_token_ids"]
    found = rows(published_files(folder / "pairs"), where=pc.field("pair_id").isin(list(wanted)), columns=columns)
    shown = {}
    for row in found:
        pick = wanted[row["pair_id"]]
        answers = [
            {
                "response_id": row[f"{mark}_id"],
                "response": row[mark],
                "response_token_ids": row[f"{mark}_token_ids"],
                "finish_reason": "stop",
            }
            for mark in ("chosen", "rejected")
        ]
        rewards = {row[f"{mark}_id"]: {"reward": row[f"score_{mark}"]} for mark in ("chosen", "rejected")}
        prompt = {"prompt": row["prompt"], "conversation": None, "answer": None}
        shown[pick.key] = _example(prompt, answers, rewards, pick)
    return shown


def _example(
    prompt: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    rewards: Mapping[str, Mapping[str, Any]],
    pick: _Pick,
) -> Example:
    marks = {pick.pair["chosen_id"]: "chosen", pick.pair["rejected_id"]: "rejected"} if pick.pair else {}
    found = [_candidate(row, rewards.get(row["response_id"], {}), marks.get(row["response_id"], "")) for row in answers]
    ranked = sorted(found, key=lambda c: (c.reward is None, -(c.reward or 0), c.mark != "chosen", c.mark == "rejected"))
    half = _MAX_CANDIDATES // 2
    middle = [c for c in ranked[half : max(half, len(ranked) - half)] if not c.mark]
    chat = [{"role": m["role"], "content": cut(m["content"], _PROMPT_CHARS)} for m in prompt["conversation"] or []]
    return Example(
        prompt_id=pick.prompt_id,
        prompt=cut(prompt["prompt"], _PROMPT_CHARS),
        conversation=chat,
        answer=None if prompt["answer"] is None else cut(prompt["answer"], _ANSWER_CHARS),
        fate=pick.fate,
        detail=pick.detail,
        margin=pick.pair["margin"] if pick.pair else None,
        candidates=[c for c in ranked if c not in middle],
        left_out=len(middle),
    )


def _candidate(row: Mapping[str, Any], scored: Mapping[str, Any], mark: str) -> Candidate:
    return Candidate(
        response_id=row["response_id"],
        mark=mark,
        reward=finite(scored.get("reward")),
        rewards=[reward | {"value": finite(reward["value"])} for reward in scored.get("rewards") or []],
        text=cut(row["response"], _ANSWER_CHARS),
        num_tokens=len(row["response_token_ids"]),
        finish_reason=row["finish_reason"],
    )
