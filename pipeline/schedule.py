"""How many rounds a run has: the config's, those added later, and the reasons to stop before the last.

Additions are kept in ``rounds.json`` in the run's folder, so that a run that is going on finds them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import MAX_ROUNDS
from pipeline.files import read_json, write_json
from pipeline.gate import is_promoted
from pipeline.mirror import fetch
from pipeline.sections import GateConfig, StopConfig
from stages.errors import ConfigError

_FILE = "rounds.json"


def asked_rounds(folder: Path, configured: int) -> int:
    """The rounds that a run in `folder` has: the config's number, or more if some were added."""
    file = folder / _FILE
    fetch(file)
    return max(configured, read_json(file)["rounds"]) if file.exists() else configured


def parse_addition(text: str) -> int:
    """The number in ``+2``.

    Raises:
        ConfigError: for anything else.
    """
    if not text.startswith("+") or not text[1:].isdecimal() or not 0 < int(text[1:]) <= MAX_ROUNDS:
        raise ConfigError(
            "--rounds", wanted="how many to add, as +2", got=text or "nothing", fix="--rounds +2; or --set rounds=5"
        )
    return int(text[1:])


def add_rounds(folder: Path, configured: int, more: int, *, settled: int, going_on: bool) -> tuple[int, bool]:
    """Add rounds to a run, and say how many it has now.

    The same command carries on where it was interrupted: the same addition to a run that has not reached the last one
    yet, and that nobody works on, adds nothing.

    Args:
        configured: the config's rounds.
        more: how many to add.
        settled: rounds that are finished.
        going_on: whether a process works on the run now.

    Returns:
        The rounds in all, and whether this call added any.
    """
    file = folder / _FILE
    found = read_json(file) if file.exists() else {"rounds": configured, "added": 0}
    rounds = max(configured, found["rounds"])
    if found["added"] == more and settled < found["rounds"] and not going_on:
        return rounds, False
    write_json(file, {"rounds": rounds + more, "added": more})
    return rounds + more, True


def reason_to_stop(config: StopConfig, gate: GateConfig | None, reports: Sequence[Mapping[str, Any]]) -> str | None:
    """Why no further round is wanted, in words; None if one is. A result that was not promoted is nobody's best.

    Args:
        reports: of the settled rounds in order, the evaluation before the first round among them.
    """
    rounds = [report for report in reports if report["round"]]
    if not rounds:
        return None
    if gate is not None and gate.on_fail == "stop" and not is_promoted(rounds[-1]):
        return f"the result of round {rounds[-1]['round']} did not pass the gate; gate.on_fail is stop"
    hours = sum(report.get("seconds", 0.0) for report in rounds) / 3600
    if config.max_hours is not None and hours >= config.max_hours:
        return f"the rounds took {hours:.2f} hours; stop_when.max_hours is {config.max_hours:g}"
    promoted = [report for report in reports if report.get("evaluate") and is_promoted(report)]
    kl = promoted[-1]["evaluate"].get("kl") if promoted else None
    if config.max_kl is not None and kl is not None and kl > config.max_kl:
        return f"the policy is {kl:.2f} nats an answer from the first one; stop_when.max_kl is {config.max_kl:g}"
    if config.patience is not None:
        rewards = {report["round"]: report["evaluate"]["reward"] for report in promoted}
        best = max(rewards, key=lambda number: (rewards[number], -number))
        waited = rounds[-1]["round"] - best
        if waited >= config.patience:
            since = f"round {best}" if best else "before the first round"
            return (
                f"the held-out reward has not risen for {waited} round{'s' * (waited > 1)}: its best is "
                f"{rewards[best]:.2f}, {since}; stop_when.patience is {config.patience}"
            )
    return None
