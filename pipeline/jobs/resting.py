"""Jobs that have workers let go of their devices, for others whose turn it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stages.protocols import Reward, Sampler


def rest_sampler(sampler: Sampler) -> None:
    sampler.rest()


def rest_rewards(rewards: Sequence[Reward]) -> None:
    for reward in rewards:
        reward.rest()


def rest_trainer(trainer: Any, _report: Callable[[Any], None]) -> None:
    """By the training group, on all ranks together."""
    trainer.rest()
