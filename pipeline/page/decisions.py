"""What was decided on each round's result, and on which figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Judgement:
    """A limit of the gate beside its figure: in words, and whether it was kept."""

    limit: str
    told: str
    kept: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """A round's decision; `standing` says which policy the run stands behind after it."""

    round: int
    decision: str
    reason: str
    standing: str
    judgements: list[Judgement]


def decisions(reports: Sequence[Mapping[str, Any]]) -> list[Decision]:
    """The settled rounds' decisions, in order."""
    return [_decision(report) for report in reports if report["round"] and "decision" in report]


def _decision(report: Mapping[str, Any]) -> Decision:
    gate = report.get("gate") or {}
    standing = gate.get("standing_round", report["round"] if report["decision"] == "promote" else None)
    told = {None: "", 0: "the first policy"}.get(standing, f"the policy of round {standing}")
    judgements = [
        Judgement(f"{check['name']} {check['limit']:g}", check["told"], check["kept"])
        for check in gate.get("checks", ())
    ]
    return Decision(report["round"], report["decision"], report["reason"], told, judgements)
