"""A published part's entry: what vouches for its file, and for itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.files import read_vouched, write_vouched


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
        fix = "restore the file, or delete it to have the shard made again, and run again"
        return cls(**read_vouched(file, "a shard's entry", fix=fix))

    def write(self, file: Path) -> None:
        """Publish it, with a hash of itself.

        Raises:
            AlreadyThere: if a run's store has one.
        """
        write_vouched(file, asdict(self), once=True)
