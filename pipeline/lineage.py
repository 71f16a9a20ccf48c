"""The run's lineage file, ``run.json``: what each round started from and made, and which policy stands."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pipeline.console import Console
from pipeline.files import read_unvouched, read_vouched, write_vouched
from stages.protocols import Weights


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """A settled round.

    Attributes:
        sampling: the policy that answered the prompts.
        result: the policy that the round made; None where its update was ended without one.
        standing: the policy that the run stands behind after the round.
        decision, reason: what was done with the result, and why.
        fingerprint: what the round was made from.
        is_dropped: whether its weights were removed since.
    """

    round: int
    sampling: Weights
    start: Weights
    references: list[Weights]
    result: Weights | None
    standing: Weights
    decision: str
    reason: str
    fingerprint: Mapping[str, Any]
    is_dropped: bool = False


@dataclass(slots=True)
class Lineage:
    """All settled rounds of a run, on disk after every change."""

    file: Path
    rounds: list[RoundRecord] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> Lineage:
        """The lineage in a run's folder; empty for a new run. Raises as `read_records`."""
        records = []
        for found in read_records(file):
            policies = {key: _weights(found[key], file.parent) for key in ("sampling", "start", "standing")}
            result = _weights(found["result"], file.parent) if found["result"] else None
            references = [_weights(reference, file.parent) for reference in found["references"]]
            records.append(RoundRecord(**found | policies | {"result": result, "references": references}))
        return cls(file, records)

    def standing(self, number: int, *, first: Weights) -> Weights:
        """The policy that the run stands behind after a round; `first` before any."""
        return self.rounds[number - 1].standing if number else first

    def line(self, number: int) -> tuple[int, ...]:
        """The rounds that led to the policy standing after a round, the newest first; what was held is not in it."""
        found = []
        while number and (made_in := self.rounds[number - 1].standing.round):
            found.append(made_in)
            number = made_in - 1
        return tuple(found)

    def settle(self, record: RoundRecord) -> None:
        """Add a round."""
        self.rounds.append(record)
        self._write()

    def drop(self, rounds: Collection[int]) -> None:
        """Note that the weights of some rounds are removed."""
        self.rounds = [replace(r, is_dropped=True) if r.round in rounds else r for r in self.rounds]
        self._write()

    def _write(self) -> None:
        write_records(self.file, [self._plain(found) for found in self.rounds])

    def _plain(self, record: RoundRecord) -> dict[str, Any]:
        folder = self.file.parent
        return {
            "round": record.round,
            "sampling": describe(record.sampling, folder),
            "start": describe(record.start, folder),
            "references": [describe(weights, folder) for weights in record.references],
            "result": describe(record.result, folder) if record.result is not None else None,
            "standing": describe(record.standing, folder),
            "decision": record.decision,
            "reason": record.reason,
            "fingerprint": record.fingerprint,
            "is_dropped": record.is_dropped,
        }


def read_records(file: Path) -> list[dict[str, Any]]:
    """The settled rounds in a lineage file as plain JSON; none for a new run.

    Raises:
        ContractError: if it was changed.
    """
    if not file.exists():
        return []
    fix = "restore the file, or start a run of another name: --set run.name=…"
    return read_vouched(file, "a run's lineage", fix=fix)["rounds"]  # type: ignore[no-any-return]


def standing_round(records: Sequence[Mapping[str, Any]]) -> int | None:
    """The round that made the policy that a run stands behind after these; 0: the first policy; None: no round yet."""
    return records[-1]["standing"]["round"] if records else None


def shown_records(file: Path) -> list[dict[str, Any]]:
    """As `read_records`, for what is only shown: a file of an earlier version, without a hash of itself, is read too.

    Raises:
        ContractError: if it was changed, or is of a version whose records say less.
    """
    found = (read_unvouched(file) or {}).get("rounds") if file.exists() else None
    known = {of_record.name for of_record in fields(RoundRecord)}
    if not isinstance(found, list) or not all(isinstance(record, dict) and known <= record.keys() for record in found):
        return read_records(file)
    Console().line("", "lineage", f"{file} has no hash of itself: whether it was changed since is not known")
    return found


def write_records(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write settled rounds as plain JSON, see `read_records`."""
    write_vouched(file, {"rounds": list(records)})


def describe(weights: Weights, run_folder: Path) -> dict[str, Any]:
    """Weights as plain JSON; paths inside the run's folder are relative to it, so that the folder may move."""
    return {
        "path": _relative(weights.path, run_folder),
        "sha256": weights.sha256,
        "round": weights.round,
        "master": _relative(weights.master, run_folder) if weights.master else None,
        "master_sha256": weights.master_sha256,
    }


def _relative(path: Path, run_folder: Path) -> str:
    return str(path.relative_to(run_folder) if path.is_relative_to(run_folder) else path)


def _weights(found: Mapping[str, Any], run_folder: Path) -> Weights:
    master = run_folder / found["master"] if found["master"] else None
    return Weights(run_folder / found["path"], found["sha256"], found["round"], master, found["master_sha256"])
