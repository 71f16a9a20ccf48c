"""When workers worked: jobs timed where they run, by the worker's own clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Timed:
    """What a job returned, and when it began and ended, in seconds since 1970.

    Attributes:
        build_s: seconds that its worker took just before to build its state; None where it was built already.
        worker: the name of whoever did it, as its log has it.
    """

    value: Any
    began: float
    ended: float
    build_s: float | None = None
    worker: str = ""


OnWork = Callable[[Any, Timed], object]
"""Called in the driver with each job that has ended."""


def timed(job: Callable[..., Any], *arguments: Any, build_s: float | None = None) -> Timed:
    """Run a job; whatever made it wait before (a worker's start, Ray's queues) is not counted."""
    began = time.time()
    value = job(*arguments)
    return Timed(value, began, time.time(), build_s)


def unnoted(_job: Any, _timed: Timed) -> None:
    """For those who do not want to know."""
