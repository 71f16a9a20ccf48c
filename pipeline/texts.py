"""Sampled text made fit for people's eyes: nothing in it may act on a terminal or a page, and it may be very long."""

from __future__ import annotations

import unicodedata

_KEPT = "\n\t\u200c\u200d"  # the last two join letters in Persian and emoji
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format (bidi among them), lone surrogates, line separators


def visible(text: str) -> str:
    """`text` with every character that is not seen but acts written out, as ``\\x1b`` or ``\\u202e``."""
    return text if text.isprintable() else "".join(map(_shown, text))


def cut(text: str, limit: int) -> str:
    """At most about `limit` characters: the beginning, the end, and how much was left out between them."""
    left_out = len(text) - limit
    if left_out <= 0:
        return text
    end = limit // 3
    return f"{text[: limit - end]} [… {left_out:,} characters …] {text[len(text) - end :]}"


def _shown(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _UNSEEN:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
