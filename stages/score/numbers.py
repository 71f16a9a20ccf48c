"""A reward for arithmetic word problems: is the final number right?"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

_FOUND = re.compile(r"(?<![\w.])(?:-?[$€£]\s?-?|-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?")
# What a final number stands behind, the surest sign first.
_SIGNS = (r"####", r"\\boxed\s*\{", r"(?:answer|result|total)\s*(?:is|:|=)", r"(?:^|\s)A\s*:")


def final_number(prompts: list[Any], completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """1.0 where a completion's final number equals that of the true answer, else 0.0.

    Both may be whole solutions. The final number stands on the line behind the last ``####``, else behind the last
    ``\\boxed{``, "answer is", or "A:"; there it is the one after the last ``=``, or the first. Without such a sign it
    is the last number of all. "$1,080.00" equals "1080".
    """
    return [
        float((found := number_of(_text(completion))) is not None and found == number_of(truth))
        for completion, truth in zip(completions, answer, strict=True)
    ]


def number_of(text: str) -> Decimal | None:
    """The final number of a solution; None where it has none."""
    text = text.replace("\N{MINUS SIGN}", "-")
    for sign in _SIGNS:
        ends = [match.end() for match in re.finditer(sign, text, re.IGNORECASE | re.MULTILINE)]
        line = text[ends[-1] :].lstrip().partition("\n")[0] if ends else ""
        for part in (line.rpartition("=")[2], line):
            if first := _FOUND.search(part):
                return _decimal(first.group())
    numbers = _FOUND.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def _decimal(found: str) -> Decimal:
    digits = Decimal(re.sub(r"[^\d.]", "", found))
    return -digits if found.count("-") % 2 else digits


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)
