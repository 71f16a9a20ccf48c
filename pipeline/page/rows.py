"""The rows that the page's browser holds: prompts, and side by side every round's answers to each.

Comes in: a run's tables. Goes out: prompts with columns of answers, one column a round that drew the prompt, and for a
held-out prompt one a policy that was asked. Of a large run only so much is read as there is room for: the leading parts
of each round, whose prompts were drawn in random order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc

from pipeline.numbers import finite
from pipeline.reading import footer, published_files, rows
from pipeline.texts import cut

HELD_OUT = "held out"
_PROMPT_CHARS, _ANSWER_CHARS = 1500, 800


@dataclass(frozen=True, slots=True)
class Room:
    """What a page may hold: so many rows, and about so many characters of texts."""

    rows: int
    characters: int


PAGE_ROOM = Room(100_000, 60_000_000)
ROUND_ROOM = Room(4_000, 3_000_000)
"""For the page that is written after every round: a fraction of a second."""


class Answer(NamedTuple):
    """`mark` is chosen, rejected or empty; `rewards` are name, value and role of each."""

    text: str
    reward: float | None
    mark: str
    num_tokens: int
    finish_reason: str
    rewards: Sequence[tuple[str, float | None, str]]


class Column(NamedTuple):
    """Answers to a prompt from one place; rows are filtered by `where`, `title` stands above the answers."""

    title: str
    where: str
    fate: str
    detail: str
    margin: float | None
    answers: Sequence[Answer]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, what was said before and in it (role, text), its ground truth, and its columns."""

    prompt_id: str
    said: Sequence[tuple[str, str]]
    truth: str | None
    columns: list[Column] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Rows:
    """What the browser holds of `num_in_all` rows; a row is a prompt in a round, or a held-out prompt."""

    prompts: list[Prompt]
    num_rows: int
    num_in_all: int


def browser_rows(run: Path, folders: Mapping[int, Path], room: Room) -> Rows:
    """The rows of a run.

    Args:
        folders: of the rounds that are settled, and of the evaluation before the first.
    """
    prompts: dict[str, Prompt] = {}
    num_held_out = _num_rows(published_files(run / "evaluation" / "prompts"))
    sizes = {0: num_held_out} | {round: _num_rows(_asked(folder)) for round, folder in folders.items() if round}
    rooms = shared(room, sizes)
    num_rows = _add_held_out(prompts, run, folders, rooms[0])
    for round in sorted(sizes.keys() - {0}):
        num_rows += _add_round(prompts, round, folders[round], rooms[round])
    return Rows(list(prompts.values()), num_rows, sum(sizes.values()))


# ---- how much -------------------------------------------------------------------------------------------------------


def shared(room: Room, sizes: Mapping[int, int]) -> dict[int, Room]:
    """Each round's room: as many rows as each other, but for those that need fewer; characters by the rows, and some
    for short rounds with long texts."""
    counts: dict[int, int] = {}
    for round in sorted(sizes, key=lambda one: (sizes[one], one)):
        counts[round] = min(sizes[round], (room.rows - sum(counts.values())) // (len(sizes) - len(counts)))
    in_all, least = max(1, sum(counts.values())), max(1, room.characters // (4 * len(sizes)))
    return {round: Room(count, max(least, room.characters * count // in_all)) for round, count in counts.items()}


def _asked(folder: Path) -> list[Path]:
    """The parts that hold a round's rows: its prompts, or pairs that came as they are."""
    return published_files(folder / "prompts") or published_files(folder / "pairs")


def _num_rows(files: Iterable[Path]) -> int:
    return sum(footer(file).num_rows for file in files)


def _leading(files: Sequence[Path], tables: Sequence[Path], room: Room) -> tuple[list[str], int]:
    """The names of the first parts that fill the room, and how many of their rows are taken.

    Args:
        tables: the folders whose parts of these names hold texts.
    """
    names: list[str] = []
    count = size = 0
    for file in files:
        if count >= room.rows or size >= room.characters:
            break
        names.append(file.name)
        count += footer(file).num_rows
        size += sum(_text_bytes(table / file.name) for table in tables)
    return names, min(count, room.rows)


def _text_bytes(file: Path) -> int:
    """About how many bytes of text a part holds, from its footer."""
    if not file.exists():
        return 0
    found = footer(file)
    groups = [found.row_group(index) for index in range(found.num_row_groups)]
    columns = [group.column(index) for group in groups for index in range(group.num_columns)]
    wanted = ("prompt", "response", "chosen", "rejected")
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema in wanted)


# ---- held-out prompts -----------------------------------------------------------------------------------------------


def held_out_rows(run: Path, folders: Mapping[int, Path], room: Room) -> list[Prompt]:
    """The held-out prompts of a run, with a column for the policy of each of these rounds."""
    prompts: dict[str, Prompt] = {}
    _add_held_out(prompts, run, folders, room)
    return list(prompts.values())


def _add_held_out(prompts: dict[str, Prompt], run: Path, folders: Mapping[int, Path], room: Room) -> int:
    """Held-out prompts with a column a policy; how many were added."""
    stage = run / "evaluation" / "prompts"
    names, count = _leading(published_files(stage), [stage], room)
    asked = _part_rows(stage, names, _OF_PROMPTS)[:count]
    for row in asked:
        prompts[row["prompt_id"]] = _prompt(row)
    for round, folder in folders.items():
        title = f"after round {round}" if round else "before"
        answers = _answers(folder / "evaluation", None)
        for row in asked:
            if mine := answers.get(row["prompt_id"]):
                found = [_answer(answer, "") for answer in mine]
                prompts[row["prompt_id"]].columns.append(Column(title, HELD_OUT, "", "", None, found))
    return len(asked)


# ---- a round's prompts ----------------------------------------------------------------------------------------------

_OF_PROMPTS = ("prompt_id", "prompt", "conversation", "answer")


def _add_round(prompts: dict[str, Prompt], round: int, folder: Path, room: Room) -> int:
    """A round's prompts with their candidates; how many were added."""
    files = published_files(folder / "prompts")
    if not files:
        return _add_ready_pairs(prompts, round, folder, room)
    names, count = _leading(files, [folder / "prompts", folder / "candidates"], room)
    asked = _part_rows(folder / "prompts", names, _OF_PROMPTS)[:count]
    answers, pairs = _answers(folder, names), _pairs(folder, names)
    fates = {row["prompt_id"]: row for row in _part_rows(folder / "fates", names, ("prompt_id", "fate", "detail"))}
    groups = {
        row["prompt_id"]: len(row["response_ids"])
        for row in _part_rows(folder / "groups", names, ("prompt_id", "response_ids"))
    }
    for row in asked:
        key = row["prompt_id"]
        fate, mine = fates.get(key, {}), pairs.get(key, [])
        widest = max(mine, key=lambda pair: pair["margin"] or 0.0, default=None)
        marks = {widest["chosen_id"]: "chosen", widest["rejected_id"]: "rejected"} if widest else {}
        detail = fate.get("detail") or ""
        if len(mine) > 1:
            detail = f"the widest of its {len(mine)} pairs is marked"
        elif key in groups:
            detail = f"a group of {groups[key]} answers"
        found = _ranked([_answer(answer, marks.get(answer["response_id"], "")) for answer in answers.get(key, [])])
        margin = _short(widest["margin"]) if widest else None
        column = Column(f"round {round}", f"round {round}", fate.get("fate", ""), detail, margin, found)
        prompts.setdefault(key, _prompt(row)).columns.append(column)
    return len(asked)


def _add_ready_pairs(prompts: dict[str, Prompt], round: int, folder: Path, room: Room) -> int:
    """Pairs that came as they are, each a row; how many were added."""
    files = published_files(folder / "pairs")
    names, count = _leading(files, [folder / "pairs"], room)
    sides = ("chosen", "chosen_rewards", "score_chosen", "rejected", "rejected_rewards", "score_rejected")
    columns = {name: pc.field(name) for name in ("pair_id", "prompt", "margin", *sides)}
    for mark in ("chosen", "rejected"):
        columns[f"{mark}_tokens"] = pc.list_value_length(pc.field(f"{mark}_token_ids"))
    found = _part_rows(folder / "pairs", names, columns)[:count]
    for row in found:
        answers = [
            _answer(
                {
                    "response": row[mark],
                    "num_tokens": row[f"{mark}_tokens"],
                    "finish_reason": "stop",
                    "reward": row[f"score_{mark}"],
                    "rewards": row[f"{mark}_rewards"],
                },
                mark,
            )
            for mark in ("chosen", "rejected")
        ]
        prompt = Prompt(row["pair_id"], [("prompt", cut(row["prompt"], _PROMPT_CHARS))], None)
        where = f"round {round}"
        prompt.columns.append(Column(where, where, "paired", "a pair as it came", _short(row["margin"]), answers))
        prompts[f"{round} {row['pair_id']}"] = prompt
    return len(found)


def _part_rows(
    stage: Path, names: Sequence[str] | None, columns: Iterable[str] | Mapping[str, pc.Expression]
) -> list[dict[str, Any]]:
    """Rows of a stage's parts of these names; of all of them for None."""
    files = [file for file in published_files(stage) if names is None or file.name in names]
    return rows(files, columns=columns)


def _answers(folder: Path, names: Sequence[str] | None) -> dict[str, list[dict[str, Any]]]:
    """Candidates with their rewards, by prompt."""
    scored = {
        row["response_id"]: row for row in _part_rows(folder / "scored", names, ("response_id", "reward", "rewards"))
    }
    columns = {name: pc.field(name) for name in ("response_id", "prompt_id", "response", "finish_reason")}
    columns["num_tokens"] = pc.list_value_length(pc.field("response_token_ids"))
    found = defaultdict(list)
    for row in _part_rows(folder / "candidates", names, columns):
        found[row["prompt_id"]].append(row | scored.get(row["response_id"], {"reward": None, "rewards": []}))
    return found


def _pairs(folder: Path, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    found = defaultdict(list)
    for row in _part_rows(folder / "pairs", names, ("prompt_id", "chosen_id", "rejected_id", "margin")):
        found[row["prompt_id"]].append(row)
    return found


def _prompt(row: Mapping[str, Any]) -> Prompt:
    said = [(message["role"], cut(message["content"], _PROMPT_CHARS)) for message in row["conversation"] or []]
    truth = None if row["answer"] is None else cut(row["answer"], _ANSWER_CHARS)
    return Prompt(row["prompt_id"], said or [("prompt", cut(row["prompt"], _PROMPT_CHARS))], truth)


def _answer(row: Mapping[str, Any], mark: str) -> Answer:
    return Answer(
        cut(row["response"], _ANSWER_CHARS),
        _short(row["reward"]),
        mark,
        row["num_tokens"],
        row["finish_reason"],
        [(reward["name"], _short(reward["value"]), reward["role"]) for reward in row["rewards"] or []],
    )


def _short(value: Any) -> float | None:
    """A figure with six digits, so that the page stays small."""
    found = finite(value)
    return None if found is None else float(f"{found:.6g}")


def _ranked(answers: Sequence[Answer]) -> list[Answer]:
    return sorted(answers, key=lambda a: (a.reward is None, -(a.reward or 0), a.mark != "chosen", a.mark == "rejected"))
