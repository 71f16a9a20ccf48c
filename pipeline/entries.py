"""A published part's entry: what vouches for its file, and for itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.files import read_json, write_json
from stages.errors import ContractError, InputError

_CHECK = "check"  # an entry's hash of itself


@dataclass(frozen=True, slots=True)
class Entry:
    """A published part.

    Attributes:
        shard: its number.
        file: its name in the stage's folder.
        sha256, bytes, rows: of the file.
        contract, version: of its table.
        parents: sha256 of the parts it was made from.
        drops: what the stage left out of it, as plain JSON records.
        stats: figures about its rows, summed over shards in reports.
    """

    shard: int
    file: str
    sha256: str
    bytes: int
    rows: int
    contract: str
    version: int
    parents: list[str]
    drops: list[dict[str, Any]] = field(default_factory=list)
    stats: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Entry:
        """A published entry.

        Raises:
            ContractError: if it is not as it was written.
        """
        try:
            found = read_json(file)
            check = found.pop(_CHECK)
            entry = cls(**found)
        except (InputError, AttributeError, KeyError, TypeError):
            entry, check = None, None
        if entry is None or check != entry._hash():
            raise ContractError(
                str(file),
                wanted="a shard's entry, as published",
                got="one that was changed",
                fix="restore the file, or delete it to have the shard made again, and run again",
            )
        return entry

    def write(self, file: Path) -> None:
        """Publish it, with a hash of itself."""
        write_json(file, asdict(self) | {_CHECK: self._hash()})

    def _hash(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
