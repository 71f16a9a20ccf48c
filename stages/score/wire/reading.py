"""The score in a judge's reply, by the rule that the config states; a reply without one has a reason instead."""

from __future__ import annotations

import json
import re
from typing import Any

from stages.protocols import NoReward
from stages.score.wire.config import JudgeReward

_NUMBER = r"-?\d+(?:\.\d+)?"
# 8/10 is one number, 8; the 3 of gpt3 and the 2 of 1.5.2 are none.
_NUMBERS = re.compile(rf"(?<![\w.])({_NUMBER})(?:\s*/\s*{_NUMBER})?(?![\w]|\.\d)")


def score_in(reply: str, config: JudgeReward) -> float | NoReward:
    """The score that a reply gives, from `config.low` to `config.high`."""
    reply = reply.replace("\N{MINUS SIGN}", "-")
    if config.read == "json":
        found = _last_field(reply, config.json_field)
    elif config.read == "pattern":
        assert config.pattern is not None
        found = _last(re.findall(config.pattern, reply))
    else:
        found = _last(_NUMBERS.findall(reply))
    if found is None:
        return NoReward(f"no score by the rule {config.read} in the judge's {_end_of(reply)}")
    try:
        score = float(found)
    except (TypeError, ValueError, OverflowError):
        return NoReward(f"{str(found)[:40]!r} is no number in the judge's {_end_of(reply)}")
    if isinstance(found, bool) or not config.low <= score <= config.high:
        return NoReward(f"{str(found)[:40]} is not from {config.low:g} to {config.high:g}")
    return score


def _last(found: list[str]) -> str | None:
    return found[-1] if found else None


def _last_field(reply: str, field: str) -> Any:
    """The field of the last JSON object that has it, wherever in the reply it stands."""
    decoder, at, found = json.JSONDecoder(), reply.find("{"), None
    while at >= 0:
        try:
            value, end = decoder.raw_decode(reply, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            found = value.get(field, found)
        at = reply.find("{", end)
    return found


def _end_of(reply: str) -> str:
    text = " ".join(reply.split())
    return f"reply, which ends {text[-80:]!r}" if text else "reply, which is empty"
