"""What a check found, and how checks are run so that one that breaks is a finding, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from stages.errors import PrefloopError

State = Literal["good", "bad", "left out"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table.

    Attributes:
        part: what was looked at.
        found: in words.
        fix: the next thing to do about it; empty unless it is bad.
    """

    part: str
    state: State
    found: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Bad(Exception):
    """What a check raises where something is not as it should be."""

    found: str
    fix: str


Check = Callable[[], str]
"""Looks at one part: what it found, in words; raises `Bad` or a `PrefloopError` where that is not good."""


class LeftOut(Exception):
    """What a check raises where it cannot look, with the reason."""


def looked_at(checks: dict[str, Check]) -> Iterator[Finding]:
    """The findings of some checks, each as soon as it is there."""
    for part, check in checks.items():
        try:
            yield Finding(part, "good", check())
        except LeftOut as reason:
            yield Finding(part, "left out", str(reason))
        except Bad as bad:
            yield Finding(part, "bad", bad.found, bad.fix)
        except PrefloopError as error:
            yield Finding(part, "bad", f"{error.where}: {error.got} (wanted: {error.wanted})", error.fix)
        except Exception as error:  # what a library raises for a broken part
            told = (str(error).splitlines() or ["no message"])[0]
            yield Finding(part, "bad", f"{type(error).__name__}: {told}", "see what it names; reinstall that library")
