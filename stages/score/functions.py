"""Rewards that are Python functions of TRL's shape: ``f(prompts, completions, **columns) -> list[float]``."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.errors import InputError, StageError
from stages.protocols import Turn
from stages.vocab import RewardRole

RewardFunction = Callable[..., Sequence[float | None]]


def exact_match(
    prompts: Sequence[Turn], completions: Sequence[Turn], answer: Sequence[str | None], **columns: Any
) -> list[float | None]:
    """1.0 where the completion is the prompt's ``answer``, outer space aside, else 0.0; None without an answer."""
    return [
        None if truth is None else float(text_of(completion).strip() == truth.strip())
        for completion, truth in zip(completions, answer, strict=True)
    ]


def text_of(turn: Turn) -> str:
    """A completion's text, whether it came as text or as messages."""
    return turn if isinstance(turn, str) else "".join(message["content"] for message in turn)


def find_function(target: str) -> RewardFunction:
    """The function behind ``module:function``.

    Raises:
        InputError: if there is no such module, or no such function in it.
    """
    module_name, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # a user's module may raise anything
        raise InputError(
            f"score.rewards target {target}",
            wanted="module:function that can be imported",
            got=f"{type(error).__name__}: {error}",
            fix="check the spelling, and that the module lies on Python's path",
        ) from error
    if not callable(function):
        raise InputError(
            f"score.rewards target {target}",
            wanted="a function",
            got=type(function).__name__,
            fix="name a function f(prompts, completions, **columns) -> list[float]",
        )
    return function


@dataclass(frozen=True, slots=True)
class FunctionScorer:
    """`stages.protocols.Reward` around a function; checks that it returns one number an answer."""

    name: str
    role: RewardRole
    weight: float
    target: str

    def __call__(
        self, prompts: Sequence[Turn], completions: Sequence[Turn], columns: Mapping[str, Sequence[object]]
    ) -> list[float | None]:
        function = find_function(self.target)
        try:
            values = list(function(prompts=list(prompts), completions=list(completions), **columns))
            rewards = [None if value is None else float(value) for value in values]
        except Exception as error:  # a user's function may raise anything
            traceback.print_exc()  # into this worker's log
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{frame.filename}, line {frame.lineno}"
            got = f"{type(error).__name__}: {error} ({place})"
            raise self._refuse("one float, or None, for each completion", got, "mend the function there") from error
        if len(rewards) != len(completions):
            wanted = f"{len(completions)} rewards for {len(completions)} answers"
            fix = "return one float, or None, for each completion, in order"
            raise self._refuse(wanted, f"{len(rewards)} rewards", fix)
        return rewards

    def _refuse(self, wanted: str, got: str, fix: str) -> StageError:
        return StageError(f"score: reward {self.name} ({self.target})", wanted=wanted, got=got, fix=fix)
