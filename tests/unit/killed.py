"""A process that dies in the middle of a removal, for as long as a block."""

from __future__ import annotations

import itertools
import os
from contextlib import contextmanager, suppress


class Killed(BaseException):
    """What a kill is to the code that it hits: nothing after it runs."""


@contextmanager
def killed_after(removals, monkeypatch):
    """The process dies just after it removed so many files; with fewer to remove it lives."""
    with monkeypatch.context() as patched:
        unlink, count = os.unlink, itertools.count(1)

        def unlink_and_die(*args, **options):
            unlink(*args, **options)
            if next(count) == removals:
                raise Killed

        patched.setattr(os, "unlink", unlink_and_die)
        with suppress(Killed):
            yield
