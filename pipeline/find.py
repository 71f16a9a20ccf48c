"""From an id, or the beginning of one, to the prompt it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow.compute as pc

from pipeline.reading import prompt_pools, published_files, rows
from stages.errors import InputError

_LISTED = 5  # of the ids that an ambiguous beginning may mean


def find_prompt(folder: Path, rounds: Mapping[int, Path], given: str) -> tuple[str, str]:
    """The id of the one prompt that `given` leads to, and what `given` names, in words.

    Prompts' ids are looked through first, then answers', pairs' and groups'; the first kind of which there is one
    counts.

    Raises:
        InputError: if there is none, or more than one.
    """
    start = given.strip().lower()
    if not start or set(start) - set("0123456789abcdef") or len(start) > 32:
        raise _refuse(folder, given, "no such id", "ids are 32 hex characters, 0 to 9 and a to f")
    for kind, found in _kinds(folder, rounds, start):
        if len(found) == 1:
            ((row_id, prompt_id),) = found.items()
            return prompt_id, f"{kind} {row_id}"
        if found:
            listed = "\n".join(f"{kind} {row_id}" for row_id in sorted(found)[:_LISTED])
            more = f"\nand {len(found) - _LISTED:,} more" if len(found) > _LISTED else ""
            raise _refuse(folder, given, f"the beginning of {len(found):,} ids\n{listed}{more}", "write more of it")
    raise _refuse(
        folder, given, "no such id in its tables", "copy one from the page of prefloop report, or from any table"
    )


def _kinds(folder: Path, rounds: Mapping[int, Path], start: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each kind of id, with the ids of that kind that begin so and their prompts; later kinds are read when asked."""
    stages: list[tuple[str, str, Callable[[], list[Path]]]] = [
        (
            "prompt",
            "prompt_id",
            lambda: [*prompt_pools(folder), folder / "evaluation" / "prompts", *(p / "pairs" for p in rounds.values())],
        ),
        (
            "answer",
            "response_id",
            lambda: [path / stage for path in rounds.values() for stage in ("candidates", "evaluation/candidates")],
        ),
        ("pair", "pair_id", lambda: [path / "pairs" for path in rounds.values()]),
        ("group", "group_id", lambda: [path / "groups" for path in rounds.values()]),
    ]
    for kind, column, places in stages:
        found = {}
        for place in places():
            begins = pc.starts_with(pc.field(column), pattern=start)
            for row in rows(published_files(place), where=begins, columns={column, "prompt_id"}):
                found[row[column]] = row["prompt_id"]
        yield kind, found


def _refuse(folder: Path, given: str, got: str, fix: str) -> InputError:
    return InputError(
        f"{folder}: {given!r}",
        wanted="the id of a prompt, an answer, a pair or a group, or its beginning",
        got=got,
        fix=fix,
    )
