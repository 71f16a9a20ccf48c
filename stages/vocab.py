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

FATE_MEANINGS: dict[Fate, str] = {
    "prompt_too_long": "the prompt leaves no room for an answer in the model's context",
    "quarantined": "the prompt was set aside, since worker after worker died of it",
    "engine_error": "the engine gave no answer",
    "score_error": "no answer has a finite number for every reward that is needed",
    "all_truncated": "every answer was cut off at max_new_tokens",
    "too_few_valid": "fewer than two answers could be used",
    "duplicate_answers": "all usable answers have the same text",
    "disagreement": "the single rewards agree on no two answers, which of them is better",
    "tied": "the answers differ, but all have the same reward",
    "gap_too_small": "no two rewards are as far apart as pair.min_margin asks",
    "no_pair_by_rule": "the pairing rule makes no pair of these answers",
    "paired": "made chosen/rejected pairs, or a group, to train on",
}
"""Each fate in a reader's words."""

FinishReason = Literal["stop", "length"]
"""How an answer ended: by a stop token or string, or at ``max_new_tokens``."""

RewardRole = Literal["main", "auxiliary", "holdout"]
"""``main`` rewards make the pairs; ``holdout`` ones are reported and never trained on."""

POLICY_STREAM = "policy"
"""The stream of candidates that the round's start policy samples for training."""

EVALUATION_STREAM = "evaluation"
"""The stream that a policy samples on held-out prompts."""
