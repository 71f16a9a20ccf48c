"""The learning rate of a step, written out."""

from __future__ import annotations

import math

from stages.update.config import UpdateConfig


def learning_rate_at(step: int, total: int, config: UpdateConfig) -> float:
    """Linear warm-up, then linear, cosine or no decay; `step` counts from 0 and the decay ends at 0 after the last.

    With warm-up the first step's rate is above 0, so that no step is lost.
    """
    warmup = math.ceil(total * config.warmup_ratio)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    decay = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}
    return config.learning_rate * decay[config.lr_scheduler_type]
