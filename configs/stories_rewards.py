"""A reward for story models: happy words."""

from __future__ import annotations

import re
from typing import Any

_HAPPY_WORDS = """
happy happily happiness joy joyful smile smiled smiles smiling laugh laughed laughing love loved loves fun glad excited
play played playing hug hugged friend friends cheerful kind nice
"""
HAPPY = frozenset(_HAPPY_WORDS.split())


def happy_words(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Happy words per 100 words of the completion; 0 for one without words."""
    return [_share(re.findall(r"[a-z]+", text.lower())) for text in completions]


def _share(words: list[str]) -> float:
    return 100 * sum(word in HAPPY for word in words) / len(words) if words else 0.0
