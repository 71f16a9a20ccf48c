"""Fingerprints: what a result was made from, compared with what is asked for now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.errors import FingerprintError


def refuse_other_fingerprint(where: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a result that was made from something else, with the fields that differ.

    Raises:
        FingerprintError: naming each differing field with both values.
    """
    if fields := differing_fields(found, wanted):
        then, now = _flat(found), _flat(wanted)
        raise FingerprintError(
            str(where),
            wanted="\n".join(f"{key}: {now.get(key, 'nothing')}" for key in fields),
            got="\n".join(f"{key}: {then.get(key, 'nothing')}" for key in fields),
            fix="go back to the config that made it, or start another run that reuses what is unchanged: "
            "prefloop fork RUN --name NEW --set …",
        )


def differing_fields(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Dotted names of the fields in which two fingerprints differ."""
    then, now = _flat(found), _flat(json.loads(json.dumps(wanted)))
    return [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: leaf for name, part in value.items() for key, leaf in _flat(part, f"{prefix}{name}.").items()}
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return {key: leaf for i, part in enumerate(value) for key, leaf in _flat(part, f"{prefix}{i}.").items()}
    return {prefix.removesuffix("."): value}
