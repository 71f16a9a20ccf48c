"""A process that dies in the middle of removals or renamings, for as long as a block."""

from __future__ import annotations

import itertools
import os
from contextlib import contextmanager, suppress


class Killed(BaseException):
    """What a kill is to the code that it hits: nothing after it runs."""


@contextmanager
def killed_after(calls, monkeypatch, *, of="unlink"):
    """The process dies just after it removed, or with another function of `os` renamed, so many files or folders; with
    fewer of them it lives."""
    with monkeypatch.context() as patched:
        work, count = getattr(os, of), itertools.count(1)

        def work_and_die(*args, **options):
            work(*args, **options)
            if next(count) == calls:
                raise Killed

        patched.setattr(os, of, work_and_die)
        with suppress(Killed):
            yield
