"""A policy with a brother and a stranger, a run of them without training, and stand-ins for what rounds made."""

from __future__ import annotations

from pathlib import Path

import tiny_models
from here import workshop

from stages.protocols import Weights

REWARDS = "score.rewards=[{type: function, target: 'stages.score.functions:exact_match'}]"


def make_models(root: Path) -> Path:
    """Tiny models ``policy``, ``brother`` of the same tokenizer and ``stranger``, and two prompts."""
    for name, kind in {"policy": "gpt2", "brother": "gpt2", "stranger": "qwen3"}.items():
        tiny_models.policy(kind, root / name)
    (root / "prompts.jsonl").write_text('{"prompt": "The old mill"}\n{"prompt": "Bread is"}\n')
    return root


def shop_of(models, *overrides, into: Path):
    sets = [f"policy.path={models / 'policy'}", "policy.pad_token=<|endoftext|>", "prompts.per_round=2", REWARDS]
    sets += [f"prompts.path={models / 'prompts.jsonl'}", "evaluate=null"]
    return workshop(into, *sets, *overrides, needs=("policy", "references", "prompts", "rewards"))


def weights(number: int) -> Weights:
    """Stand-ins for policies that no one opens here: only their names count."""
    return Weights(Path(f"/policies/{number}"), f"{number:064x}", number)
