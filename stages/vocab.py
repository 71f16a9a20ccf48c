"""Words with one meaning each, the same in column, class, command, log and page."""

from __future__ import annotations

from typing import Literal

Fate = Literal[
    "prompt_too_long",
    "quarantined",
    "engine_error",
    "score_error",
    "all_truncated",
    "too_few_valid",
    "duplicate_answers",
    "disagreement",
    "tied",
    "gap_too_small",
    "no_pair_by_rule",
    "paired",
]
"""What became of a prompt in a round. Every prompt has exactly one: the first of these that applies."""

FinishReason = Literal["stop", "length"]
"""How an answer ended: by a stop token or string, or at ``max_new_tokens``."""

RewardRole = Literal["main", "auxiliary", "holdout"]
"""``main`` rewards make the pairs; ``holdout`` ones are reported and never trained on."""

POLICY_STREAM = "policy"
"""The stream of candidates that the round's start policy samples for training."""

EVALUATION_STREAM = "evaluation"
"""The stream that a policy samples on held-out prompts."""
