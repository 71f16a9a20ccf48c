"""Ids and seeds as hashes of the work itself, never of worker, order or clock."""

from __future__ import annotations

import hashlib

_SEED_BITS = 62


def row_id(*parts: object) -> str:
    """32 hex characters that name a row; equal parts give equal ids, and ("ab", "c") differs from ("a", "bc")."""
    return _digest(parts).hex()[:32]


def hashed_seed(*parts: object) -> int:
    """A seed in [0, 2**62): room is left for an engine to add a sample index without leaving int64."""
    return int.from_bytes(_digest(parts)[:8], "big") >> (64 - _SEED_BITS)


def _digest(parts: tuple[object, ...]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        text = str(part).encode("utf-8", "surrogatepass")
        digest.update(len(text).to_bytes(8, "big") + text)
    return digest.digest()
