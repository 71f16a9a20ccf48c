"""Rewards that are Python functions of TRL's shape: ``f(prompts, completions, **columns) -> list[float]``."""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

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
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        missing = isinstance(error, (ModuleNotFoundError, AttributeError))
        raise InputError(
            f"score.rewards target {target}",
            wanted="module:function that can be imported",
            got=_told(error),
            fix="check the spelling, and that the module lies beside the config or on Python's path"
            if missing
            else "mend the module there",
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
            # Copies: what a function does to its arguments must not reach the next reward.
            values = function(**deepcopy({"prompts": list(prompts), "completions": list(completions), **columns}))
            values = list(values) if _is_many(values) else values
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            traceback.print_exc()  # into this worker's log
            never_entered = isinstance(error, TypeError) and len(traceback.extract_tb(error.__traceback__)) == 1
            fix = f"declare f(prompts, completions, **columns): columns are {', '.join(columns)}"
            raise self._refuse(_told(error), fix if never_entered else "mend the function there") from error
        if not isinstance(values, list):
            if inspect.iscoroutine(values):
                values.close()
            asked = " (a function with async def)" if inspect.iscoroutine(values) else ""
            raise self._refuse(f"{type(values).__name__}{asked}", "return a list")
        if len(values) != len(completions):
            raise self._refuse(f"{len(values)} for {len(completions)} answers", "return as many, in order")
        return [self._number(value, index) for index, value in enumerate(values)]

    @property
    def sees(self) -> Literal["turns", "texts"]:
        return "turns"

    def rest(self) -> None:
        """Nothing to let go of: what a function keeps is its own."""

    def _number(self, value: Any, index: int) -> float | None:
        try:
            if value is None or not isinstance(value, (str, bytes)):
                return None if value is None else float(value)
        except (TypeError, ValueError, OverflowError):
            pass
        got = f"{type(value).__name__} {str(value)[:80]!r} for answer {index + 1}"
        raise self._refuse(got, "return a number, or None where there is none")

    def _refuse(self, got: str, fix: str) -> StageError:
        wanted = "one float, or None, for each completion"
        return StageError(f"score: reward {self.name} ({self.target})", wanted=wanted, got=got, fix=fix)


def _is_many(values: Any) -> bool:
    """Whether a function's result may be a list of rewards, arrays and tensors included; sets have no order."""
    listed = isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping, Set))
    return listed and getattr(values, "ndim", 1) > 0


def _told(error: BaseException) -> str:
    """An error in one line, with the place in the user's code that it comes from."""
    ours = (__file__, importlib.__file__)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    known = frame.filename not in ours and not frame.filename.startswith("<")
    place = f" ({frame.filename}, line {frame.lineno})" if known else ""
    words = str(error).splitlines() or ["no message"]
    return f"{type(error).__name__}: {words[0]}{place}"
