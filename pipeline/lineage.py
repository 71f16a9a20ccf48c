"""The run's lineage file, ``run.json``: which policy each round started from, referred to and made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifacts import read_json, write_json
from stages.protocols import Weights


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """A settled round.

    Attributes:
        decision, reason: what was done with the result, and why.
        fingerprint: what the round was made from.
    """

    round: int
    start: Weights
    references: list[Weights]
    result: Weights
    decision: str
    reason: str
    fingerprint: Mapping[str, Any]


@dataclass(slots=True)
class Lineage:
    """All settled rounds of a run, on disk after every change."""

    file: Path
    rounds: list[RoundRecord] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> Lineage:
        """The lineage in a run's folder; empty for a new run."""
        if not file.exists():
            return cls(file)
        records = []
        for found in read_json(file)["rounds"]:
            found["start"], found["result"] = _weights(found["start"]), _weights(found["result"])
            found["references"] = [_weights(reference) for reference in found["references"]]
            records.append(RoundRecord(**found))
        return cls(file, records)

    def settle(self, record: RoundRecord) -> None:
        """Add a round."""
        self.rounds.append(record)
        write_json(self.file, {"rounds": [_plain(asdict(found)) for found in self.rounds]})


def _weights(found: Mapping[str, Any]) -> Weights:
    master = found["master"]
    return Weights(Path(found["path"]), found["sha256"], found["round"], Path(master) if master else None)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value
