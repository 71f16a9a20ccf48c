"""Work in a process of its own, whose memory and libraries go with it."""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def apart(work: Any, *args: Any) -> Any:
    """What a function gives in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def be_quiet() -> None:
    """Send what libraries say in this process nowhere; errors come back as they are."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
