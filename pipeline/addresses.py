"""Where a run lies: a folder, or an address on an object store with a working folder on every node."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

SCHEMES = ("s3", "gs", "az", "file")


def is_address(place: str) -> bool:
    """Whether this names a place on a store, by its scheme."""
    return "://" in place


def place_of_run(folder: str, name: str) -> str:
    """Where a run of this name lies in a folder, or at an address, of runs, as the config writes it."""
    return f"{folder.rstrip('/')}/{name}"


def working_folder(address: str, use: Literal["working", "reading"] = "working") -> Path:
    """Where a node keeps its copy of the run at an address: the same path on every node with the same cache folder.

    Args:
        use: those that only read a run keep a copy of their own, so that they never disturb the one being written.
    """
    from pipeline.embedded import cache_root

    address = address.rstrip("/")
    key = hashlib.sha256(address.encode()).hexdigest()[:16]
    return (cache_root() / use / key / address.rpartition("/")[2]).absolute()
